"""Logits of the last hidden states, by the model's own forward.

Most heads are a product with a matrix. Some add a bias, scale the logits or cap them (Phi, Cohere,
Granite, Gemma 2), each family in its own `forward` by a setting of its own name. So the forward is
asked: a head that gives the product is plain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from permllm.models.families import after_layers, family_of
from permllm.models.layers import replaced_forwards

# Tokens of the vocabulary, and hidden states, that a head is compared with the plain product on.
_ROWS, _STATES = 64, 8
# Largest logits of the comparison: where any cap shows, and where none of them does yet.
_SIZES = (1e-2, 1.0, 1e4)
# Vocabulary up to which the logits of all tokens exist together, and how many logits of a larger
# one do: with fewer, a weight would be read for too few products.
_VOCABULARY, _LOGITS = 160_000, 1 << 26


def tokens_at_a_time(vocabulary: int, tokens: int) -> int:
    """Return how many of `tokens` tokens have their logits at a time: few of a large vocabulary."""
    return tokens if vocabulary <= _VOCABULARY else min(tokens, max(1, _LOGITS // vocabulary))


def head_path(model: nn.Module) -> str:
    """Path of the linear that gives the logits; it may share its weight with the embedding."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next(name for name, module in model.named_modules() if module is head)


class Head:
    """Norm and head of a causal language model.

    Args:
        model: of a known family.

    Attributes:
        weight: `(vocabulary, hidden)`.
        plain: whether the logits are the product with the weight and nothing else.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._module: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        # The module that holds the layers, norms what they give, and is all that the forward asks
        # before the head.
        self._body = model.get_submodule(family_of(model).layers.rpartition(".")[0])
        self.weight: Tensor = self._module.weight  # type: ignore[assignment]
        self._rounded = self.weight.detach()
        self.plain = self._is_plain()

    def weight_in(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in the format of products; it is frozen, and rounded once."""
        if self._rounded.dtype != dtype:
            self._rounded = self.weight.detach().to(dtype)
        return self._rounded

    def reads(self, output: Tensor) -> Tensor:
        """Return the input of the head, from the output `(..., hidden)` of the last layer."""
        return after_layers(self._model, output)

    def logits(self, states: Tensor) -> Tensor:
        """Return the model's logits `(..., vocabulary)` of the head's input.

        Args:
            states: `(tokens, hidden)`, or windows of them.
        """
        windows = states if states.dim() == 3 else states[None]
        return self._forward(windows).view(*states.shape[:-1], -1)

    def _forward(self, windows: Tensor, replaced: dict[str, Tensor] | None = None) -> Tensor:
        ids = torch.zeros(windows.shape[:2], dtype=torch.long, device=self.weight.device)
        # The body answers with these states, whatever it is asked.
        states: Any = windows
        answer = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=states)
        with replaced_forwards([self._body], lambda *_, **__: answer):
            output = functional_call(
                self._model,
                replaced or {},
                kwargs={"input_ids": ids, "use_cache": False, "return_dict": True},
            )
        logits: Tensor = output.logits
        return logits

    @torch.no_grad()
    def _is_plain(self) -> bool:
        zero = torch.zeros(
            1, self.weight.shape[1], dtype=self.weight.dtype, device=self.weight.device
        )
        if self.logits(zero).any():  # a bias
            return False
        # A part of the vocabulary in float64, so that no rounding, of the weights' format or of
        # products, hides a difference.
        name = head_path(self._model)
        part = {
            f"{name}.{key}": value[:_ROWS].double()
            for key, value in self._module.named_parameters()
        }
        weight = part[f"{name}.weight"]
        states = torch.randn(
            _STATES,
            weight.shape[1],
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(0),
        )
        states = states.to(weight.device)
        product = states @ weight.t()
        largest = product.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        for size in _SIZES:
            found = self._forward((states * (size / largest))[None], part)[0].double()
            # Logits may be given in float32.
            if not torch.allclose(found, product * (size / largest), rtol=1e-5, atol=1e-6 * size):
                return False
        return True
