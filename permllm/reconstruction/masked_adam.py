"""Adam on the kept weights of some linears."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_swa_multi_avg_fn

from permllm.errors import DataError


class MaskedAdam:
    """Adam with a cosine schedule to zero; what the masks leave out stays as it is, and takes no memory.

    Of float32 weights, half of them kept, it holds 10 bytes a weight: values, their gradients, two moments and their places;
    2 more for an average. The gradient of one linear at a time is whole.

    Args:
        linears: whose weights are trained. Half-precision weights are trained as float32 copies, or small steps would be
            rounded away.
        masks: bool `(C_out, C_in)` for each of them; None trains all weights, as where masks learn too.
        learning_rate: at the start.
        steps: how many there will be.
        average: share of them, the last ones, whose weights' mean `finish` takes; 0 takes the last weights.
    """

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        masks: Sequence[Tensor] | None,
        learning_rate: float,
        steps: int,
        average: float = 0.0,
    ) -> None:
        self.weights: list[Tensor] = [linear.weight for linear in linears]
        self._places = [_places(mask).to(weight.device) for mask, weight in zip(masks or (), self.weights, strict=False)]
        self._values = [
            value.to(torch.promote_types(value.dtype, torch.float32))
            for value in (self._kept(number, weight.detach()) for number, weight in enumerate(self.weights))
        ]
        fused = self.weights[0].device.type in ("cpu", "cuda")
        self._optimizer = torch.optim.Adam(self._values, lr=learning_rate, fused=fused)
        self._scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self._optimizer, steps)
        self._averaged_from = steps - round(average * steps)
        self._mean: list[Tensor] = []
        self._averaged = 0

    @property
    def done(self) -> int:
        """Steps that were made."""
        return self._scheduler.last_epoch

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Gradients for these weights, taken as they arrive, and none afterwards."""
        handles = []
        for number, weight in enumerate(self.weights):
            weight.requires_grad_(True)
            take = lambda arrived, number=number: self._take_gradient(number, arrived)  # noqa: E731
            handles.append(weight.register_post_accumulate_grad_hook(take))
        try:
            yield
        finally:
            for weight, handle in zip(self.weights, handles, strict=True):
                handle.remove()
                weight.requires_grad_(False)

    def step(self) -> None:
        """One step along the gradients of the weights, which are forgotten."""
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._scheduler.step()
        if self.done > self._averaged_from:
            self._mean = self._mean or [value.clone() for value in self._values]
            get_swa_multi_avg_fn()(self._mean, self._values, self._averaged)
            self._averaged += 1
        self._write(self._values)

    def finish(self) -> None:
        """Have the weights be the average, where there is one."""
        if self._mean:
            self._write(self._mean)

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "values": self._values,
            "mean": self._mean,
            "averaged": self._averaged,
            "optimizer": self._optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint. Raises DataError where it is of other weights."""
        if [value.shape for value in state["values"]] != [value.shape for value in self._values]:
            raise DataError("it is of other masks")
        for value, kept in zip(self._values, state["values"], strict=True):
            value.copy_(kept)
        self._mean, self._averaged = list(state["mean"]), state["averaged"]
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self._write(self._values)

    def _take_gradient(self, number: int, weight: Tensor) -> None:
        assert weight.grad is not None
        value = self._values[number]
        value.grad = self._kept(number, weight.grad).to(value.dtype)
        weight.grad = None

    def _kept(self, number: int, tensor: Tensor) -> Tensor:
        """The entries of a tensor `(C_out, C_in)` that the mask keeps, `(kept,)`."""
        return tensor.take(self._places[number].long()) if self._places else tensor.flatten()

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for number, (weight, value) in enumerate(zip(self.weights, values, strict=True)):
            if self._places:
                weight.put_(self._places[number].long(), value.to(weight.dtype))
            else:
                weight.copy_(value.view_as(weight))


def _places(mask: Tensor) -> Tensor:
    return mask.flatten().nonzero().flatten().to(torch.int32)
