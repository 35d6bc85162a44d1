"""Interface between the training loop and the parameters that learn in a window of layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Window:
    """Consecutive decoder layers that learn together.

    Attributes:
        number: from 0, over all windows.
        first: index of its first decoder layer.
        stop: index after its last.
        inputs: of the first layer, from the pruned layers before, `(samples, tokens, hidden)` on
            the host; None: the embeddings of the tokens.
        target: dense output of the last layer, like `inputs`.
    """

    number: int
    first: int
    stop: int
    inputs: Tensor | None
    target: Tensor

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, int) and self.first <= layer < self.stop


class Moment(NamedTuple):
    """Progress of a training.

    Attributes:
        step, epoch: from 0.
        steps, epochs: in all.
    """

    step: int
    steps: int
    epoch: int
    epochs: int


class Learner(ABC):
    """Base of the parameters that learn in a window, which set the masked linears of each step.

    Attributes:
        gathers: its masked linears keep inputs in an order of their own for backward.
    """

    gathers: bool = False

    def masked_weights(self) -> int:
        """Return how many numbers of masked weights wait for backward."""
        return 0

    @abstractmethod
    def parameters(self) -> list[dict[str, Any]]:
        """Return its groups of parameters, for the optimizer."""

    @abstractmethod
    def keep(self) -> None:
        """Keep the present result as the best."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return its state for a checkpoint."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""

    def begin(self, moment: Moment) -> None:  # noqa: B027 - there may be nothing to do
        """Prepare a step, or a measurement of the present result.

        Raises:
            ValueError: a value that was learned is not finite; the message names it.
        """

    def set_layer(self, index: int) -> None:  # noqa: B027
        """Prepare a decoder layer before it runs, with gradients where torch has them enabled."""

    def collect(self) -> None:  # noqa: B027
        """Put the gradients at the `parameters`, after backward."""

    def flips(self) -> Tensor | None:
        """Return how many decisions the last `begin` changed, on the device; None: not counted."""
        return None

    def step_values(self, moment: Moment, flips: float = 0.0) -> dict[str, float]:
        """Return the figures of a step, with the number of its `flips`."""
        return {}

    def begin_epoch(self) -> None:  # noqa: B027
        """Prepare an epoch."""

    def epoch_values(self, moment: Moment) -> dict[str, Any]:
        """Return the figures of an epoch, at its end."""
        return {}

    def write_best(self, directory: Path) -> str:
        """Write the best result after a failure; return how to use the file, or nothing."""
        return ""
