"""The weights under masks, as they learn with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from permllm.errors import DataError
from permllm.learning.ordered_linear import OrderedMaskedLinear
from permllm.learning.training import Learner


class MaskedWeightLearner(Learner):
    """Weights that learn under a mask; one that it leaves out has a gradient of zero, and may come back.

    AdamW moves such a weight on for some steps, by its mean of earlier gradients, and decays it like the others.

    Args:
        linears: masked linears by path, with values of their own.
        learning_rate: of the weights.

    Attributes:
        best: weights by linear, `(C_out, C_in)` in the dense model's order and format, on the CPU.
    """

    def __init__(self, linears: Mapping[str, OrderedMaskedLinear], learning_rate: float) -> None:
        self.linears = linears
        self.learning_rate = learning_rate
        self.best: dict[str, Tensor] = {}

    @property
    def values(self) -> dict[str, Tensor]:
        """What learns, `(C_in, C_out)` by linear."""
        return {path: linear.values for path, linear in self.linears.items() if linear.values is not None}

    @override
    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": list(self.values.values()), "lr": self.learning_rate}]

    @override
    def keep(self) -> None:
        self.best = {path: linear.learned_weight().cpu() for path, linear in self.linears.items()}

    @override
    def state(self) -> dict[str, Any]:
        return {"values": {path: values.detach() for path, values in self.values.items()}, "best": self.best}

    @staticmethod
    def check(state: dict[str, Any]) -> None:
        """Raise DataError where a state is not one of weights."""
        for key in ("values", "best"):
            found = state.get(key)
            if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
                raise DataError("it holds no weights")

    @override
    @torch.no_grad()
    def restore(self, state: dict[str, Any]) -> None:
        mine, its = self.values, state["values"]
        if {path: value.shape for path, value in mine.items()} != {path: value.shape for path, value in its.items()}:
            raise DataError("it has weights of other shapes")
        for path, value in mine.items():
            value.copy_(its[path])
        self.best = {path: value.cpu() for path, value in state["best"].items()}
