"""Inputs and targets of windows of layers that learn one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from permllm.models.families import ChannelGroup, decoder_layers, linear_at
from permllm.models.layers import LayerStream
from permllm.models.offload import placement_of
from permllm.training.problem import LearningProblem

MaskOf: TypeAlias = Callable[[ChannelGroup, str], Tensor]
"""The mask of a linear, bool `(C_out, C_in)` in original channel order on any device, by its group and path."""


class WindowStream:
    """Inputs and targets of the windows: two streams of hidden states, through the dense and through the pruned layers.

    Where all layers learn together neither is needed: the inputs are the embeddings, and the target
    is known.
    """

    def __init__(self, problem: LearningProblem) -> None:
        self.problem = problem
        self._layers = len(decoder_layers(problem.model))
        self._dense: tuple[LayerStream, int] | None = None
        self._pruned: tuple[LayerStream, int] | None = None

    def inputs(self, first: int, mask_of: MaskOf) -> Tensor | None:
        """Inputs of layer `first` when the layers before it are pruned, `(samples, tokens, hidden)`.

        Args:
            first: index of a decoder layer.
            mask_of: of each linear before it.
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
        """Dense output of layer `stop - 1`, `(samples, tokens, hidden)`."""
        if stop == self._layers:
            return self.problem.target
        stream, position = self._dense or (self._new(), 0)
        for index in range(position, stop):
            stream.advance(index)
        self._dense = (stream, stop)
        return stream.states()

    def _new(self) -> LayerStream:
        return LayerStream(
            self.problem.model, self.problem.tokens, self.problem.calibration_batch_size
        )

    def _prune_layer(self, index: int, mask_of: MaskOf, dense: dict[str, Tensor]) -> None:
        """Mask the linears of a layer, and have their dense weights by path, to be put back."""
        for group in (group for group in self.problem.groups if group.layer == index):
            for path in group.members:
                weight = linear_at(self.problem.model, path).weight
                dense[path] = weight.data
                weight.data = torch.where(mask_of(group, path).to(weight.device), weight.data, 0.0)
