"""What a model family is: where its decoder layers are, and which linears of a layer share a channel order.

A family is a short table, keyed by `config.model_type`. To add one, add a table (CONTRIBUTING.md, "A model family").
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from permllm.errors import ConfigError


@dataclass(frozen=True)
class GroupTable:
    """One row of a family's table: paths relative to a decoder layer.

    Attributes:
        name: key of the group; the module's own path when it has one member, a joint name when it has several.
        members: the linears that read the same activations and therefore share one permutation.
    """

    name: str
    members: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """Where the parts of a model are.

    Attributes:
        layers: path of the list of decoder layers.
        groups: the channel groups of each decoder layer, in the order in which the layer runs them.
        after: paths of what follows the last decoder layer, before the head; a model may lack some.
    """

    layers: str
    groups: tuple[GroupTable, ...]
    after: tuple[str, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Linears of one decoder layer that read the same activations and share one permutation.

    Attributes:
        name: module path of the group, the key of every record about it.
        layer: index of the decoder layer.
        members: module path of each linear.
        channels: C_in.
        rows: C_out of each member.
    """

    name: str
    layer: int
    members: tuple[str, ...]
    channels: int
    rows: tuple[int, ...]


_GATED = (
    GroupTable("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    GroupTable("self_attn.o_proj", ("self_attn.o_proj",)),
    GroupTable("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj")),
    GroupTable("mlp.down_proj", ("mlp.down_proj",)),
)
_OPT = (
    GroupTable("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    GroupTable("self_attn.out_proj", ("self_attn.out_proj",)),
    GroupTable("fc1", ("fc1",)),
    GroupTable("fc2", ("fc2",)),
)

FAMILIES: dict[str, Family] = {
    "llama": Family("model.layers", _GATED, ("model.norm",)),
    "mistral": Family("model.layers", _GATED, ("model.norm",)),
    "qwen2": Family("model.layers", _GATED, ("model.norm",)),
    "qwen3": Family("model.layers", _GATED, ("model.norm",)),
    "opt": Family("model.decoder.layers", _OPT, ("model.decoder.final_layer_norm", "model.decoder.project_out")),
}


def family_of(model: nn.Module) -> Family:
    """The family of a transformers model, by `model.config.model_type`.

    Raises:
        ConfigError: the type is not known; the message lists those that are.
    """
    return family_named(model.config.model_type)  # type: ignore[union-attr, arg-type]


def family_named(model_type: str) -> Family:
    """The family of a model type. Raises ConfigError with the known types when it is not one of them."""
    if model_type not in FAMILIES:
        raise ConfigError(f"model type {model_type!r} is not known; known are: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a model of a known family, in order."""
    layers = model.get_submodule(family_of(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def after_layers(model: nn.Module, hidden: Tensor) -> Tensor:
    """What the head reads, given the output `(..., hidden)` of the last decoder layer: the final norm, for the most part."""
    for path in family_of(model).after:
        parent, _, name = path.rpartition(".")
        module = getattr(model.get_submodule(parent), name, None)
        if module is not None:
            hidden = module(hidden)
    return hidden


def channel_groups(model: nn.Module) -> list[ChannelGroup]:
    """All channel groups of a model, layer by layer; works on the meta device.

    Raises:
        ConfigError: the model type is unknown, or a module of the family's table is missing or not linear.
    """
    family = family_of(model)
    groups = []
    for index in range(len(decoder_layers(model))):
        prefix = f"{family.layers}.{index}."
        for table in family.groups:
            members = tuple(prefix + member for member in table.members)
            linears = [linear_at(model, path) for path in members]
            groups.append(
                ChannelGroup(
                    name=prefix + table.name,
                    layer=index,
                    members=members,
                    channels=linears[0].in_features,
                    rows=tuple(linear.out_features for linear in linears),
                )
            )
    return groups


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The linear at a module path. Raises ConfigError when it is missing or not an `nn.Linear`."""
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ConfigError(f"the model has no module {path}, which its type's family table names") from error
    if not isinstance(module, nn.Linear):
        raise ConfigError(f"{path} is a {type(module).__name__}, not a Linear: quantised or adapted models cannot be pruned")
    return module
