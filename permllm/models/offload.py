"""Where the weights of the decoder layers are while nothing is computed with them, and how they come to the device.

- `device`: on it, all of them, all the time.
- `host`: in host memory, pinned for a GPU.
- `disk`: in the safetensors files of the checkpoint, which are mapped; only what is at work is in memory.
- `sharded`: in equal parts on the devices of several processes, which put a layer together when they compute with it
  (`permllm.models.sharded`).

Whoever computes with a layer, or reads or replaces its weights, does so inside of `placement_of(model).layer(index)`. What is
outside of the layers (embedding, final norm, head) is on the device.

A layer that leaves takes nothing along: a graph that backward will go through keeps the weights that it was made with.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from typing_extensions import override

from permllm.errors import ConfigError
from permllm.models.families import decoder_layers, family_of
from permllm.models.mapped_file import MappedFile
from permllm.runtime.memory import to_device

Change = Callable[[Tensor], Tensor]
Mask = Callable[[], Tensor]

_PLACEMENTS: WeakKeyDictionary[nn.Module, Placement] = WeakKeyDictionary()


def placement_of(model: nn.Module) -> Placement:
    """Where the weights of a model are: what `place` has said, else on the device."""
    return _PLACEMENTS.get(model) or Placement(model)


def place(model: nn.Module, placement: Placement) -> None:
    """Say where the weights of a model are, for as long as it lives."""
    _PLACEMENTS[model] = placement


class Placement:
    """All weights are on the device all the time: what others derive from.

    Args:
        model: of a known family, which is not kept, so that it may go while it is placed.

    Attributes:
        streams: a layer's weights are on the device only inside of `layer`.
        copies: what comes to the device is not what waits: a graph that backward will go through would hold it all the while.
        reads_files: they are read from files each time, `lies_in` too.
        sharded: all ranks hold a part of each layer, and enter layers at the same points.
    """

    streams = copies = reads_files = sharded = False

    def __init__(self, model: nn.Module) -> None:
        self._layers = decoder_layers(model)
        self._prefix = family_of(model).layers

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A decoder layer, its weights on the device inside. Raises DataError where they cannot be had any more."""
        yield self._layers[index]

    def layer_of(self, path: str) -> AbstractContextManager[nn.Module]:
        """The decoder layer of the module at a path, as `layer`."""
        return self.layer(int(path.removeprefix(f"{self._prefix}.").partition(".")[0]))

    def replace(self, linear: nn.Linear, weight: Tensor, mask: Mask | None = None) -> None:
        """Give a linear another weight for good.

        Args:
            linear: of a layer that is there.
            weight: `(C_out, C_in)`.
            mask: gives bool `(C_out, C_in)` each time that it is called, where the weight is the present one under a mask.
        """
        linear.weight.data.copy_(weight)

    def lies_in(self, file: Path, names: Mapping[nn.Linear, str]) -> None:
        """Weights that were replaced are in a file as well, which stays as it is while the model is used.

        Args:
            file: safetensors, with their very values.
            names: of the tensors, by linear.
        """

    def rearrange(self, linear: nn.Linear, change: Change) -> None:
        """Store a linear's weight in another way from now on."""
        linear.weight.data = change(linear.weight.data)

    def restore(self, linear: nn.Linear, change: Change) -> None:
        """Store it as it was before the latest `rearrange`, which `change` undoes."""
        linear.weight.data = change(linear.weight.data)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the model's own forward finds each layer's weights where it computes."""
        yield


@dataclass(eq=False)
class Slot:
    """A parameter of a layer: where it is in the model and in the store, and what is made of it when it comes."""

    layer: int
    module: nn.Module
    name: str
    stored: Tensor
    outside: nn.Parameter
    changes: list[Change] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """Have the module compute with a value."""
        self.module._parameters[self.name] = nn.Parameter(value, requires_grad=False)

    def clear(self) -> None:
        """Have the module hold what it is without: a parameter on the meta device."""
        self.module._parameters[self.name] = self.outside


class Streamed(Placement):
    """Layers come to the device when they are computed with; on a GPU the next one is on its way meanwhile.

    The layer that was left last stays until another comes: who asks for one of its linears after the other brings it once.

    Args:
        model: of a known family; outside of the layers it is on the device.
        device: where it computes.
        dtype: of the weights there.
        stored: gives a decoder layer's parameter on the host, by its name in the model and what the model has.

    Attributes:
        slots: the parameters of each layer.

    Raises:
        ConfigError: layers share parameters with each other, or with the rest of the model.
    """

    streams = copies = True

    def __init__(
        self, model: nn.Module, device: torch.device, dtype: torch.dtype, stored: Callable[[str, nn.Parameter], Tensor]
    ) -> None:
        super().__init__(model)
        _check_untied(model, self._prefix)
        self.device, self.dtype = device, dtype
        self.slots: list[list[Slot]] = []
        self._of_linear: dict[nn.Module, Slot] = {}
        self._held = [0] * len(self._layers)
        self._there: set[int] = set()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[int, list[Tensor]] | None = None
        self._passed: deque[torch.cuda.Event] = deque()  # when a GPU is done with layers that were left
        self._before, self._latest = -1, -1
        self._followed: dict[tuple[int, int], int] = {}
        for index, layer in enumerate(self._layers):
            slots = []
            for path, parameter in list(layer.named_parameters()):
                parent, _, name = path.rpartition(".")
                outside = nn.Parameter(torch.empty_like(parameter, dtype=dtype, device="meta"), requires_grad=False)
                module = layer.get_submodule(parent)
                slot = Slot(index, module, name, stored(f"{self._prefix}.{index}.{path}", parameter), outside)
                slot.clear()
                slots.append(slot)
                if name == "weight":
                    self._of_linear[module] = slot
            self.slots.append(slots)

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """A decoder layer, its weights on the device inside. Raises DataError where they cannot be had any more."""
        self._held[index] += 1
        try:
            if index not in self._there:
                self._bring(index)
            self._fetch(self._next)  # before the caller waits for something of this one
            yield self._layers[index]
        finally:
            self._held[index] -= 1

    def _leave(self) -> None:
        """Let go of the layers that nobody computes with."""
        for index in [index for index in self._there if not self._held[index]]:
            for slot in self.slots[index]:
                slot.clear()
            self._there.remove(index)
            self.left(index)
            if self._stream is not None:
                self._passed.append(torch.cuda.Event())
                self._passed[-1].record(torch.cuda.current_stream(self.device))

    def _bring(self, index: int) -> None:
        self._leave()
        self.check(index)
        for slot, value in zip(self.slots[index], self._arrived(index), strict=True):
            slot.put(value)
        self._there.add(index)
        self._followed[self._before, self._latest] = index
        self._before, self._latest = self._latest, index
        if 0 <= self._next < len(self.slots):
            self.expect(self._next)

    @property
    def _next(self) -> int:
        """The layer that is likely to come: which came the last time, else that in the same direction."""
        up = self._latest > self._before or not self._latest
        return self._followed.get((self._before, self._latest), self._latest + (1 if up else -1))

    def _arrived(self, index: int) -> list[Tensor]:
        ahead, self._ahead = self._ahead, None
        if self._stream is None or ahead is None or ahead[0] != index:
            return [self._value(slot) for slot in self.slots[index]]
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._stream)
        for value in ahead[1]:
            value.record_stream(now)  # or its memory might be used again before the layer is done with it
        return ahead[1]

    def _fetch(self, index: int) -> None:
        """Begin to bring a layer to a GPU, beside what it computes."""
        if self._stream is None or not 0 <= index < len(self.slots) or index in self._there or self._ahead is not None:
            return
        self.check(index)
        while len(self._passed) > 1:  # who runs ahead of the GPU would ask for new memory, layer after layer
            self._passed.popleft().synchronize()
        with suppress(torch.OutOfMemoryError), torch.cuda.stream(self._stream):
            self._ahead = index, [self._value(slot) for slot in self.slots[index]]

    def _value(self, slot: Slot) -> Tensor:
        value = self.brought(slot.stored)
        if value.is_floating_point():
            value = value.to(self.dtype)
        for change in slot.changes:
            value = change(value)
        return value

    def brought(self, stored: Tensor) -> Tensor:
        """A parameter on the device, from what the store has of it."""
        return to_device(stored, self.device)

    def replace(self, linear: nn.Linear, weight: Tensor, mask: Mask | None = None) -> None:
        """Give a linear another weight for good, see `Placement.replace`."""
        slot = self._of_linear[linear]
        self.keep(slot, weight, mask)
        self._forget(slot.layer)
        slot.put(weight.to(self.device, self.dtype))

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, the model's own forward finds each layer's weights where it computes."""
        handles = []
        entered: list[ExitStack] = []

        def enter(index: int) -> None:
            entered.append(ExitStack())
            entered[-1].enter_context(self.layer(index))

        for index, layer in enumerate(self._layers):
            handles.append(layer.register_forward_pre_hook(lambda *_, index=index: enter(index)))
            handles.append(layer.register_forward_hook(lambda *_: entered.pop().close(), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def keep(self, slot: Slot, weight: Tensor, mask: Mask | None) -> None:
        """Have the store give another weight from now on."""
        raise NotImplementedError

    def check(self, index: int) -> None:
        """Raise DataError where a layer's weights cannot be had any more."""

    def left(self, index: int) -> None:
        """A layer is computed with no more."""

    def expect(self, index: int) -> None:
        """A layer is likely the next."""

    def rearrange(self, linear: nn.Linear, change: Change) -> None:
        """Store a linear's weight in another way from now on, see `Placement.rearrange`."""
        self.store_changed(self._of_linear[linear], change)
        self._follow(linear, change)

    def restore(self, linear: nn.Linear, change: Change) -> None:
        """Store it as it was before, see `Placement.restore`."""
        self.store_restored(self._of_linear[linear], change)
        self._follow(linear, change)

    def store_changed(self, slot: Slot, change: Change) -> None:
        """Have the store give a weight in another way."""
        raise NotImplementedError

    def store_restored(self, slot: Slot, change: Change) -> None:
        """Have the store give a weight as before `store_changed`."""
        raise NotImplementedError

    def _follow(self, linear: nn.Linear, change: Change) -> None:
        """What is on the device, or on its way, follows the store."""
        self._forget(self._of_linear[linear].layer)
        if not linear.weight.is_meta:
            self._of_linear[linear].put(change(linear.weight.data))

    def _forget(self, index: int) -> None:
        """What is on its way of a layer is not what its store gives any more."""
        if self._ahead is not None and self._ahead[0] == index:
            self._ahead = None


class OnHost(Streamed):
    """The layers' weights are in host memory, pinned for a GPU."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        def pinned(_: str, parameter: nn.Parameter) -> Tensor:
            return _pinned(parameter.data, device)

        super().__init__(model, device, next(model.parameters()).dtype, pinned)
        self.copies = device.type != "cpu"

    @override
    def store_changed(self, slot: Slot, change: Change) -> None:
        # In the host's memory, so that none of it is done each time.
        slot.stored = _pinned(change(slot.stored), self.device)

    @override
    def store_restored(self, slot: Slot, change: Change) -> None:
        self.store_changed(slot, change)

    @override
    def keep(self, slot: Slot, weight: Tensor, mask: Mask | None) -> None:
        slot.stored.copy_(weight)


class Untouched(Streamed):
    """What is stored stays as it is: another way to store a weight, and a mask, are applied each time when it comes."""

    @override
    def store_changed(self, slot: Slot, change: Change) -> None:
        slot.changes.append(change)

    @override
    def store_restored(self, slot: Slot, change: Change) -> None:
        slot.changes.pop()

    @override
    def keep(self, slot: Slot, weight: Tensor, mask: Mask | None) -> None:
        if mask is None:
            self.hold(slot, weight)
        else:
            slot.changes.append(lambda dense: masked(mask(), dense))

    def hold(self, slot: Slot, weight: Tensor) -> None:
        """Have a weight of its own, with no changes, in the place of what is stored."""
        raise NotImplementedError


class OnDisk(Untouched):
    """The layers' weights are in the safetensors files of a checkpoint, which nothing is written to.

    A weight that is masked is what the file has, masked when it comes; one that is changed otherwise is held by the host until
    a file of its own has it.

    Args:
        model, device, dtype: as in `Streamed`.
        holds: the file of each parameter of the layers, by its name in the model and in the file.
    """

    reads_files = True

    def __init__(self, model: nn.Module, device: torch.device, dtype: torch.dtype, holds: Mapping[str, MappedFile]) -> None:
        self._changed: dict[Path, MappedFile] = {}
        names: list[str] = []

        def mapped(name: str, _: nn.Parameter) -> Tensor:
            names.append(name)
            return holds[name].tensor(name)

        super().__init__(model, device, dtype, mapped)
        slots = [slot for of_layer in self.slots for slot in of_layer]
        self._lies = {slot: (holds[name], name) for slot, name in zip(slots, names, strict=True)}

    def _files(self, index: int) -> dict[MappedFile, list[str]]:
        """Where a layer is read from, and by which names."""
        found: dict[MappedFile, list[str]] = {}
        for slot in self.slots[index]:
            if slot in self._lies:
                file, name = self._lies[slot]
                found.setdefault(file, []).append(name)
        return found

    @override
    def hold(self, slot: Slot, weight: Tensor) -> None:
        slot.stored, slot.changes = weight.detach().cpu().clone(), []
        if slot in self._lies:
            file, name = self._lies.pop(slot)
            file.let_go([name])

    @override
    def lies_in(self, file: Path, names: Mapping[nn.Linear, str]) -> None:
        mapped = self._changed.get(file) or MappedFile(file)
        self._changed[file] = mapped
        for linear, name in names.items():
            slot = self._of_linear[linear]
            slot.stored, slot.changes = mapped.tensor(name), []
            self._lies[slot] = mapped, name

    @override
    def check(self, index: int) -> None:
        for file in self._files(index):
            file.check()

    @override
    def left(self, index: int) -> None:
        for file, names in self._files(index).items():
            file.let_go(names)

    @override
    def expect(self, index: int) -> None:
        for file, names in self._files(index).items():
            file.expect(names)


def _check_untied(model: nn.Module, prefix: str) -> None:
    """Raise ConfigError where a parameter of a layer is one of something else too: who changes it would change it there."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = names.setdefault(id(parameter), name)
        if other != name and any(one.startswith(f"{prefix}.") for one in (name, other)):
            raise ConfigError(
                f"{name} is {other} as well: a model that ties parameters of layers needs model.placement=device"
            )


def masked(mask: Tensor, weight: Tensor) -> Tensor:
    """A weight with zeros, never -0.0, where a mask, bool `(C_out, C_in)`, has none."""
    return torch.where(mask.to(weight.device), weight, weight.new_zeros(()))


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.cpu().pin_memory() if device.type == "cuda" else tensor
