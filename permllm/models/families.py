"""Model families: places of decoder layers, linears that share a permutation, folding.

A family is a short table, whose key is `config.model_type`. To add a family, add a table here; an
installed package adds a table by an entry point (docs/extending.md, "A model family"). Any other
decoder gets its channel groups from a traced forward (`permllm.models.discovery`), and its
permutations do not fold.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import entry_points
from os.path import commonpath
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from permllm.errors import ConfigError
from permllm.models.discovery import structure_of

# Dtypes of weights that can be pruned.
_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Group of the entry points by which packages add families; an entry's name is a model type.
_ENTRY_POINTS = "permllm.families"
# Rows of a producer that are a group's channels: the first or last ones of a fused projection.
Part = Literal["whole", "first", "last"]


@dataclass(frozen=True)
class GroupTable:
    """Channel group in a family's table; paths are relative to a decoder layer.

    Attributes:
        name: name of the group: the path of its only member, or a joint name of several members.
        members: linears that read the same activations and therefore share one permutation.
        reader: module that receives these activations as its first argument or as `hidden_states`;
            None: each member receives them itself.
        producers: linears whose output rows are the channels. Only elementwise functions or
            attention may lie between producers and members. A norm over the channels in between
            counts as a producer. Empty: the channels are those of the residual stream.
        by_head: True: attention lies in between. A channel then stays in its head, and query heads
            that share a key-value head get the same permutation.
        parts: rows of each producer that are the channels; empty: all rows.
        folds: True: the producers, or all modules at the residual stream, absorb a permutation.
    """

    name: str
    members: tuple[str, ...]
    reader: str | None = None
    producers: tuple[str, ...] = ()
    by_head: bool = False
    parts: tuple[Part, ...] = ()
    folds: bool = True

    @property
    def readers(self) -> tuple[str, ...]:
        """Return the modules whose input is gathered when a permutation does not fold."""
        return self.members if self.reader is None else (self.reader,)

    def produced(self) -> Iterator[tuple[str, Part]]:
        """Return each producer with the part of its rows that are the channels."""
        whole: tuple[Part, ...] = ("whole",)
        parts = self.parts or whole * len(self.producers)
        return zip(self.producers, parts, strict=True)


@dataclass(frozen=True)
class Family:
    """Places of the parts of a model.

    Attributes:
        layers: path of the list of decoder layers.
        groups: channel groups of each decoder layer, in the order in which the layer runs them.
        after: paths of the modules between the last decoder layer and the head; a model may lack
            some of them.
        norms: norms of each decoder layer on the residual stream.
        writers: linears of each decoder layer whose outputs are added to the residual stream.
        embeddings: paths of the embeddings, the token embedding first. Their columns are channels
            of the residual stream, except for the token embedding of a model with `projections`.
        projections: paths of the linears from the token embedding into the residual stream, and
            from the stream to the head; a model may lack them.
        tuples: True: a decoder layer returns a tuple, and the hidden states are its first entry.
    """

    layers: str
    groups: tuple[GroupTable, ...]
    after: tuple[str, ...]
    norms: tuple[str, ...] = ()
    writers: tuple[str, ...] = ()
    embeddings: tuple[str, ...] = ()
    projections: tuple[str, ...] = ()
    tuples: bool = False


@dataclass(frozen=True)
class ChannelGroup:
    """Linears of one decoder layer that read the same activations and share one permutation.

    Attributes:
        name: module path of the group, its key in records.
        layer: index of the decoder layer.
        members: module path of each linear.
        channels: C_in.
        rows: C_out of each member.
        table: the group in the family's table.
        heads: number of key-value heads, and of query heads for each of them; (1, 1): channels do
            not belong to heads.
    """

    name: str
    layer: int
    members: tuple[str, ...]
    channels: int
    rows: tuple[int, ...]
    table: GroupTable
    heads: tuple[int, int] = (1, 1)

    @property
    def weights(self) -> int:
        """Return the number of weights of all members."""
        return self.channels * sum(self.rows)

    @property
    def prefix(self) -> str:
        """Return the path of the decoder layer, with a dot at the end."""
        return self.name.removesuffix(self.table.name)


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = ("mlp.gate_proj", "mlp.up_proj")
_DOWN = "mlp.down_proj"


def _attention(output: str) -> tuple[GroupTable, GroupTable]:
    """Return the two groups of an attention with linears `q_proj`, `k_proj` and `v_proj`."""
    return (
        GroupTable("self_attn.qkv_proj", _QKV, "self_attn"),
        GroupTable(output, (output,), producers=("self_attn.v_proj",), by_head=True),
    )


_LLAMA = Family(
    layers="model.layers",
    groups=(
        *_attention("self_attn.o_proj"),
        GroupTable("mlp.gate_up_proj", _GATED, "mlp"),
        GroupTable(_DOWN, (_DOWN,), producers=_GATED),
    ),
    after=("model.norm",),
    norms=("input_layernorm", "post_attention_layernorm"),
    writers=("self_attn.o_proj", _DOWN),
    embeddings=("model.embed_tokens",),
)
_OLMO2 = replace(_LLAMA, norms=("post_attention_layernorm", "post_feedforward_layernorm"))
_GEMMA = replace(_LLAMA, norms=(*_LLAMA.norms, "pre_feedforward_layernorm", _OLMO2.norms[1]))
_PHI3 = replace(
    _LLAMA,
    groups=(
        GroupTable("self_attn.qkv_proj", ("self_attn.qkv_proj",)),
        GroupTable(
            "self_attn.o_proj",
            ("self_attn.o_proj",),
            producers=("self_attn.qkv_proj",),
            by_head=True,
            parts=("last",),
        ),
        GroupTable("mlp.gate_up_proj", ("mlp.gate_up_proj",)),
        GroupTable(_DOWN, (_DOWN,), producers=("mlp.gate_up_proj",) * 2, parts=("first", "last")),
    ),
)
_OPT = Family(
    layers="model.decoder.layers",
    groups=(
        *_attention("self_attn.out_proj"),
        GroupTable("fc1", ("fc1",)),
        GroupTable("fc2", ("fc2",), producers=("fc1",)),
    ),
    after=("model.decoder.final_layer_norm", "model.decoder.project_out"),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    writers=("self_attn.out_proj", "fc2"),
    embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
    projections=("model.decoder.project_in", "model.decoder.project_out"),
)

FAMILIES: dict[str, Family] = {
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo2": _OLMO2,
    "opt": _OPT,
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
}
_OF_MODELS: WeakKeyDictionary[nn.Module, Family] = WeakKeyDictionary()


def family_of(model: Any) -> Family:
    """Return the family of a transformers model, from a table or from a traced forward.

    Raises:
        ConfigError: the model type has no table, and the model is not a decoder that can be pruned.
    """
    if model not in _OF_MODELS:
        # A gathered model has a type of its own, and the structure of the dense model.
        model_type = getattr(model.config, "dense_type", model.config.model_type)
        own = FAMILIES.get(model_type)
        _OF_MODELS[model] = own or family_of_a_package(model_type) or _discovered(model)
    return _OF_MODELS[model]


@cache
def family_of_a_package(model_type: str) -> Family | None:
    """Return the table of a model type from an installed package; None: no package has one."""
    for entry in entry_points(group=_ENTRY_POINTS, name=model_type):
        return cast(Family, entry.load())
    return None


def _discovered(model: Any) -> Family:
    """Return the family of a model without a table; its permutations do not fold."""
    structure = structure_of(model)
    groups = []
    for members in structure.groups:
        paths = [member.replace(".", "/") for member in members]
        folder = commonpath(paths).replace("/", ".")
        names = [member.removeprefix(f"{folder}.").replace(".", "_") for member in members]
        name = folder if len(members) == 1 else f"{folder}.{'_'.join(names)}".removeprefix(".")
        groups.append(GroupTable(name, members, folds=False))
    return Family(
        layers=structure.layers,
        groups=tuple(groups),
        after=structure.after,
        embeddings=structure.embeddings,
        tuples=structure.tuples,
    )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers of a model, in order."""
    return cast(nn.ModuleList, model.get_submodule(family_of(model).layers))


def after_layers(model: nn.Module, hidden: Tensor) -> Tensor:
    """Return the input of the head for an output `(..., hidden)` of the last decoder layer."""
    for path in family_of(model).after:
        parent, _, name = path.rpartition(".")
        module = getattr(model.get_submodule(parent), name, None)
        if module is not None:
            hidden = module(hidden)
    return hidden


def channel_groups(model: nn.Module) -> list[ChannelGroup]:
    """Return all channel groups of a model, layer by layer; the model may be on the meta device.

    Raises:
        ConfigError: the model has no family, or a module of its table is not a linear of floats.
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
                    table=table,
                    heads=_heads(model, prefix, table) if table.by_head else (1, 1),
                )
            )
    return groups


def _heads(model: nn.Module, prefix: str, table: GroupTable) -> tuple[int, int]:
    """Return the number of key-value heads of a group, and of query heads for each of them."""
    config: Any = model.config
    query = config.num_attention_heads
    ((producer, part),) = table.produced()
    if part == "whole":  # the model's class may ignore num_key_value_heads
        width = linear_at(model, prefix + table.members[0]).in_features // query
        heads = linear_at(model, prefix + producer).out_features // width
    else:
        heads = config.num_key_value_heads
    return heads, query // heads


def produced_rows(rows: int, part: Part, permutation: Tensor) -> Tensor:
    """Return an index of a producer's rows, int64 `(rows,)`, that permutes its channels.

    Args:
        rows: number of rows of the producer.
        part: part of the rows that are the channels.
        permutation: the permutation, int64 `(channels,)`.
    """
    start = rows - len(permutation) if part == "last" else 0
    index = torch.arange(rows, device=permutation.device)
    index[start : start + len(permutation)] = permutation + start
    return index


def linear_at(model: nn.Module, path: str) -> nn.Linear:
    """Return the linear at a module path.

    Raises:
        ConfigError: the module is not a linear with a matrix of floats, its weight is computed, or
            its forward was replaced by something other than a hook of accelerate.
    """
    module = model.get_submodule(path)
    replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    # A parametrised or quantised linear has a class of its own.
    if type(module) is not nn.Linear or replaced or module.weight.dtype not in _WEIGHTS:
        raise ConfigError(
            f"{path} is a {type(module).__name__}, but no plain Linear of floats: "
            "quantised or adapted models cannot be pruned"
        )
    return module
