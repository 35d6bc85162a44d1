"""Losses: distances of a decoder layer's sparse output from the dense one, or from the text."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from permllm.models.families import after_layers
from permllm.models.head import Head, tokens_at_a_time
from permllm.runtime.compiling import compiled

# Logits of all steps from which compiling saves time: it takes 10 s, and saves 12 ns a logit on one
# core.
_COMPILE_FROM = 1e9
# Logits in memory at a time on a GPU, for 128 to 1024 tokens.
_LOGITS = 1 << 25

# Function `(sparse, dense, labels, with_gradient)`: returns the divergence and the gradient of
# `sparse`. Both first inputs are logits `(tokens, vocabulary)`. `labels` are the next tokens, int64
# `(tokens,)`, -1 where there is none. Both results are sums over tokens, because the gradient of a
# mean would vanish in float16.
_Divergence = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]


def chunk_of(device: torch.device, vocabulary: int) -> int:
    """Return the largest number of tokens whose logits are in memory at a time (a chunk).

    A chunk takes four numbers for each logit. A GPU reads the whole head for each chunk.
    """
    on_gpu = max(128, min(1024, _LOGITS // vocabulary))
    return tokens_at_a_time(vocabulary, 128 if device.type == "cpu" else on_gpu)


def loss_named(
    name: str, model: nn.Module, tokens: int, compile_: bool | None, cross_entropy: float = 0.0
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a function `(output, target, windows)`: the loss, mean over tokens.

    Output and target are those of a decoder layer, `(batch, tokens, hidden)`. The windows are the
    tokens, int64 `(batch, tokens)`.

    Args:
        name: `cosine`, or `kl`, which needs the outputs of the last layer.
        model: model with the final norm and the head, for `kl`.
        tokens: number of tokens in all steps.
        compile_: compile the elementwise work of `kl`; None: compile if there are enough tokens.
        cross_entropy: share of the cross entropy of the windows' next tokens in `kl`.
    """
    if name == "cosine":
        return lambda output, target, windows: cosine_loss(output, target)
    head = Head(model)
    wanted = tokens * len(head.weight) > _COMPILE_FROM if compile_ is None else compile_
    divergence = _divergence_of(cross_entropy, head.plain and wanted)
    return partial(head_divergence, head, divergence)


def cosine_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return `1 - cos(output, target)`, mean over tokens, in float32 (PermLLM, equation 8)."""
    output = _wide(output)
    target = _wide(target)
    return 1.0 - nn.functional.cosine_similarity(output, target, dim=-1).mean()


@cache
def _divergence_of(share: float, compile_: bool) -> _Divergence:
    """Return the divergence from the dense model, mixed with a share of the text's cross entropy.

    The function is always the same for the same arguments, so that it is compiled once.
    """

    def divergence(
        sparse: Tensor, dense: Tensor, labels: Tensor, with_gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Return `sum (1 - s) p (log p - log q) - s log q[label]`, and its gradient.

        p is the dense distribution, q the sparse one. Tokens without a label have no second term.
        """
        log_p = _wide(dense).log_softmax(-1)
        log_q = _wide(sparse).log_softmax(-1)
        p = log_p.exp()
        # The first sum is over the vocabulary: for one sum over both dimensions, Inductor makes a
        # loop with divisions on a GPU.
        divergences = ((log_p - log_q) * p).sum(-1)
        label = labels.clamp_min(0).unsqueeze(-1)
        weight = share * (labels >= 0).to(p.dtype).unsqueeze(-1)
        if share:
            of_text = weight * log_q.gather(-1, label)
            divergences = (1 - share) * divergences - of_text.squeeze(-1)
        if not with_gradient:
            return divergences.sum(), None
        q = log_q.exp()
        gradient = q - p
        if share:
            gradient = ((1 - share) * gradient + weight * q).scatter_add(-1, label, -weight)
        return divergences.sum(), gradient.to(sparse.dtype)

    if not compile_:
        return divergence
    return compiled(divergence, "the divergence is computed without a compiled kernel")


def head_divergence(
    head: Head, divergence: _Divergence, output: Tensor, target: Tensor, windows: Tensor
) -> Tensor:
    """Return a divergence of the next-token distributions, mean over tokens.

    Args:
        head: head of the model.
        divergence: function of logits.
        output, target: sparse and dense output of the last decoder layer, `(batch, tokens,
            hidden)`.
        windows: the tokens, int64 `(batch, tokens)`.
    """
    with torch.no_grad():
        dense = after_layers(head.model, target).flatten(0, -2)
    sparse = after_layers(head.model, output).flatten(0, -2)
    labels = nn.functional.pad(windows[:, 1:], (0, 1), value=-1).flatten().to(sparse.device)
    return _HeadDivergence.apply(sparse, dense, labels, head, divergence)


class _HeadDivergence(torch.autograd.Function):
    """Mean of the chunks' divergences, whose gradient forward makes, so that no logits stay."""

    @staticmethod
    def forward(
        ctx: Any,
        sparse: Tensor,
        dense: Tensor,
        labels: Tensor,
        head: Head,
        divergence_of: _Divergence,
    ) -> Tensor:
        """Return the mean divergence for inputs of the head, `(tokens, hidden)`."""
        logits_of = head.product if head.plain else head.logits
        with_gradient = ctx.needs_input_grad[0]
        total = _wide(sparse.new_zeros(()))
        grad = torch.empty_like(sparse) if with_gradient else sparse.new_empty(0)
        chunk = chunk_of(sparse.device, len(head.weight))
        for first in range(0, len(sparse), chunk):
            tokens = slice(first, first + chunk)
            states = sparse[tokens].detach().requires_grad_(with_gradient)
            with torch.set_grad_enabled(with_gradient):
                logits = logits_of(states)
            divergence, gradient = divergence_of(
                logits.detach(), logits_of(dense[tokens]), labels[tokens], with_gradient
            )
            total += divergence
            if gradient is not None:
                grad[tokens] = torch.autograd.grad(logits, states, gradient)[0]
            del logits, gradient  # frees their memory before the next chunk
        ctx.save_for_backward(grad)
        ctx.tokens = len(sparse)
        return total / len(sparse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        """Scale the gradient that forward has made."""
        (grad,) = ctx.saved_tensors
        return grad * (grads[0] / ctx.tokens).to(grad.dtype), None, None, None, None


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
