"""Placement `sharded`: the layers' weights in equal parts on the devices of several ranks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from typing_extensions import override

from permllm.models.offload import Offloaded, ReadTensor


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
        super().__init__(model, device, read)
        self.reads_files = False  # once, in `source`
        self._stream = None  # no fetching ahead, because ranks must join their parts together

    @override
    def source(self, name: str, parameter: nn.Parameter) -> Callable[[], Tensor]:
        """Keep this rank's part of a parameter, and return a function that joins the parts."""
        value = self._read(name) if self._read else parameter.data
        return self.keep(value.to(parameter.dtype))

    @override
    def keep(self, value: Tensor) -> Callable[[], Tensor]:
        """Keep this rank's part of a new value, and return a function that joins the parts."""
        # Rows of a matrix; each rank has the whole of a vector.
        placement = Shard(0) if value.dim() > 1 else Replicate()
        whole = value.to(self.device)
        part: Any = distribute_tensor(whole, self._mesh, [placement], src_data_rank=None)
        return part.clone().full_tensor  # a copy, because the part would keep the whole in memory
