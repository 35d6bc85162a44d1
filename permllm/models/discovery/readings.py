"""Which linears of the decoder layers read the same tensor, and through which module."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from permllm.models.discovery.small import Refused, logits

# Storage, place in it, channels and their stride: of two views of one tensor they are the same.
_Key = tuple[int, int, int, int]


@dataclass(frozen=True)
class Readers:
    """Linears of a decoder layer that read one tensor; paths relative to the layer.

    Attributes:
        members: in the order in which they are called.
        reader: the outermost module that is given the same tensor and holds all of them; a linear
            that is alone is its own.
    """

    members: tuple[str, ...]
    reader: str

    @property
    def name(self) -> str:
        """The path of a linear that is alone; else what the names of all have in common, around what they have not."""
        if len(self.members) == 1:
            return self.members[0]
        folder = _common([member.split(".")[:-1] for member in self.members])
        names = [".".join(member.split(".")[len(folder) :]) for member in self.members]
        ending = "".join(_common([name[::-1] for name in names]))[::-1]
        ending = ending[ending.index("_") :] if "_" in ending else ""
        stems = [name.removesuffix(ending) for name in names]
        between = "" if all(len(stem) == 1 for stem in stems) else "_"
        return ".".join([*folder, between.join(stems).replace(".", "_") + ending])


@dataclass
class _Calls:
    """What was called within a layer: the tensors, kept so that no two have one storage, and their keys."""

    order: list[str] = field(default_factory=list)
    keys: dict[str, _Key] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)


def layers_path(model: PreTrainedModel, model_type: str) -> str:
    """Path of the decoder layers: the one outermost list of modules that holds linears.

    Raises:
        Refused: there is none, or there are several.
    """
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    ]
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    found = [
        name
        for name in outermost
        if any(isinstance(each, nn.Linear) for each in model.get_submodule(name).modules())
    ]
    if not found:
        weights = sorted(
            {
                type(each).__name__
                for name in outermost
                for each in model.get_submodule(name).modules()
                if _matrices(each)
            }
        )
        instead = f"; they hold {', '.join(weights)}" if weights else ""
        raise Refused(
            model_type,
            f"{type(model).__name__} has no list of layers with nn.Linear modules in them{instead}",
        )
    if len(found) > 1:
        raise Refused(
            model_type, f"{type(model).__name__} has several lists of layers: {', '.join(found)}"
        )
    return found[0]


def readings(model: PreTrainedModel, layers: str, model_type: str) -> list[Readers]:
    """The linears of the first layer by what they read, in the order of the calls; every other layer must have the same.

    Raises:
        Refused: a layer holds weights that are in no `nn.Linear`, leaves a linear uncalled, or is
            unlike the first one.
    """
    every = list(model.get_submodule(layers).children())
    for layer in every:
        _check_weights(layer, layers, model_type)
    calls = [_Calls() for _ in every]
    handles = []
    for layer, of_layer in zip(every, calls, strict=True):
        for name, module in layer.named_modules():
            if name:
                hook = _recorder(name, of_layer)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        logits(model)
    finally:
        for handle in handles:
            handle.remove()
    found = [_readers(layer, of_layer) for layer, of_layer in zip(every, calls, strict=True)]
    for index, (layer, readers) in enumerate(zip(every, found, strict=True)):
        silent = set(_linears(layer)) - {member for each in readers for member in each.members}
        if silent:
            raise Refused(model_type, f"a forward does not call {layers}.{index}.{min(silent)}")
        if readers != found[0]:
            raise Refused(
                model_type,
                f"{layers}.{index} has other linears than {layers}.0, or they read other tensors",
            )
    return found[0]


def split(readers: Readers) -> list[Readers]:
    """Each linear by itself."""
    return [Readers((member,), member) for member in readers.members]


def _common(sequences: list[Any]) -> list[Any]:
    """What all of them begin with."""
    return [
        column[0]
        for column in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False))
    ]


def _recorder(name: str, calls: _Calls) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # As a gather would find it: the first argument, or the one called `hidden_states`.
        values = args[0] if args else kwargs.get("hidden_states")
        if isinstance(values, Tensor) and values.is_floating_point() and values.dim() > 1:
            storage = values.untyped_storage().data_ptr()
            calls.keys[name] = (
                storage,
                int(values.storage_offset()),
                values.shape[-1],
                values.stride(-1),
            )
            calls.kept.append(values)
            calls.order.append(name)

    return hook


def _readers(layer: nn.Module, calls: _Calls) -> list[Readers]:
    linears = set(_linears(layer))
    groups: dict[tuple[_Key, str], list[str]] = {}
    for name in calls.order:
        if name in linears:
            key, outer = calls.keys[name], name
            while calls.keys.get(outer.rpartition(".")[0]) == key:
                outer = outer.rpartition(".")[0]
            groups.setdefault((key, outer), []).append(name)
    return [
        Readers(tuple(dict.fromkeys(names)), outer if len(set(names)) > 1 else names[0])
        for (_, outer), names in groups.items()
    ]


def _linears(layer: nn.Module) -> list[str]:
    return [name for name, module in layer.named_modules() if isinstance(module, nn.Linear)]


def _check_weights(layer: nn.Module, layers: str, model_type: str) -> None:
    for name, module in layer.named_modules():
        if not isinstance(module, nn.Linear):
            for kind in _matrices(module):
                what = ".".join(part for part in (layers, "N", name, kind) if part)
                raise Refused(
                    model_type,
                    f"its layers hold {what} of {type(module).__name__}, which is no nn.Linear",
                )


def _matrices(module: nn.Module) -> list[str]:
    """Names of a module's own weights of two dimensions or more."""
    return [
        name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() > 1
    ]
