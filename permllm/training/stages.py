"""Windows of a model that learn one after the other, from its checkpoint on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from permllm.models.families import ChannelGroup, decoder_layers, linear_at
from permllm.models.layers import LayerStream
from permllm.models.offload import placement_of
from permllm.training.learner import Learner, Window
from permllm.training.loop import Training, read_checkpoint
from permllm.training.problem import LearningProblem
from permllm.training.settings import LearningSettings

MaskOf: TypeAlias = Callable[[ChannelGroup, str], Tensor]
"""Mask of a linear, bool `(C_out, C_in)` in original channel order, by its group and path."""


class Course:
    """Windows of a method that learns, from its checkpoint on.

    Args:
        settings: of the descent.
        problem: of the method. Its `on_resume` gets the history of the epochs before.
        name: of the method, for messages.
        file: of the checkpoint in the problem's directory.

    Attributes:
        state: the checkpoint to continue from; None: there is none, or a window has continued.
    """

    def __init__(
        self, settings: LearningSettings, problem: LearningProblem, name: str, file: str
    ) -> None:
        self.settings = settings
        self.problem = problem
        self.name, self.file = name, file
        self.state = read_checkpoint(problem, file)
        self._begin, self._history = 0, list[dict[str, Any]]()
        if self.state is not None:
            self._begin, self._history = self.state["window"], list(self.state["history"])
        problem.on_resume(list(self._history))

    def windows(self, learns: Callable[[int, int], bool], mask_of: MaskOf) -> Iterator[Window]:
        """Yield the windows that are still to be trained.

        Args:
            learns: tells whether anything learns from a decoder layer to before another.
            mask_of: of each linear before a window, when the window comes.
        """
        stream = WindowStream(self.problem)
        layers = len(decoder_layers(self.problem.model))
        for number, (first, stop) in enumerate(self.settings.spans(layers)):
            if number >= self._begin and learns(first, stop):
                inputs, target = stream.inputs(first, mask_of), stream.target(stop)
                yield Window(number, first, stop, inputs, target)

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
            self.state = None  # it is as large as the parameters
        training.run()


class WindowStream:
    """Inputs and targets of the windows: hidden states through the dense and the pruned layers.

    Neither stream is made where all layers learn together: the inputs are the embeddings, and the
    problem has the target.
    """

    def __init__(self, problem: LearningProblem) -> None:
        self.problem = problem
        self._dense: tuple[LayerStream, int] | None = None  # with the next layer
        self._pruned: tuple[LayerStream, int] | None = None

    def inputs(self, first: int, mask_of: MaskOf) -> Tensor | None:
        """Return the inputs of layer `first` when the layers before it are pruned.

        Args:
            first: index of a decoder layer.
            mask_of: of each linear before it.

        Returns:
            `(samples, tokens, hidden)` on the host; None: the embeddings.
        """
        if first == 0:
            return None
        stream, position = self._pruned or (self._new(), 0)
        for index in range(position, first):
            with placement_of(self.problem.model).layer(index):
                dense: dict[str, Tensor] = {}
                try:
                    self._prune_layer(index, mask_of, dense)
                    stream.advance(index)
                finally:
                    for path, weight in dense.items():
                        linear_at(self.problem.model, path).weight.data = weight
        self._pruned = (stream, first)
        return stream.states()

    def target(self, stop: int) -> Tensor:
        """Return the dense output of layer `stop - 1`, `(samples, tokens, hidden)` on the host."""
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

    def _prune_layer(self, index: int, mask_of: MaskOf, dense: dict[str, Tensor]) -> None:
        """Mask the linears of a layer; their dense weights go into `dense` by path."""
        for group in (group for group in self.problem.groups if group.layer == index):
            for path in group.members:
                weight = linear_at(self.problem.model, path).weight
                dense[path] = weight.data
                weight.data = torch.where(mask_of(group, path).to(weight.device), weight.data, 0.0)
