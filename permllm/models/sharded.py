"""The weights of the decoder layers in equal parts on the devices of several processes (`model.placement=sharded`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from typing_extensions import override

from permllm.errors import DataError
from permllm.models.checkpoint import all_finite
from permllm.models.offload import Mask, Offloaded, Read
from permllm.runtime import parallel


class Sharded(Offloaded):
    """Each process holds a part of the rows of the layers' weights, on its device; a layer is put together when it comes.

    The parts are DTensors, as FSDP2 has them. Its own hooks are not used: they would free the storage of a layer that a graph
    still reads in backward, where layers that come and go by `layer` need no other rule than references have.

    All processes construct it, and ask for layers at the same points while they learn together. While the first one works
    alone it calls the others, which `serve`.

    Args:
        model, device: as in `Offloaded`.
        whole: returns a decoder layer's parameter, from its name in the model and what the model has; each process keeps its
            part.

    Raises:
        DataError: this process's part has values that are not finite.
    """

    _LAYER, _REPLACE = "layer", "replace"

    def __init__(self, model: nn.Module, device: torch.device, whole: Callable[[str, nn.Parameter], Tensor]) -> None:
        self._mesh, self._whole = parallel.mesh(device), whole
        super().__init__(model, device)
        self._stream = None  # nothing is on its way that another process does not send
        self._phase = parallel.phase()
        if parallel.rank():
            parallel.serve_with(self.serve)

    @override
    def source(self, name: str, parameter: nn.Parameter) -> Read:
        part = _part(self._whole(name, parameter), self._mesh, self.device, parameter.dtype)
        local = part.to_local()
        if local.is_floating_point() and local.numel() and not all_finite(local):
            raise DataError(f"{name} holds values that are not finite")
        return part.full_tensor

    @override
    def keep(self, value: Tensor) -> Read:
        return _part(value, self._mesh, self.device, value.dtype).full_tensor

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A decoder layer, see `Offloaded.layer`."""
        if self._phase != parallel.phase():  # what is here may not be in the other processes, or the reverse
            self._leave()
            self._phase = parallel.phase()
        with super().layer(index) as layer:
            yield layer

    def serve(self, word: str, value: int | tuple[int, int, Tensor]) -> None:
        """In a process beside the first, which works alone: hand over parts of a layer, or take those of a new weight."""
        if word == self._LAYER:
            assert isinstance(value, int)
            for stored in self._stored[value]:
                stored.read()
        else:
            assert not isinstance(value, int)
            index, position, weight = value
            stored = self._stored[index][position]
            stored.read = self.keep(weight.to(stored.absent.dtype))

    @override
    def _arrived(self, index: int) -> list[Tensor]:
        with parallel.called(self._LAYER, index):
            return super()._arrived(index)

    @override
    def replace(self, linear: nn.Linear, weight: Tensor, mask: Mask | None = None) -> None:
        stored = self._of_linear[linear]
        position = self._stored[stored.layer].index(stored)
        with parallel.called(self._REPLACE, (stored.layer, position, weight.detach().cpu())):
            super().replace(linear, weight)


def _part(tensor: Tensor, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype) -> DTensor:
    """Return the rows of a parameter that this process holds; a vector is whole in each."""
    if tensor.dim() < 2:
        return DTensor.from_local(tensor.to(device, dtype, copy=True), mesh, [Replicate()], run_check=False)
    rows = tensor.chunk(mesh.size())
    mine = rows[mesh.get_local_rank()] if mesh.get_local_rank() < len(rows) else tensor[:0]
    local = mine.to(device, dtype, copy=True).contiguous()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=(tensor[0].numel(), 1))
