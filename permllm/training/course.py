"""Stages of a model that learn one after the other, from the checkpoint on."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import TypeAlias

from torch import Tensor

from permllm.models.families import ChannelGroup, decoder_layers, linear_at
from permllm.models.layers import LayerStream
from permllm.models.offload import masked, placement_of
from permllm.training.learner import Learner, Stage
from permllm.training.loop import Training, read_checkpoint
from permllm.training.problem import LearningProblem
from permllm.training.settings import LearningSettings

MaskOf: TypeAlias = Callable[[ChannelGroup, str], Tensor]
"""Function of a group and a linear's path; returns its mask, bool `(C_out, C_in)`, unpermuted."""


class Course:
    """Sequence of the stages of a method that learns, from its checkpoint on.

    Args:
        settings: settings of the gradient descent.
        problem: problem of the method. Its `on_resume` gets the history of the past epochs.
        name: name of the method, for messages.
        file: name of the checkpoint in the problem's directory.

    Attributes:
        state: the checkpoint to continue from; None: no checkpoint, or a stage has loaded it.
    """

    def __init__(
        self, settings: LearningSettings, problem: LearningProblem, name: str, file: str
    ) -> None:
        self.settings = settings
        self.problem = problem
        self.name = name
        self.file = file
        self.state = read_checkpoint(problem, file)
        past = self.state or {"stage": 0, "history": []}
        self._begin = past["stage"]
        self._history = list(past["history"])
        problem.on_resume(list(self._history))
        # Streams of the dense and of the pruned layers, each beside the index of its next layer.
        self._dense: tuple[LayerStream, int] | None = None
        self._pruned: tuple[LayerStream, int] | None = None

    def stages(self, learns: Callable[[range], bool], mask_of: MaskOf) -> Iterator[Stage]:
        """Yield the stages that are not trained yet.

        Args:
            learns: tells whether decoder layers have parameters that learn.
            mask_of: returns the mask of each linear before the stage, at the time of the stage.

        If all layers learn together, no layer runs here, because the inputs are the embeddings and
        the problem has the target.
        """
        layers = len(decoder_layers(self.problem.model))
        for number, span in enumerate(self.settings.spans(layers)):
            if number >= self._begin and learns(span):
                inputs = self.inputs(span.start, mask_of)
                target = self.target(span.stop)
                yield Stage(number, span, inputs, target)

    def train(self, stage: Stage, learner: Learner) -> None:
        """Train the learner of a stage.

        Raises:
            TrainingError: the loss is not finite; the message names the first layer whose output is
                not finite.
        """
        training = Training(
            self.settings, self.problem, stage, learner, self.name, self.file, self._history
        )
        if self.state is not None:
            training.restore(self.state)
            self.state = None  # frees as much memory as the parameters take
        training.run()

    def inputs(self, first: int, mask_of: MaskOf) -> Tensor | None:
        """Return the inputs of layer `first` when the layers before it are pruned.

        Args:
            first: index of a decoder layer.
            mask_of: returns the mask of each linear before that layer.

        Returns:
            `(windows, tokens, hidden)` on the host; None: the embeddings.
        """
        if first == 0:
            return None
        stream, position = self._pruned or (self._new(), 0)
        for index in range(position, first):
            groups = (group for group in self.problem.groups if group.layer == index)
            with placement_of(self.problem.model).layer(index), ExitStack() as dense_again:
                for group in groups:
                    for path in group.members:
                        weight = linear_at(self.problem.model, path).weight
                        dense_again.callback(setattr, weight, "data", weight.data)
                        weight.data = masked(mask_of(group, path), weight.data)
                stream.advance(index)
        self._pruned = (stream, first)
        return stream.states()

    def target(self, stop: int) -> Tensor:
        """Return the dense output of layer `stop - 1`, `(windows, tokens, hidden)` on the host."""
        if stop == len(decoder_layers(self.problem.model)):
            return self.problem.target
        stream, position = self._dense or (self._new(), 0)
        for index in range(position, stop):
            stream.advance(index)
        self._dense = (stream, stop)
        return stream.states()

    def _new(self) -> LayerStream:
        problem = self.problem
        return LayerStream(problem.model, problem.tokens, problem.calibration_batch_size)
