"""Reuse the order that another run found or learned, under any pruner."""

from __future__ import annotations

from pathlib import Path

from pydantic.dataclasses import dataclass
from torch import Tensor
from typing_extensions import override

from permllm.config import NMPattern, RunConfig
from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup
from permllm.permutation.base import LocalPermutation
from permllm.permutation.foldable import foldable
from permllm.runs.tensors import load_orders
from permllm.runtime.values import SETTINGS
from permllm.training.problem import LearningProblem


@dataclass(config=SETTINGS)
class FromFile(LocalPermutation):
    """Orders out of a `permutations.safetensors`.

    Raises:
        DataError: the file cannot be read, was changed, or holds something else than permutations.
    """

    path: str
    constraint = None  # known once the groups are

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("permutation.path is empty: give a run directory or a permutations.safetensors file")
        file = Path(self.path)
        if file.is_dir():
            file = file / "permutations.safetensors"
        if not file.is_file():
            raise ConfigError(f"permutation.path={self.path}: no such file, or a run without permutations")
        self._orders = load_orders(file)

    @override
    def check_groups(self, config: RunConfig, groups: list[ChannelGroup], layers: int) -> None:
        orders = {group.name: self._order(group.name, group.channels) for group in groups}
        if config.export.form != "folded":
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

    @override
    def orders(self, problem: LearningProblem) -> dict[str, Tensor]:
        return {group.name: self._order(group.name, group.channels) for group in problem.groups}

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
