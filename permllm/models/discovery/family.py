"""A family's table from the structure of a small model."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from permllm.errors import PermLLMError, first_line
from permllm.models.discovery.axes import Axes, trace
from permllm.models.discovery.proof import Proof
from permllm.models.discovery.readings import Readers, layers_path, readings, split
from permllm.models.discovery.small import Refused, check_kind, logits, small_model, tokens
from permllm.models.families import (
    Family,
    GroupTable,
    Part,
    after_layers,
    key_value_heads,
    remember,
)
from permllm.models.head import Head, head_path
from permllm.models.layers import layer_inputs, run_layer

_FOUND: dict[str, Family] = {}


def family_by_structure(config: PreTrainedConfig, model_type: str) -> Family:
    """The family of a model type without a table; found once for each config in a process.

    Args:
        config: of a dense or gathered model.
        model_type: of the dense model.

    Raises:
        ConfigError: the model is no decoder of attention and dense linears, or its structure cannot
            be told; the message says why.
    """
    key = json.dumps([model_type, config.to_dict()], sort_keys=True, default=str)
    if key not in _FOUND:
        check_kind(config, model_type)
        try:
            # Whoever asks may be building a model without values, or may have switched gradients
            # off.
            with (
                torch.random.fork_rng(devices=[]),
                torch.device("cpu"),
                torch.inference_mode(False),
            ):
                _FOUND[key] = _found(small_model(config, model_type), model_type)
        except (PermLLMError, MemoryError):
            raise
        except Exception as error:  # a class of any kind may raise anything
            raise Refused(model_type, f"{type(error).__name__}: {first_line(error)}") from error
    return _FOUND[key]


def _found(model: PreTrainedModel, model_type: str) -> Family:
    layers = layers_path(model, model_type)
    readers = readings(model, layers, model_type)
    whole = logits(model)
    _check_causal(model, whole, model_type)
    axes = trace(model, layers, model_type)
    stream = _Stream(axes, layers)
    heads = key_value_heads(model.config)
    tables = [_table(axes, stream, layers, each, heads) for each in readers]
    family = _family(model, axes, stream, layers, tables)
    proof = Proof(model, whole, family, heads)
    groups: list[GroupTable] = []
    for each, table in zip(readers, tables, strict=True):
        one_by_one = len(each.members) > 1 and not proof.gathers(table)
        groups += (
            [_table(axes, stream, layers, alone, heads) for alone in split(each)]
            if one_by_one
            else [table]
        )
    reads_stream = [
        group for group in groups if stream.holds_read(f"{layers}.0.{group.members[0]}")
    ]
    folds = bool(reads_stream) and proof.stream_folds(reads_stream)
    written = Counter(producer for group in groups for producer in group.produced())
    proved = [
        folds
        if group in reads_stream
        # What two groups read cannot follow the orders of both.
        else bool(group.producers)
        and all(written[each] == 1 for each in group.produced())
        and proof.folds(group)
        for group in groups
    ]
    family = replace(
        family,
        groups=tuple(
            each if one else _stuck(each) for each, one in zip(groups, proved, strict=True)
        ),
    )
    _check_layer_by_layer(model, whole, family, model_type)
    return family


class _Stream:
    """The residual stream: what is joined to the first layer's input by elementwise work, norms and sums alone.

    Each module has what it reads and what it writes, which are one for a module that keeps
    channels; a module that reads the rows of another, all of them and in their order, is joined to
    it.
    """

    def __init__(self, axes: Axes, layers: str) -> None:
        self._axes = axes
        self._parent: dict[tuple[str, str], tuple[str, str]] = {}
        for path in axes.read:
            if axes.keeps_channels(path):
                self._join((path, "read"), (path, "written"))
            for source, start in axes.reads(path).slices:
                if not start and axes.written[source].shape[-1] == axes.read[path].shape[-1]:
                    self._join((path, "read"), (source, "written"))
        self._root = self._find((f"{layers}.0", "written"))

    def holds_read(self, path: str) -> bool:
        """Whether a module reads channels of the stream."""
        return self._find((path, "read")) == self._root

    def holds_written(self, path: str) -> bool:
        """Whether a module writes channels of the stream."""
        return self._find((path, "written")) == self._root

    def _find(self, node: tuple[str, str]) -> tuple[str, str]:
        while node in self._parent:
            node = self._parent[node]
        return node

    def _join(self, one: tuple[str, str], other: tuple[str, str]) -> None:
        first, second = self._find(one), self._find(other)
        if first != second:
            self._parent[first] = second


def _table(
    axes: Axes, stream: _Stream, layers: str, readers: Readers, heads: tuple[int, int]
) -> GroupTable:
    """The row of a group, with the producers that the cuts show."""
    prefix = f"{layers}.0."
    table = GroupTable(readers.name, readers.members, readers.reader)
    path = prefix + readers.members[0]
    if stream.holds_read(path):
        return table
    channels = axes.read[path].shape[-1]
    producers = _producers(axes, path, channels)
    by_head = producers is None
    if (
        producers is None
    ):  # something stands between that is not elementwise: attention, if it keeps to its heads
        found = axes.reads(path, heads)
        channels //= heads[1]
        producers = found.slices
    rows: list[tuple[str, Part]] = []
    for source, start in producers:
        part = _part(start, channels, axes.written[source].shape[-1])
        if (
            part is None
            or not source.startswith(prefix)
            or "#" in source
            or isinstance(axes.modules[source], nn.Embedding)
        ):
            return table
        rows.append((source.removeprefix(prefix), part))
    if not rows:
        return table
    parts = tuple(part for _, part in rows)
    whole = all(part == "whole" for part in parts)
    return replace(
        table,
        producers=tuple(name for name, _ in rows),
        parts=() if whole else parts,
        by_head=by_head,
    )


def _stuck(group: GroupTable) -> GroupTable:
    """The row of a group whose order nothing absorbs."""
    return replace(group, producers=(), parts=(), by_head=False, folds=False)


def _producers(axes: Axes, path: str, channels: int) -> list[tuple[str, int]] | None:
    """The modules whose rows are the channels that a module reads, through elementwise work alone; None where there is more.

    A module between that has weights of its own, a norm over these channels, is one of them.
    """
    found = axes.reads(path)
    if found.mixed or not found.slices:
        return None
    producers: list[tuple[str, int]] = []
    for source, start in found.slices:
        if not axes.keeps_channels(source):
            producers.append((source, start))
            continue
        before = (
            None
            if start or axes.written[source].shape[-1] != channels
            else _producers(axes, source, channels)
        )
        if before is None:
            return None
        producers += before + ([(source, 0)] if _has_weight(axes.modules[source], channels) else [])
    position = axes.called.index
    return sorted(set(producers), key=lambda producer: (position(producer[0]), producer[1]))


def _has_weight(module: nn.Module, channels: int) -> bool:
    weight = getattr(module, "weight", None)
    return weight is not None and weight.shape == (channels,)


def _part(start: int, channels: int, rows: int) -> Part | None:
    if channels == rows:
        return "whole"
    return "first" if not start else "last" if start + channels == rows else None


def _family(
    model: PreTrainedModel, axes: Axes, stream: _Stream, layers: str, tables: list[GroupTable]
) -> Family:
    prefix = f"{layers}.0."
    names = {id(module): name for name, module in model.named_modules()}
    head, embedding = head_path(model), names[id(model.get_input_embeddings())]
    inner = [path for path in axes.called if path.startswith(prefix) and "#" not in path]
    last = max(index for index, path in enumerate(axes.called) if path.startswith(f"{layers}."))
    before = [path for path in axes.called[:last] if not path.startswith(f"{layers}.")]
    after = [path for path in axes.called[last + 1 :] if path != head]
    linears = {path for path in axes.called if isinstance(axes.modules[path], nn.Linear)}
    into = next((path for path in before if path in linears and stream.holds_written(path)), None)
    out_of = next((path for path in after if path in linears and stream.holds_read(path)), None)
    return Family(
        layers=layers,
        groups=tuple(tables),
        after=tuple(path.partition("#")[0] for path in after),
        norms=tuple(
            path.removeprefix(prefix)
            for path in inner
            if path not in linears
            and stream.holds_written(path)
            and list(axes.modules[path].parameters())
        ),
        writers=tuple(
            path.removeprefix(prefix)
            for path in inner
            if path in linears and stream.holds_written(path)
        ),
        embeddings=(
            embedding,
            *(
                path
                for path in before
                if path != embedding
                and isinstance(axes.modules[path], nn.Embedding)
                and stream.holds_written(path)
            ),
        ),
        projections=(into, out_of) if into and out_of else (),
        tuples=axes.tuples,
    )


def _check_causal(model: PreTrainedModel, whole: Tensor, model_type: str) -> None:
    other = tokens()
    other[:, -1] = (other[:, -1] - 2) % 100 + 3
    if not _equal(whole[:, :-1], logits(model, other)[:, :-1]):
        raise Refused(
            model_type,
            "a token's logits depend on the tokens that follow: it is no causal language model",
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=1e-6)


def _check_layer_by_layer(
    model: PreTrainedModel, whole: Tensor, family: Family, model_type: str
) -> None:
    """That the layers, run one at a time, what follows them, and the head give the logits."""
    remember(model, family)
    layers = list(model.get_submodule(family.layers).children())
    failure = f"its layers ({family.layers}), run one at a time, do not give what its forward gives"
    try:
        inputs = layer_inputs(model, tokens())
        hidden = inputs.hidden
        with torch.no_grad():
            for layer, kwargs in zip(layers, inputs.kwargs, strict=True):
                hidden = run_layer(layer, hidden, kwargs)
            found = Head(model).logits(after_layers(model, hidden)[0])
    except Exception as error:  # a layer of any kind may raise anything
        raise Refused(model_type, f"{failure}: {first_line(error)}") from error
    if not _equal(found, whole[0]):
        raise Refused(model_type, failure)
