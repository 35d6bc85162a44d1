"""Placement `sharded`: the layers' weights in equal parts on the devices of several ranks."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from typing_extensions import override

from permllm.models.checkpoint import ReadTensor
from permllm.models.offload import Offloaded


class Sharded(Offloaded):
    """Placement that stores a part of the rows of each layer's weight on each rank.

    The parts of a weight are joined when its layer is entered. They are DTensors, as in FSDP2. The
    hooks of FSDP2 are not used, because they free the storage of a layer that backward still reads.
    Here a weight is freed when nothing refers to it any more.

    All ranks construct this placement, enter layers at the same points and replace the same
    weights.

    Args:
        model: as in `Offloaded`.
        device: as in `Offloaded`.
        read: function that returns a layer's parameter by its name in the model; None: the
            parameters are in memory.
    """

    sharded = True

    def __init__(self, model: nn.Module, device: torch.device, read: ReadTensor | None) -> None:
        assert dist.group.WORLD is not None
        self._mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)
        self._read = read
        super().__init__(model, device)
        self._stream = None  # no fetching ahead, because ranks must join their parts together

    @override
    def source(self, name: str, parameter: nn.Parameter) -> Callable[[], Tensor]:
        """Keep this rank's part of a parameter, and return a function that joins the parts."""
        value = self._read(name) if self._read else parameter.data
        return self.keep(value.to(parameter.dtype))

    @override
    def keep(self, value: Tensor) -> Callable[[], Tensor]:
        """Keep this rank's part of a new value, and return a function that joins the parts."""
        return _part(value, self._mesh, self.device).full_tensor


def _part(tensor: Tensor, mesh: DeviceMesh, device: torch.device) -> DTensor:
    """Return this rank's rows of a matrix; each rank has the whole of a vector."""
    if tensor.dim() < 2:
        return DTensor.from_local(tensor.to(device, copy=True), mesh, [Replicate()])
    rows = tensor.chunk(mesh.size())
    mine = rows[mesh.get_local_rank()] if mesh.get_local_rank() < len(rows) else tensor[:0]
    local = mine.to(device, copy=True).contiguous()
    return DTensor.from_local(
        local, mesh, [Shard(0)], shape=tensor.shape, stride=(tensor[0].numel(), 1)
    )
