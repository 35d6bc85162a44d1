"""In which order the tensors of an exported model are stored: what is permuted, and where a gather stays.

A channel order is an index vector `perm`, and its linear is stored as `W[:, perm]`, which is N:M.
What gives it its inputs must then give them in that order:

- `folded`: the order goes into the rows of the weights before (and their biases, the norms and
  embeddings of the residual stream). The model computes the same function with the same code as the
  dense one.
- `gathered`: what a neighbour can absorb by itself goes there; before everything else the
  activations are gathered.
- `simulate`: nothing is permuted. The model is N:M only in the order that the run found, as the
  papers evaluate it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from permllm.models.families import ChannelGroup, decoder_layers, family_of, produced_rows
from permllm.models.head import head_path
from permllm.permutation.foldable import RESIDUAL, foldable, local_order

FORMS = ("simulate", "folded", "gathered")


@dataclass
class StoredOrder:
    """How the tensors of a model are stored.

    Attributes:
        rows: int64 index along the first dimension, by parameter name.
        columns: int64 index along the last dimension, by parameter name.
        gathers: int64 order in which a module's input is gathered, by module path.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    gathers: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The tensor as it is stored."""
        if name in self.rows:
            tensor = tensor.index_select(0, self.rows[name])
        if name in self.columns:
            tensor = tensor.index_select(-1, self.columns[name])
        return tensor


def stored_order(
    form: str, model: nn.Module, groups: list[ChannelGroup], orders: dict[str, Tensor]
) -> StoredOrder:
    """How a pruned model is stored in one of the `FORMS`.

    Args:
        form: `simulate`, `folded` or `gathered`.
        model: of a known family; may be on the meta device.
        groups: its channel groups, all layers, whether they are pruned or not.
        orders: int64 `(C_in,)` by group, of those that are pruned. All that reads permuted channels
            reads them so.

    Raises:
        ConfigError: the orders do not fold (`folded`).
    """
    if form == "simulate":
        return StoredOrder()
    return _folded(model, groups, orders) if form == "folded" else _gathered(model, groups, orders)


def _folded(model: nn.Module, groups: list[ChannelGroup], orders: dict[str, Tensor]) -> StoredOrder:
    shared = foldable([group for group in groups if group.name in orders], orders)
    stored = StoredOrder()
    parameters = dict(model.named_parameters())
    family = family_of(model)

    def put(target: dict[str, Tensor], paths: Iterable[str], order: Tensor) -> None:
        for path in paths:
            names = (
                (f"{path}.weight", f"{path}.bias") if target is stored.rows else (f"{path}.weight",)
            )
            target.update({name: order for name in names if name in parameters})

    stream = shared.get(RESIDUAL)
    for group in groups:
        if not group.table.folds:  # its order is none
            continue
        order = orders.get(group.name) if group.table.producers else stream
        if order is not None:
            put(stored.columns, group.members, order)
            _put_producers(stored, parameters, group, shared.get(group.name, order))
    if stream is None:  # nothing that reads it was pruned
        return stored
    for index in range(len(decoder_layers(model))):
        put(
            stored.rows,
            [f"{family.layers}.{index}.{path}" for path in family.norms + family.writers],
            stream,
        )
    put(stored.rows, [path for path in family.after if path not in family.projections], stream)
    into, out_of = [
        path if f"{path}.weight" in parameters else None for path in family.projections
    ] or (None, None)
    tokens, *others = family.embeddings
    put(stored.columns, others, stream)
    if into is None:
        put(stored.columns, [tokens], stream)
    else:
        put(stored.rows, [into], stream)
    # A head tied to the embedding is no parameter of its own, and follows it.
    put(stored.columns, [head_path(model) if out_of is None else out_of], stream)
    return stored


def _put_producers(
    stored: StoredOrder, parameters: dict[str, nn.Parameter], group: ChannelGroup, order: Tensor
) -> None:
    """The rows that a group's producers write as its channels; of a fused one, a part each time."""
    for producer, part in group.table.produced():
        for name in (f"{group.prefix}{producer}.weight", f"{group.prefix}{producer}.bias"):
            if name in parameters:
                rows = produced_rows(len(parameters[name]), part, order)
                stored.rows[name] = stored.rows[name][rows] if name in stored.rows else rows


def _gathered(
    model: nn.Module, groups: list[ChannelGroup], orders: dict[str, Tensor]
) -> StoredOrder:
    stored = StoredOrder()
    parameters = dict(model.named_parameters())
    for group in (group for group in groups if group.name in orders):
        order = orders[group.name]
        stored.columns |= {f"{path}.weight": order for path in group.members}
        absorbed = local_order(group).shared(order) if group.table.producers else None
        if absorbed is not None:
            _put_producers(stored, parameters, group, absorbed)
        elif not torch.equal(order, torch.arange(len(order))):
            stored.gathers |= {group.prefix + path: order for path in group.table.readers}
    return stored
