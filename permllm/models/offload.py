"""Placements of the decoder layers' weights: where they wait, and how a layer comes to the device.

- `device`: all of them are on it all the time.
- `host`: they wait in host memory, pinned for a GPU.
- `disk`: they are read from the checkpoint's safetensors files; only the layer at work is in
  memory.
- `sharded`: each of several processes holds a part of every layer on its device
  (`permllm.models.sharded`).

Code that computes with a layer, or reads or replaces its weights, does so inside of
`placement_of(model).layer(index)`. The embedding, the final norm and the head are always on the
device. A graph that backward will go through keeps the weights that it was made with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from typing_extensions import override

from permllm.models.families import decoder_layers, family_of
from permllm.runs.tensors import load_tensor
from permllm.runtime.memory import to_device

Change = Callable[[Tensor], Tensor]
Mask = Callable[[], Tensor]
Read = Callable[[], Tensor]

_PLACEMENTS: WeakKeyDictionary[nn.Module, Placement] = WeakKeyDictionary()


def placement_of(model: nn.Module) -> Placement:
    """Return the placement of a model's weights: the one that `place` has set, else the device."""
    return _PLACEMENTS.get(model) or Placement(model)


def place(model: nn.Module, placement: Placement) -> None:
    """Set the placement of a model's weights, for as long as the model lives."""
    _PLACEMENTS[model] = placement


class Placement:
    """All weights are on the device all the time; the other placements derive from this one.

    Args:
        model: of a known family. It is not kept, so that it may go while it is placed.

    Attributes:
        streams: a layer's weights are on the device only inside of `layer`, and are copies of those
            that wait. A graph that backward will go through would hold the copies of all its
            layers.
        reads_files: the weights are read from files each time.
        sharded: all ranks hold a part of each layer, and enter layers at the same points.
    """

    streams = reads_files = sharded = False

    def __init__(self, model: nn.Module) -> None:
        self._layers = decoder_layers(model)
        self._prefix = family_of(model).layers

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Yield a decoder layer, whose weights are on the device inside.

        Raises DataError where they cannot be read.
        """
        yield self._layers[index]

    def layer_of(self, path: str) -> AbstractContextManager[nn.Module]:
        """Yield the decoder layer of the module at a path, as `layer` does."""
        return self.layer(int(path.removeprefix(f"{self._prefix}.").partition(".")[0]))

    def replace(self, linear: nn.Linear, weight: Tensor, mask: Mask | None = None) -> None:
        """Give a linear another weight for good.

        Args:
            linear: of a layer that is there.
            weight: `(C_out, C_in)`.
            mask: returns bool `(C_out, C_in)`, where the new weight is the present one under this
                mask.
        """
        linear.weight.data.copy_(weight)

    def lies_in(self, file: Path, names: Mapping[nn.Linear, str]) -> None:
        """Read weights that were replaced from a file, if weights are read from files.

        Args:
            file: safetensors, with the very values. It stays as it is while the model is used.
            names: of the tensors, by linear.
        """

    def rearrange(self, linear: nn.Linear, change: Change) -> None:
        """Store a linear's weight in another way from now on."""
        linear.weight.data = change(linear.weight.data)

    def restore(self, linear: nn.Linear, change: Change) -> None:
        """Store a weight as it was before the latest `rearrange`, which `change` undoes."""
        self.rearrange(linear, change)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Enter each layer when the model's own forward calls it."""
        yield


@dataclass(eq=False)
class Stored:
    """A parameter of a layer that comes and goes.

    Attributes:
        layer: index of the layer.
        module: that has the parameter.
        name: of the parameter in the module.
        absent: what the module has while the layer is not there, on the meta device.
        read: returns the parameter as it waits, on any device and in any floating-point format.
        changes: what is done to it on the device each time it comes.
    """

    layer: int
    module: nn.Module
    name: str
    absent: Tensor
    read: Read
    changes: list[Change] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """Make the module compute with a value."""
        # A new parameter: a graph keeps the one that it was made with.
        self.module._parameters[self.name] = nn.Parameter(value, requires_grad=False)


class Offloaded(Placement):
    """The layers' weights wait in host memory, pinned for a GPU, until their layer is entered.

    A GPU fetches the next layer in the same direction meanwhile. The layer that was left last stays
    until another is entered.

    Args:
        model: of a known family; outside of the layers it is on the device.
        device: where it computes.
    """

    streams = True

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__(model)
        self.device = device
        self._stored: list[list[Stored]] = [[] for _ in self._layers]
        self._of_linear: dict[nn.Module, Stored] = {}
        self._users: dict[int, int] = {}  # of each layer that is there
        self._latest = -1
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: dict[int, list[Tensor]] = {}
        self._left: deque[torch.cuda.Event] = deque(maxlen=2)
        for index, layer in enumerate(self._layers):
            for path, parameter in list(layer.named_parameters()):
                parent, _, name = path.rpartition(".")
                module, absent = (
                    layer.get_submodule(parent),
                    torch.empty_like(parameter, device="meta"),
                )
                read = self.source(f"{self._prefix}.{index}.{path}", parameter)
                stored = Stored(index, module, name, absent, read)
                stored.put(absent)
                self._stored[index].append(stored)
                if name == "weight":
                    self._of_linear[module] = stored

    def source(self, name: str, parameter: nn.Parameter) -> Read:
        """Return how a parameter is read, from its name in the model and what the model has."""
        return self.keep(parameter.data)

    def keep(self, value: Tensor) -> Read:
        """Store what a parameter is from now on, and return how it is read."""
        held = value.cpu().pin_memory() if self._stream is not None else value
        return lambda: held

    @override
    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        self._enter(index)
        self._users[index] += 1
        try:
            yield self._layers[index]
        finally:
            self._users[index] -= 1

    def _enter(self, index: int) -> None:
        if index in self._users:
            return
        self._leave()
        for stored, value in zip(self._stored[index], self._arrived(index), strict=True):
            stored.put(value)
        self._users[index] = 0
        following = index + (1 if index > self._latest or not index else -1)
        self._latest = index
        if self._stream is None or following == len(self._layers) or following in self._users:
            return
        # A host that runs ahead of the GPU would ask for new memory, layer after layer.
        if len(self._left) > 1:
            self._left[0].synchronize()
        with suppress(torch.OutOfMemoryError), torch.cuda.stream(self._stream):
            self._ahead[following] = self._values(following)

    def _leave(self) -> None:
        """Let go of the layers that nobody uses."""
        for index in [index for index, users in self._users.items() if not users]:
            for stored in self._stored[index]:
                stored.put(stored.absent)
            del self._users[index]
            if self._stream is not None:
                self._left.append(torch.cuda.Event())
                self._left[-1].record(torch.cuda.current_stream(self.device))

    def _arrived(self, index: int) -> list[Tensor]:
        """Return the parameters of a layer on the device, as they were fetched or read now."""
        ahead = self._ahead.pop(index, None)
        self._ahead.clear()
        if ahead is None or self._stream is None:
            return self._values(index)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._stream)
        for value in ahead:
            value.record_stream(now)  # or the next fetch might use its memory too early
        return ahead

    def _values(self, index: int) -> list[Tensor]:
        values = []
        for stored in self._stored[index]:
            value = stored.read()
            if value.device.type == "cpu":
                value = to_device(value, self.device)
            value = value.to(stored.absent.dtype)
            for change in stored.changes:
                value = change(value)
            values.append(value)
        return values

    @override
    def replace(self, linear: nn.Linear, weight: Tensor, mask: Mask | None = None) -> None:
        stored = self._of_linear[linear]
        value = weight.detach().to(self.device, stored.absent.dtype)
        stored.read, stored.changes = self.keep(value), []
        self._follow(linear, lambda _: value)

    @override
    def rearrange(self, linear: nn.Linear, change: Change) -> None:
        self._of_linear[linear].changes.append(change)
        self._follow(linear, change)

    @override
    def restore(self, linear: nn.Linear, change: Change) -> None:
        self._of_linear[linear].changes.pop()
        self._follow(linear, change)

    def _follow(self, linear: nn.Linear, change: Change) -> None:
        """Change a weight that is on the device now, and forget what is on its way."""
        stored = self._of_linear[linear]
        self._ahead.pop(stored.layer, None)
        if stored.layer in self._users:
            stored.put(change(linear.weight.data))

    @override
    @contextmanager
    def whole(self) -> Iterator[None]:
        with ExitStack() as hooks:
            for index, layer in enumerate(self._layers):
                hook = layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
                hooks.enter_context(hook)
            yield


class OnDisk(Offloaded):
    """The layers' weights are in the safetensors files of a checkpoint, which are never written to.

    A masked weight is read from its file and masked each time. One that is changed otherwise waits
    on the host until a file of its own has it.

    Args:
        model, device: as in `Offloaded`.
        read: returns a parameter from the files, by its name in the model.
    """

    reads_files = True

    def __init__(
        self, model: nn.Module, device: torch.device, read: Callable[[str], Tensor]
    ) -> None:
        self._read = read
        super().__init__(model, device)

    @override
    def source(self, name: str, parameter: nn.Parameter) -> Read:
        return partial(self._read, name)

    @override
    def replace(self, linear: nn.Linear, weight: Tensor, mask: Mask | None = None) -> None:
        if mask is None:
            super().replace(linear, weight)
        else:
            self.rearrange(linear, lambda present: masked(mask(), present))

    @override
    def lies_in(self, file: Path, names: Mapping[nn.Linear, str]) -> None:
        for linear, name in names.items():
            stored = self._of_linear[linear]
            stored.read, stored.changes = partial(load_tensor, file, name), []


def masked(mask: Tensor, weight: Tensor) -> Tensor:
    """Return a weight with zeros, never -0.0, where a mask, bool `(C_out, C_in)`, has none."""
    return torch.where(mask.to(weight.device), weight, weight.new_zeros(()))
