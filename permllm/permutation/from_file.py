"""Reuse the order that another run found or learned, under any pruner."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from permllm.config import NMPattern
from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup
from permllm.permutation.foldable import foldable
from permllm.permutation.settings import FromFileSettings
from permllm.runs.tensors import load_orders


@dataclass
class FromFile(FromFileSettings):
    """Orders out of a `permutations.safetensors`.

    Raises:
        DataError: the file cannot be read, was changed, or holds something else than permutations.
    """

    learned = False
    local = True
    constraint = None  # known once the groups are
    _orders: dict[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("permutation.path is empty: give a run directory or a permutations.safetensors file")
        file = Path(self.path)
        if file.is_dir():
            file = file / "permutations.safetensors"
        if not file.is_file():
            raise ConfigError(f"permutation.path={self.path}: no such file, or a run without permutations")
        self._orders = load_orders(file)

    def check(self, groups: list[ChannelGroup], folds: bool) -> None:
        """Raise ConfigError where a group has no stored order, or where the orders are to fold and do not."""
        orders = {group.name: self._order(group.name, group.channels) for group in groups}
        if not folds:
            return
        try:
            foldable(groups, orders)
        except ConfigError as error:
            raise ConfigError(f"permutation.path={self.path}: {error}; export=gathered keeps any permutation") from error

    def order(self, group: str, saliency: Tensor, pattern: NMPattern) -> Tensor:
        """The stored order of one channel group, int64 `(C_in,)`.

        Raises:
            ConfigError: the file has no such group, or one of another width.
        """
        return self._order(group, saliency.shape[1])

    def _order(self, group: str, channels: int) -> Tensor:
        perm = self._orders.get(group)
        if perm is None:
            reasons = "is it from another model, or from a run that kept it dense?"
            raise ConfigError(f"permutation.path={self.path}: no permutation for {group}; {reasons}")
        if len(perm) != channels:
            raise ConfigError(
                f"permutation.path={self.path}: the permutation of {group} is of {len(perm)} channels, not {channels}"
            )
        return perm
