"""The same N:M for all linears that the settings do not name."""

from collections.abc import Mapping

from typing_extensions import override

from permllm.allocation.base import Allocation
from permllm.models.families import ChannelGroup
from permllm.models.selection import differing_patterns
from permllm.training.problem import LearningProblem


class Uniform(Allocation):
    """Allocation of the settings: `sparsity`, but for `keep_dense` and `sparsity_of`."""

    uniform = True
    found_dense = None

    @override
    def patterns(
        self, problem: LearningProblem, every: list[ChannelGroup], sensitivity: Mapping[str, float]
    ) -> dict[str, str]:
        """Return the patterns of the settings."""
        return differing_patterns(every, problem.groups)
