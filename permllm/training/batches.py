"""The samples of a window, batch by batch on the device, the next one on its way while the device works on this one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from permllm.runtime.memory import to_device


class Batch(NamedTuple):
    """Some samples on the device.

    Attributes:
        tokens: int64 `(samples, length)`.
        target: dense output of the window's last layer, `(samples, length, hidden)`.
        inputs: of the window's first layer, like `target`; None where they are the embeddings of
            the tokens.
    """

    tokens: Tensor
    target: Tensor
    inputs: Tensor | None


class Batches:
    """Batches by their indices.

    Args:
        tokens, target, inputs: of all samples on the host, as in `Batch`.
        device: where batches are wanted.
    """

    def __init__(
        self, tokens: Tensor, target: Tensor, inputs: Tensor | None, device: torch.device
    ) -> None:
        self._sources = (tokens, target, inputs)
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[Tensor, Batch] | None = None

    def fetch(self, indices: Tensor) -> None:
        """Begin to copy the samples at `indices` int64 `(samples,)`, beside what the device works on; nothing on a CPU."""
        if self._stream is not None:
            with torch.cuda.stream(self._stream):
                self._ahead = indices, self._copied(indices)

    def take(self, indices: Tensor) -> Batch:
        """The samples at `indices`, which `fetch` may have begun to copy."""
        ahead, self._ahead = self._ahead, None
        if self._stream is None or ahead is None or not torch.equal(ahead[0], indices):
            return self._copied(indices)
        now = torch.cuda.current_stream(self._device)
        now.wait_stream(self._stream)
        for tensor in ahead[1]:
            if tensor is not None:
                tensor.record_stream(
                    now
                )  # or its memory might be used again before the step is done with it
        return ahead[1]

    def _copied(self, indices: Tensor) -> Batch:
        tokens, target, inputs = self._sources
        device = self._device
        given = None if inputs is None else to_device(inputs[indices], device)
        return Batch(to_device(tokens[indices], device), to_device(target[indices], device), given)
