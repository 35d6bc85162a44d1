"""The weights of the decoder layers in equal parts on the devices of several processes (`model.placement=sharded`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from typing_extensions import override

from permllm.models.offload import Slot, Untouched


class Sharded(Untouched):
    """Each rank holds a part of the rows of the layers' weights, on its device; a layer is put together when it comes.

    The parts are DTensors, as FSDP2 has them. Its own hooks are not used: they would free the storage of a layer that a graph
    still reads in backward, where layers that come and go by `layer` need no other rule than references have.

    All ranks construct it, ask for layers at the same points, and replace the same weights.

    Args:
        model, device, dtype, stored: as in `Streamed`; of what is stored each rank reads its part.
    """

    sharded = True

    def __init__(
        self, model: nn.Module, device: torch.device, dtype: torch.dtype, stored: Callable[[str, nn.Parameter], Tensor]
    ) -> None:
        assert dist.group.WORLD is not None
        mesh = DeviceMesh.from_group(dist.group.WORLD, device.type)

        def part(name: str, parameter: nn.Parameter) -> Tensor:
            return _part(stored(name, parameter), mesh, device, dtype)

        super().__init__(model, device, dtype, part)
        self._stream = None  # nothing is on its way that another rank does not send

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """What this rank holds of each parameter of the layers, by its name in the model; some may be empty."""
        for index, slots in enumerate(self.slots):
            paths = {module: path for path, module in self._layers[index].named_modules()}
            for slot in slots:
                assert isinstance(slot.stored, DTensor)
                yield f"{self._prefix}.{index}.{paths[slot.module]}.{slot.name}", slot.stored.to_local()

    @override
    def brought(self, stored: Tensor) -> Tensor:
        return stored.full_tensor() if isinstance(stored, DTensor) else stored

    @override
    def hold(self, slot: Slot, weight: Tensor) -> None:
        assert isinstance(slot.stored, DTensor)
        slot.stored, slot.changes = _part(weight.detach(), slot.stored.device_mesh, self.device, self.dtype), []


def _part(tensor: Tensor, mesh: DeviceMesh, device: torch.device, dtype: torch.dtype) -> DTensor:
    """Rows of a parameter that this rank holds; a vector is whole in each."""
    dtype = dtype if tensor.is_floating_point() else tensor.dtype
    if tensor.dim() < 2:
        return DTensor.from_local(tensor.to(device, dtype, copy=True), mesh, [Replicate()], run_check=False)
    rows = tensor.chunk(mesh.size())
    mine = rows[mesh.get_local_rank()] if mesh.get_local_rank() < len(rows) else tensor[:0]
    local = mine.to(device, dtype, copy=True).contiguous()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=tensor.shape, stride=(tensor[0].numel(), 1))
