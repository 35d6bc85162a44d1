"""The interface between the training loop and what learns in a window of decoder layers."""

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
        inputs: of the first layer, from the pruned layers before, `(samples, tokens, hidden)` on the host; None where they are
            the embeddings.
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
    """Where learning stands.

    Attributes:
        step: from 0.
        steps: in all.
        epoch: from 0.
        epochs: in all.
    """

    step: int
    steps: int
    epoch: int
    epochs: int


class Learner(ABC):
    """What learns in a window, such as the orders or the masks, and sets the masked linears accordingly."""

    @property
    def gathers(self) -> bool:
        """Its masked linears keep inputs in an order of their own for backward."""
        return False

    def masked_weights(self) -> int:
        """Numbers of masked weights that wait for backward."""
        return 0

    @abstractmethod
    def parameters(self) -> list[dict[str, Any]]:
        """Its groups of parameters, for the optimizer."""

    @abstractmethod
    def keep(self) -> None:
        """What was learned so far is the best."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """For a checkpoint."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""

    def begin(self, moment: Moment) -> None:  # noqa: B027 - there may be nothing to do
        """Prepare a step, or a measurement of what was learned so far.

        Raises:
            ValueError: it is not finite; the message says what.
        """

    def set_layer(self, index: int, moment: Moment | None) -> None:  # noqa: B027
        """Before a decoder layer runs; None asks for no gradients."""

    def collect(self) -> None:  # noqa: B027
        """After backward: have the gradients where `parameters` are."""

    def flips(self) -> Tensor | None:
        """How much of what it decides has changed at the last `begin`, a scalar on the device; None where nobody counts."""
        return None

    def step_values(self, moment: Moment, flips: float | None) -> dict[str, float]:
        """What to tell of a step."""
        return {}

    def begin_epoch(self) -> None:  # noqa: B027
        """An epoch begins."""

    def epoch_values(self, moment: Moment) -> dict[str, Any]:
        """What to tell of an epoch, at its end."""
        return {}

    def write_best(self, directory: Path) -> str:
        """Write the best into a directory, because learning has failed; how to use it, for a person, or nothing."""
        return ""
