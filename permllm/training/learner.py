"""Interface between the trainer and the parameters that learn in a stage.

A stage is a number of consecutive decoder layers that learn together.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from permllm.models.layers import Teacher


@dataclass(frozen=True)
class Stage:
    """Consecutive decoder layers that learn together; the numbers of stages begin with 0.

    Attributes:
        inputs: inputs of the first layer, from the pruned layers before it, `(windows, tokens,
            hidden)` on the host; None: the embeddings of the tokens.
        target: dense output of the last layer, shaped and placed like `inputs`, or its teacher.
    """

    number: int
    layers: range
    inputs: Tensor | None
    target: Tensor | Teacher


class Progress(NamedTuple):
    """Present step and epoch of a stage, from 0, and their number in the stage."""

    step: int
    steps: int
    epoch: int
    epochs: int


def on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a state on the CPU."""
    return {name: tensor.cpu() for name, tensor in tensors.items()}


class Learner(ABC):
    """Base of the learners: parameters of a stage, which set the masked linears in each step.

    Attributes:
        gathers: each masked linear keeps a permuted copy of its inputs for backward.
        masked_weights: number of masked weights that stay in memory until backward.
    """

    gathers: bool = False
    masked_weights: int = 0

    @abstractmethod
    def parameters(self) -> list[Tensor]:
        """Return the parameters, always in the same order."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""

    def keep(self) -> None:  # noqa: B027 - may do nothing
        """Keep the present result as the best one; a learner may use its last result instead."""

    def begin(self, progress: Progress) -> None:  # noqa: B027
        """Prepare a step, or a measurement of the present result.

        Raises:
            ValueError: a learned value is not finite; the message names it.
        """

    def set_layer(self, index: int) -> None:  # noqa: B027
        """Prepare a decoder layer before it runs; for gradients if torch has them enabled."""

    def penalty(self) -> Tensor | float:
        """Return a term that is added to the loss of the last forward, for its gradients alone."""
        return 0.0

    def collect(self) -> None:  # noqa: B027
        """Write the gradients of the `parameters`, after backward."""

    def step_values(self, progress: Progress) -> dict[str, Tensor]:
        """Return the measures of a step, scalars on the device; called once in each step."""
        return {}

    def epoch_values(self, progress: Progress) -> dict[str, Any]:
        """Return the measures of an epoch; called once, at its end."""
        return {}
