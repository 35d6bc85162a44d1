"""What a base pruner knows of a channel group's inputs: sums over calibration tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

NormOver = Literal["tokens", "samples"]


class InputStatistics:
    """Sums over the tokens that a channel group reads, accumulated batch by batch.

    Args:
        channels: C_in.
        device: where the sums live.
        gram: also accumulate `X^T X`, C_in squared numbers (SparseGPT needs it).
        norm_tokens: tokens that count as one in `norm`: 1, or the length of a sample for the scale of the released code of
            Wanda, RIA and PermLLM, `sqrt(sum of squares over all tokens / number of samples)`.
    """

    def __init__(self, channels: int, device: torch.device | str, gram: bool = False, norm_tokens: int = 1) -> None:
        self.tokens = 0
        self._norm_tokens = norm_tokens
        self._square_sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self._derived: dict[str, Tensor] = {}
        self._dtype = torch.float32
        self._gram = torch.zeros(channels, channels, dtype=torch.float32, device=device) if gram else None

    def update(self, x: Tensor) -> None:
        """Add the activations `x (..., C_in)`, any floating dtype."""
        rows = x.detach().flatten(0, -2)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self._derived.clear()
        self.tokens += rows.shape[0]
        self._dtype = torch.promote_types(x.dtype, torch.float32)
        self._square_sum += rows.square().sum(0).double()
        if self._gram is not None:
            self._gram.addmm_(rows.t().float(), rows.float())

    def derived(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """A quantity that follows from these sums, computed the first time it is asked for under `name`."""
        if name not in self._derived:
            self._derived[name] = compute()
        return self._derived[name]

    @property
    def norm(self) -> Tensor:
        """Root mean square of each channel over tokens, times `sqrt(norm_tokens)`.

        `(C_in,)`, float32 or the wider dtype of the activations.
        """
        return (self._square_sum / max(self.tokens / self._norm_tokens, 1)).sqrt().to(self._dtype)

    @property
    def gram(self) -> Tensor:
        """`X^T X`, float32 `(C_in, C_in)`. Raises RuntimeError when it was not accumulated."""
        if self._gram is None:
            raise RuntimeError("these statistics were accumulated without the Gram matrix")
        return self._gram
