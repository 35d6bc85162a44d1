"""Permutations that another run found or learned; any pruner can use them."""

from pathlib import Path

from pydantic.dataclasses import dataclass
from torch import Tensor
from typing_extensions import override

from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup
from permllm.permutation.base import LocalPermutation
from permllm.permutation.foldable import folded_permutations
from permllm.settings.config import NMPattern, RunConfig
from permllm.settings.values import SETTINGS
from permllm.store.files import PERMUTATIONS
from permllm.store.tensors import load_permutations
from permllm.training.problem import LearningProblem


@dataclass(config=SETTINGS)
class FromFile(LocalPermutation):
    """Permutations out of a `permutations.safetensors`, or out of a run directory."""

    path: str
    constraint = None

    def __post_init__(self) -> None:
        path = Path(self.path)
        file = path / PERMUTATIONS if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(
                f"permutation.path={self.path}: no such file; expected a run directory with "
                f"{PERMUTATIONS}, or such a file"
            )
        self._permutations = load_permutations(file)

    @override
    def check_groups(self, config: RunConfig, groups: list[ChannelGroup], layers: int) -> None:
        """Raise ConfigError if a group has no permutation in the file, or one that cannot fold.

        An allocation may still leave a group dense, so that it needs none yet.
        """
        uniform = config.allocation["name"] == "uniform"
        present = [group for group in groups if uniform or group.name in self._permutations]
        for group in present:
            self._of(group)
        if config.export.form == "folded" and len(present) == len(groups):
            folded_permutations(groups, self._permutations)

    @override
    def permutation(self, group: str, saliency: Tensor, pattern: NMPattern) -> Tensor:
        """Return the permutation of a group out of the file."""
        return self._permutations[group]

    @override
    def permutations(self, problem: LearningProblem) -> dict[str, Tensor]:
        """Return the permutations of the pruned groups, without computing a saliency."""
        return {group.name: self._of(group) for group in problem.groups}

    def _of(self, group: ChannelGroup) -> Tensor:
        permutation = self._permutations.get(group.name)
        if permutation is None or len(permutation) != group.channels:
            raise ConfigError(
                f"permutation.path={self.path}: no permutation of {group.channels} channels "
                f"for {group.name}; expected a run with this model that pruned this group"
            )
        return permutation
