"""The windows of a model one after the other, from where a checkpoint was left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from permllm.models.families import decoder_layers
from permllm.training.checkpoint import read_checkpoint
from permllm.training.learner import Learner, Window
from permllm.training.loop import Training
from permllm.training.problem import LearningProblem
from permllm.training.settings import LearningSettings
from permllm.training.windows import MaskOf, WindowStream


class Course:
    """Windows of a method that learns, one after the other, from its checkpoint on.

    Args:
        settings: of the descent.
        problem: what is learned from; it is told of the epochs that are done.
        name: of the method, for a person.
        file: of the checkpoint in the problem's directory.

    Attributes:
        state: the checkpoint to go on from; None where there is none, and from when a window has
            gone on from it.
    """

    def __init__(
        self, settings: LearningSettings, problem: LearningProblem, name: str, file: str
    ) -> None:
        self.settings = settings
        self.problem = problem
        self.name, self.file = name, file
        self.state = read_checkpoint(problem, file)
        self._begin = 0 if self.state is None else self.state["window"]
        self._history: list[dict[str, Any]] = (
            [] if self.state is None else list(self.state["history"])
        )
        problem.on_resume(list(self._history))

    def windows(self, learns: Callable[[int, int], bool], mask_of: MaskOf) -> Iterator[Window]:
        """Yield the windows that are still to be trained.

        Args:
            learns: whether anything does, from a decoder layer to another, which is not among them.
            mask_of: of each linear before a window, when the window comes.
        """
        stream = WindowStream(self.problem)
        for number, (first, stop) in enumerate(
            self.settings.spans(len(decoder_layers(self.problem.model)))
        ):
            if number >= self._begin and learns(first, stop):
                yield Window(
                    number, first, stop, stream.inputs(first, mask_of), stream.target(stop)
                )

    def train(self, window: Window, learner: Learner) -> None:
        """Train a learner in a window.

        Raises:
            TrainingError: the loss is not finite; the message names the first layer whose output is
                not.
        """
        training = Training(
            self.settings, self.problem, window, learner, self.name, self.file, self._history
        )
        if self.state is not None:
            training.restore(self.state)
            self.state = None  # which is as large as what learns
        training.run()
