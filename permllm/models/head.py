"""Logits of the last hidden states, computed by the model's own forward.

Most heads multiply by a matrix. Some families (Phi, Cohere, Granite, Gemma 2) add a bias, or scale
or cap the logits, under settings of different names. A head is called plain if the model's forward
gives the same logits as the product.
"""

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from permllm.models.families import family_of
from permllm.models.layers import replaced_forwards
from permllm.runtime.precision import product_dtype

# Numbers of vocabulary tokens and hidden states that are compared with the plain product.
_ROWS = 64
_STATES = 8
# Largest logits of the comparison: too small for any cap, and so large that any cap shows.
_SIZES = (1e-2, 1e4)
# Up to this vocabulary, the logits of all tokens are in memory together. For a larger one, this
# number of logits is. With fewer logits, reading the weight would take longer than the products.
LARGE_VOCABULARY = 160_000
LOGITS_AT_A_TIME = 1 << 26


def tokens_at_a_time(vocabulary: int, tokens: int) -> int:
    """Return for how many of `tokens` tokens the logits are in memory at a time."""
    if vocabulary <= LARGE_VOCABULARY:
        return tokens
    return min(tokens, max(1, LOGITS_AT_A_TIME // vocabulary))


def head_path(model: nn.Module) -> str:
    """Return the path of the linear that gives the logits; its weight may be the embedding's."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return next(name for name, module in model.named_modules() if module is head)


class _BodyOutput(BaseModelOutputWithPastAndCrossAttentions):
    """Output of a model's body, with what the heads of some families read beside the states."""

    router_logits = None  # mixtures of experts
    shared_kv_states = None  # Gemma 4


class Head:
    """Head of a causal language model.

    Attributes:
        model: the model.
        weight: `(vocabulary, hidden)`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._module: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        # The module with the layers and the final norm; the forward calls it and then the head.
        self._body = model.get_submodule(family_of(model).layers.rpartition(".")[0])
        self.weight: Tensor = self._module.weight  # type: ignore[assignment]
        self._rounded = self.weight.detach()

    def product(self, states: Tensor) -> Tensor:
        """Return the logits of a plain head, `(tokens, vocabulary)`, for inputs of the head.

        They have the dtype of products. The weight is rounded to it once, because it is frozen.
        """
        dtype = product_dtype(states)
        if self._rounded.dtype != dtype:
            self._rounded = self.weight.detach().to(dtype)
        return states.to(dtype) @ self._rounded.t()

    def logits(self, states: Tensor) -> Tensor:
        """Return the model's logits `(..., vocabulary)` for inputs of the head.

        Args:
            states: `(tokens, hidden)` or `(windows, tokens, hidden)`.
        """
        windows = states if states.dim() == 3 else states[None]
        return self._forward(windows, {}).view(*states.shape[:-1], -1)

    def _forward(self, windows: Tensor, replaced: dict[str, Tensor]) -> Tensor:
        ids = torch.zeros(windows.shape[:2], dtype=torch.long, device=self.weight.device)
        # The body returns these states for any input.
        body = _BodyOutput(last_hidden_state=windows)  # type: ignore[arg-type]
        with replaced_forwards([self._body], lambda *_, **__: body):
            output = functional_call(
                self.model,
                replaced,
                kwargs={"input_ids": ids, "use_cache": False, "return_dict": True},
            )
        return output.logits

    @cached_property
    @torch.no_grad()
    def plain(self) -> bool:
        """Tell whether the logits are the product with the weight and nothing else."""
        # Part of the vocabulary is compared, in float64, because rounding would hide differences.
        name = head_path(self.model)
        part = {
            f"{name}.{key}": value[:_ROWS].double()
            for key, value in self._module.named_parameters()
        }
        weight = part[f"{name}.weight"]
        states = torch.randn(
            _STATES, weight.shape[1], generator=torch.Generator().manual_seed(0)
        ).to(weight)
        states /= (states @ weight.t()).abs().max()
        for size in _SIZES:
            try:
                logits = self._forward(states[None] * size, part)[0].double()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError:  # before the product come modules of another dtype, as in BERT
                return False
            # The tolerance allows for families that return logits in float32.
            product = size * states @ weight.t()
            if not torch.allclose(logits, product, rtol=1e-5, atol=1e-6 * size):
                return False
        return True
