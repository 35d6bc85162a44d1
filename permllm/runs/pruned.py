"""What a run that has pruned its model left, checked against the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from permllm.config import NMPattern
from permllm.errors import DataError
from permllm.runs.names import MASKS, PERMUTATIONS, WEIGHTS
from permllm.runs.run_tensors import check_mask, mask_reader, read_orders, weight_reader


class Group(Protocol):
    """Linears that share an order: what of a model's channel group its tensors are compared with."""

    @property
    def name(self) -> str:
        """Of the group."""

    @property
    def channels(self) -> int:
        """C_in."""

    @property
    def members(self) -> Sequence[str]:
        """Paths of the linears."""

    @property
    def rows(self) -> Sequence[int]:
        """C_out of each."""

    @property
    def pattern(self) -> NMPattern | None:
        """N:M, where it is not that of the run."""


def linear_shapes(groups: Sequence[Group]) -> dict[str, tuple[int, int]]:
    """`(C_out, C_in)` of each linear of some groups, by its path."""
    return {path: (rows, group.channels) for group in groups for path, rows in zip(group.members, group.rows, strict=True)}


class Pruned:
    """What a run that has pruned its model left, checked against the model: its orders, and its weights one at a time.

    Args:
        directory: of the run.
        metrics: of the run.
        groups: of the model, those that were pruned; it may be on the meta device.
        pattern: N:M of the groups that have none of their own.

    Raises:
        DataError: orders, masks or changed weights are missing, were changed, or are of another model.
    """

    def __init__(self, directory: Path, metrics: Mapping[str, Any], groups: Sequence[Group], pattern: NMPattern) -> None:
        shapes = linear_shapes(groups)
        self.orders = read_orders(directory / PERMUTATIONS, {group.name: group.channels for group in groups})
        self._order_of = {path: self.orders[group.name] for group in groups for path in group.members}
        self._pattern_of = {path: group.pattern or pattern for group in groups for path in group.members}
        self._file = directory / MASKS
        self._mask = mask_reader(self._file, shapes)
        self._weight = None
        weights = directory / WEIGHTS
        if metrics["sparsity"].get("weights_changed", weights.is_file()):
            if not weights.is_file():
                raise DataError(f"{directory} has no {WEIGHTS}: it was run with save_weights=false and cannot be rebuilt")
            self._weight = weight_reader(weights, shapes)

    def check(self, path: str) -> None:
        """Raise DataError unless the mask of a linear is N:M in the order of its channels, and its weight finite."""
        check_mask(self._file, path, self._mask(path), self._order_of[path], self._pattern_of[path])
        if self._weight is not None:
            self._weight(path)

    def weight(self, path: str, dense: Tensor) -> Tensor:
        """The pruned weight of a linear, original channel order, where `dense` is.

        Raises:
            DataError: as `check`.
        """
        new = dense if self._weight is None else self._weight(path)
        return torch.where(self.mask(path).to(dense.device), new.to(dense), 0.0)

    def mask(self, path: str) -> Tensor:
        """The mask of a linear, bool `(C_out, C_in)` in original channel order.

        Raises:
            DataError: it is not N:M in the order of its channels.
        """
        mask = self._mask(path)
        check_mask(self._file, path, mask, self._order_of[path], self._pattern_of[path])
        return mask

    def checked_mask(self, path: str) -> Tensor:
        """What `mask` has given and checked before, read again."""
        return self._mask(path)

    @property
    def weights_changed(self) -> bool:
        """Whether the kept weights are others than the dense model's."""
        return self._weight is not None
