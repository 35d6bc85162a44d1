"""What a model family is: where its decoder layers are, which linears of a layer share a channel order, and what absorbs it.

A family is a short table, keyed by `config.model_type`. To add one, add a table; an installed
package adds its own by an entry point (CONTRIBUTING.md, "A model family"). A type without a table
has what its structure shows (`permllm.models.discovery`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from itertools import repeat
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from permllm.config import NMPattern
from permllm.errors import ConfigError, first_line

# Formats of weights that can be pruned.
_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Of a package's families, by model type.
_ENTRY_POINTS = "permllm.families"
# Which rows of a producer are channels of a group: where projections are fused, the first or the
# last ones.
Part = Literal["whole", "first", "last"]


@dataclass(frozen=True)
class GroupTable:
    """One row of a family's table: paths relative to a decoder layer.

    Attributes:
        name: key of the group; the module's own path when it has one member, a joint name when it
            has several.
        members: the linears that read the same activations and therefore share one permutation.
        reader: the module whose input these activations are, as its first argument or as
            `hidden_states`.
        producers: the linears whose outputs, row by row, are the channels, with only elementwise
            work or attention between, and a norm over the channels that stands there; empty where
            the channels are those of the residual stream.
        by_head: attention stands between, so that a channel must stay in its head, and query heads
            that share a key-value head must be permuted alike.
        parts: of each producer, which rows are the channels; all of them where nothing is said.
        folds: whether the producers, or all that touches the residual stream, absorb an order.
    """

    name: str
    members: tuple[str, ...]
    reader: str
    producers: tuple[str, ...] = ()
    by_head: bool = False
    parts: tuple[Part, ...] = ()
    folds: bool = True

    def produced(self) -> Iterator[tuple[str, Part]]:
        """Each producer and which of its rows are the channels."""
        whole: repeat[Part] = repeat("whole")
        return zip(self.producers, self.parts or whole, strict=False)


@dataclass(frozen=True)
class Family:
    """Where the parts of a model are.

    Attributes:
        layers: path of the list of decoder layers.
        groups: the channel groups of each decoder layer, in the order in which the layer runs them.
        after: paths of what follows the last decoder layer, before the head; a model may lack some.
        norms: of each decoder layer, along the residual stream.
        writers: linears of each decoder layer whose outputs are added to the residual stream.
        embeddings: paths of the embeddings whose columns are the residual stream. Those of the
            tokens, and the head, are only while no projection stands between (`projections`).
        projections: paths of the linears from the embeddings into the stream and from the stream to
            the head, which a model may lack.
        tuples: whether a decoder layer returns a tuple, the states first.
    """

    layers: str
    groups: tuple[GroupTable, ...]
    after: tuple[str, ...]
    norms: tuple[str, ...]
    writers: tuple[str, ...]
    embeddings: tuple[str, ...]
    projections: tuple[str, ...] = ()
    tuples: bool = False


@dataclass(frozen=True)
class ChannelGroup:
    """Linears of one decoder layer that read the same activations and share one permutation.

    Attributes:
        name: module path of the group, the key of every record about it.
        layer: index of the decoder layer.
        members: module path of each linear.
        channels: C_in.
        rows: C_out of each member.
        table: the row of the family's table that it comes from.
        heads: key-value heads, and query heads for each of them, where a channel belongs to a head;
            else (1, 1).
        pattern: N:M of the members, where it is not that of the job (`permllm.models.selection`).
    """

    name: str
    layer: int
    members: tuple[str, ...]
    channels: int
    rows: tuple[int, ...]
    table: GroupTable
    heads: tuple[int, int] = (1, 1)
    pattern: NMPattern | None = None

    @property
    def prefix(self) -> str:
        """Path of the decoder layer, with a dot behind."""
        return self.name.removesuffix(self.table.name)


_GATED = (
    GroupTable(
        "self_attn.qkv_proj",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn",
    ),
    GroupTable(
        "self_attn.o_proj",
        ("self_attn.o_proj",),
        "self_attn.o_proj",
        ("self_attn.v_proj",),
        by_head=True,
    ),
    GroupTable("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
    GroupTable(
        "mlp.down_proj", ("mlp.down_proj",), "mlp.down_proj", ("mlp.gate_proj", "mlp.up_proj")
    ),
)
_LLAMA = Family(
    layers="model.layers",
    groups=_GATED,
    after=("model.norm",),
    norms=("input_layernorm", "post_attention_layernorm"),
    writers=("self_attn.o_proj", "mlp.down_proj"),
    embeddings=("model.embed_tokens",),
)
_GEMMA3 = replace(
    _LLAMA,
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
)
_OPT = Family(
    layers="model.decoder.layers",
    groups=(
        GroupTable(
            "self_attn.qkv_proj",
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            "self_attn",
        ),
        GroupTable(
            "self_attn.out_proj",
            ("self_attn.out_proj",),
            "self_attn.out_proj",
            ("self_attn.v_proj",),
            by_head=True,
        ),
        GroupTable("fc1", ("fc1",), "fc1"),
        GroupTable("fc2", ("fc2",), "fc2", ("fc1",)),
    ),
    after=("model.decoder.final_layer_norm", "model.decoder.project_out"),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    writers=("self_attn.out_proj", "fc2"),
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    projections=("model.decoder.project_in", "model.decoder.project_out"),
)

FAMILIES: dict[str, Family] = {
    "gemma3_text": _GEMMA3,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "opt": _OPT,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
_OF_MODELS: WeakKeyDictionary[nn.Module, Family] = WeakKeyDictionary()


def family_of(model: nn.Module) -> Family:
    """The family of a transformers model, by the type that its config states, or by its structure.

    Raises:
        ConfigError: the type has no table, and its structure cannot be told.
    """
    family = _OF_MODELS.get(model)
    if family is None:
        family = family_of_config(model.config)
        remember(model, family)
    return family


def remember(model: nn.Module, family: Family) -> None:
    """Take a model to be of a family: it is asked for at every step, and to look one up takes a while."""
    _OF_MODELS[model] = family


def family_of_config(config: Any) -> Family:
    """The family of a transformers config.

    Raises:
        ConfigError: as `family_of`.
    """
    # A gathered model has a type of its own and is built like the dense one.
    model_type: str = getattr(config, "dense_type", config.model_type)
    if model_type in FAMILIES or model_type in family_names():
        return family_named(model_type)
    from permllm.models.discovery import family_by_structure

    return family_by_structure(config, model_type)


def family_named(model_type: str) -> Family:
    """The family of a model type.

    Raises:
        ConfigError: it is none of the known types, which the message lists, or the entry point of a
            package gives no family.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type not in family_names():
        raise ConfigError(
            f"model type {model_type!r} is not known; known are: {', '.join(family_names())}"
        )
    return _from_a_package(model_type)


def check_known(model_type: str) -> None:
    """Raise ConfigError where a model type has no table and transformers no causal language model of it."""
    from permllm.models.discovery import causal_types

    if (
        model_type not in FAMILIES
        and model_type not in family_names()
        and model_type not in causal_types()
    ):
        known = ", ".join(family_names())
        raise ConfigError(
            f"model type {model_type!r} is not known; known are: {known}, and decoders that transformers has a class of"
        )


def family_names() -> list[str]:
    """The model types of this package and of those that are installed."""
    return sorted({*FAMILIES, *entry_points(group=_ENTRY_POINTS).names})


@cache
def _from_a_package(model_type: str) -> Family:
    (entry, *_) = entry_points(group=_ENTRY_POINTS, name=model_type)
    try:
        family = entry.load()
    except Exception as error:  # a module of someone else's may raise anything
        raise ConfigError(
            f"the family {model_type} cannot be imported from {entry.value}: {first_line(error)}"
        ) from error
    if not isinstance(family, Family):
        raise ConfigError(
            f"the family {model_type} of {entry.value} is no permllm.models.families.Family"
        )
    return family


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
        ConfigError: the model type is unknown, a module of the family's table is missing or not
            linear, or there is nothing
            to prune: no layer, or a linear without inputs or outputs.
    """
    family = family_of(model)
    groups = []
    for index in range(len(decoder_layers(model))):
        prefix = f"{family.layers}.{index}."
        for table in family.groups:
            members = tuple(prefix + member for member in table.members)
            linears = [linear_at(model, path) for path in members]
            for path, linear in zip(members, linears, strict=True):
                if not linear.in_features or not linear.out_features:
                    raise ConfigError(
                        f"{path} has {linear.in_features} inputs, {linear.out_features} outputs: nothing to prune"
                    )
            groups.append(
                ChannelGroup(
                    name=prefix + table.name,
                    layer=index,
                    members=members,
                    channels=linears[0].in_features,
                    rows=tuple(linear.out_features for linear in linears),
                    table=table,
                    heads=_heads(model, prefix, table) if table.by_head else (1, 1),
                )
            )
    if not groups:
        raise ConfigError("the model has no decoder layers: nothing to prune")
    return groups


def _heads(model: nn.Module, prefix: str, table: GroupTable) -> tuple[int, int]:
    """Key-value heads of a group, and query heads for each of them, as the rows of its producer say where all are channels."""
    heads, repeats = key_value_heads(model.config)
    channels = linear_at(model, prefix + table.members[0]).in_features
    for path, part in table.produced():
        rows = linear_at(model, prefix + path).out_features
        if part == "whole" and channels != rows * repeats and channels % rows == 0:
            query, repeats = heads * repeats, channels // rows
            heads = query // repeats  # a config may say what its class does not read
    return heads, repeats


def key_value_heads(config: Any) -> tuple[int, int]:
    """Key-value heads, and query heads for each of them, of a transformers config."""
    query: int = config.num_attention_heads
    key_value: int = getattr(config, "num_key_value_heads", None) or query
    return key_value, query // key_value


def produced_rows(rows: int, part: Part, order: Tensor) -> Tensor:
    """Index of a producer's rows that gives its channels in an order, int64 `(rows,)`.

    Args:
        rows: of the producer.
        part: which of them are the channels.
        order: int64 `(channels,)`.
    """
    start = rows - len(order) if part == "last" else 0
    index = torch.arange(rows, device=order.device)
    index[start : start + len(order)] = order + start
    return index


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """The linear at a module path.

    Raises ConfigError when it is missing, or computes otherwise than an `nn.Linear`.
    """
    try:
        module = model.get_submodule(path)
    except AttributeError as error:
        raise ConfigError(
            f"the model has no module {path}, which its type's family table names"
        ) from error
    plain = is_plain_linear(module)
    if plain and module.weight.dtype in _WEIGHTS:
        return module  # type: ignore[return-value]
    # Quantised ones may be linears by their class, of one byte or with a forward of their own.
    kind = type(module).__name__
    if plain:
        kind += f" of {str(getattr(module.weight, 'dtype', None)).removeprefix('torch.')}"
    elif isinstance(module, nn.Linear) and "weight" not in module._parameters:
        kind += ", whose weight is computed from others"
    elif "forward" in vars(module):
        kind += " with a forward of its own"
    raise ConfigError(
        f"{path} is a {kind}, not a Linear of floats: quantised or adapted models cannot be pruned"
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module multiplies by a weight that is a parameter of its own, and does nothing else but add a bias.

    A parametrised one computes its weight, and an adapted one may have a forward that somebody has
    given it, other than by a hook of accelerate.
    """
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return (
        plain
        and "weight" in module._parameters
        and ("forward" not in vars(module) or hasattr(module, "_hf_hook"))
    )
