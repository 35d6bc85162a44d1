"""Placements of the decoder layers' weights, and their way to the device.

- `device`: all weights are always on the device.
- `host`: weights are in host memory, pinned for a GPU.
- `disk`: weights are in the checkpoint's safetensors files; memory holds only the entered layer.
- `sharded`: each rank has a part of every layer on its device (`permllm.models.sharded`).

Code that computes with a layer, or reads or replaces its weights, does so inside
`placement_of(model).layer(index)`. The embedding, the final norm and the head are always on the
device. A graph that backward will go through keeps the weights of its forward.
"""

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
from permllm.runtime.memory import to_device
from permllm.store.tensors import load_tensor

ReadTensor = Callable[[str], Tensor]
ChangeWeight = Callable[[Tensor], Tensor]
GetTensor = Callable[[], Tensor]


class LayerPlacement:
    """Placement `device`, and base of the others: all weights are always on the device.

    Args:
        model: the model; no reference to it is kept, so that it can be freed.

    Attributes:
        streams: True: a layer's weights are on the device only inside `layer`, as copies. A graph
            of several layers would keep the copies of them all.
        reads_files: True: weights are read from files each time.
        sharded: True: each rank holds a part of each layer; all enter layers at the same points.
    """

    streams = reads_files = sharded = False

    def __init__(self, model: nn.Module) -> None:
        self._layers = decoder_layers(model)
        self._prefix = family_of(model).layers

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Yield a decoder layer, whose weights are on the device inside the context.

        Raises:
            DataError: a weight cannot be read.
        """
        yield self._layers[index]

    def layer_of(self, path: str) -> AbstractContextManager[nn.Module]:
        """Enter the decoder layer of the module at a path, as `layer` does."""
        return self.layer(int(path.removeprefix(f"{self._prefix}.").partition(".")[0]))

    def replace(self, linear: nn.Linear, weight: Tensor, mask: GetTensor | None = None) -> None:
        """Give a linear a new weight.

        Args:
            linear: a linear of an entered layer.
            weight: `(C_out, C_in)`.
            mask: function that returns a mask, bool `(C_out, C_in)`, if the new weight is the
                present weight under this mask; None: it is not.
        """
        linear.weight.data.copy_(weight)

    def read_from(self, file: Path, names: Mapping[nn.Linear, str]) -> None:
        """Read replaced weights from a file from now on, if this placement reads files.

        Args:
            file: safetensors file with the same values, which must not change any more.
            names: name of the tensor for each linear.
        """

    def rearrange(self, linear: nn.Linear, change: ChangeWeight) -> None:
        """Apply a function to a linear's weight from now on."""
        linear.weight.data = change(linear.weight.data)

    def restore(self, linear: nn.Linear, change: ChangeWeight) -> None:
        """Undo the latest `rearrange` of a linear by the inverse function."""
        self.rearrange(linear, change)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Enter each layer when the model's forward calls it, inside the context."""
        yield


_PLACEMENTS: WeakKeyDictionary[nn.Module, LayerPlacement] = WeakKeyDictionary()


def placement_of(model: nn.Module) -> LayerPlacement:
    """Return the placement of a model's weights: `device`, or the one of `set_placement`."""
    return _PLACEMENTS.get(model) or LayerPlacement(model)


def set_placement(model: nn.Module, placement: LayerPlacement) -> None:
    """Set the placement of a model's weights."""
    _PLACEMENTS[model] = placement


@dataclass(eq=False)
class Stored:
    """Parameter of a layer whose weights are on the device only while the layer is entered.

    Attributes:
        layer: index of the layer.
        module: module of the parameter.
        name: name of the parameter in the module.
        absent: tensor on the meta device that stands in while the layer is not entered.
        read: function that returns the stored parameter, on any device, in any float dtype.
        changes: functions that are applied on the device each time the layer is entered.
    """

    layer: int
    module: nn.Module
    name: str
    absent: Tensor
    read: GetTensor
    changes: list[ChangeWeight] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """Make the module compute with a value."""
        # As a new parameter, because a graph keeps the parameter of its forward.
        self.module._parameters[self.name] = nn.Parameter(value, requires_grad=False)


class Offloaded(LayerPlacement):
    """Placements `host` and `disk`: weights are elsewhere until their layer is entered.

    A GPU fetches the next layer in the same direction meanwhile. A layer stays on the device until
    another layer is entered. With `host` the weights are in host memory, pinned for a GPU.

    With `disk` they are in the checkpoint's safetensors files, which are not written to. A masked
    weight is read from its file and masked each time. A weight with other changes stays in host
    memory until `read_from` names a file that has it.

    Args:
        model: the model; all but its layers is on the device.
        device: the device that computes.
        read: function that returns a parameter from the files by its name in the model; None: the
            parameters are in memory.
    """

    streams = True

    def __init__(
        self, model: nn.Module, device: torch.device, read: ReadTensor | None = None
    ) -> None:
        super().__init__(model)
        self.device = device
        self.reads_files = read is not None
        self._read = read
        self._stored: list[list[Stored]] = [[] for _ in self._layers]
        self._of_linear: dict[nn.Module, Stored] = {}
        self._users: dict[int, int] = {}  # number of users of each layer on the device
        self._latest = -1
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: dict[int, list[Tensor]] = {}
        self._left: deque[torch.cuda.Event] = deque(maxlen=2)
        for index, layer in enumerate(self._layers):
            for path, parameter in list(layer.named_parameters()):
                parent, _, name = path.rpartition(".")
                module = layer.get_submodule(parent)
                absent = torch.empty_like(parameter, device="meta")
                get = self.source(f"{self._prefix}.{index}.{path}", parameter)
                stored = Stored(index, module, name, absent, get)
                stored.put(absent)
                self._stored[index].append(stored)
                if name == "weight":
                    self._of_linear[module] = stored

    def source(self, name: str, parameter: nn.Parameter) -> GetTensor:
        """Return a function that reads a parameter, which has this name in the model."""
        return partial(self._read, name) if self._read else self.keep(parameter.data)

    def keep(self, value: Tensor) -> GetTensor:
        """Store the value of a parameter, and return a function that reads it."""
        held = value.cpu().pin_memory() if self._stream is not None else value
        return lambda: held

    @override
    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Bring a decoder layer's weights to the device, and yield the layer."""
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
        # Without waiting, a host that is ahead of the GPU would allocate memory for many layers.
        if len(self._left) > 1:
            self._left[0].synchronize()
        with suppress(torch.OutOfMemoryError), torch.cuda.stream(self._stream):
            self._ahead[following] = self._values(following)

    def _leave(self) -> None:
        """Free the layers without users."""
        for index in [index for index, users in self._users.items() if not users]:
            for stored in self._stored[index]:
                stored.put(stored.absent)
            del self._users[index]
            if self._stream is not None:
                self._left.append(torch.cuda.Event())
                self._left[-1].record(torch.cuda.current_stream(self.device))

    def _arrived(self, index: int) -> list[Tensor]:
        """Return the parameters of a layer on the device, fetched ahead or read now."""
        values = self._ahead.pop(index, None)
        self._ahead.clear()
        values = values or self._values(index)
        if self._stream is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_stream(self._stream)
            for value in values:
                value.record_stream(now)  # so that the next fetch does not use its memory too early
        return values

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
    def replace(self, linear: nn.Linear, weight: Tensor, mask: GetTensor | None = None) -> None:
        """Store a new weight of a linear, or its mask if the weight is read from a file."""
        if mask is not None and self.reads_files:
            self.rearrange(linear, lambda present: masked(mask(), present))
            return
        stored = self._of_linear[linear]
        value = weight.detach().to(self.device, stored.absent.dtype)
        stored.read = self.keep(value)
        stored.changes = []
        self._follow(linear, lambda _: value)

    @override
    def read_from(self, file: Path, names: Mapping[nn.Linear, str]) -> None:
        """Read replaced weights from another file, and drop their copies in host memory."""
        if not self.reads_files:
            return
        for linear, name in names.items():
            stored = self._of_linear[linear]
            stored.read = partial(load_tensor, file, name)
            stored.changes = []

    @override
    def rearrange(self, linear: nn.Linear, change: ChangeWeight) -> None:
        """Apply a function each time the linear's layer is entered, and now if it is."""
        self._of_linear[linear].changes.append(change)
        self._follow(linear, change)

    @override
    def restore(self, linear: nn.Linear, change: ChangeWeight) -> None:
        """Drop the latest function, and apply its inverse to a weight on the device."""
        self._of_linear[linear].changes.pop()
        self._follow(linear, change)

    def _follow(self, linear: nn.Linear, change: ChangeWeight) -> None:
        """Change a weight that is on the device, and drop its layer if it was fetched ahead."""
        stored = self._of_linear[linear]
        self._ahead.pop(stored.layer, None)
        if stored.layer in self._users:
            stored.put(change(linear.weight.data))

    @override
    @contextmanager
    def whole(self) -> Iterator[None]:
        """Enter each layer by a hook on its forward."""
        with ExitStack() as hooks:
            for index, layer in enumerate(self._layers):
                hook = layer.register_forward_pre_hook(lambda *_, index=index: self._enter(index))
                hooks.enter_context(hook)
            yield


def masked(mask: Tensor, weight: Tensor) -> Tensor:
    """Return a weight with 0.0, never -0.0, where a mask, bool `(C_out, C_in)`, is False."""
    return torch.where(mask.to(weight.device), weight, weight.new_zeros(()))
