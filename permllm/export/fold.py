"""Stored order of a checkpoint's tensors: permuted rows and columns, and gathered activations.

A permutation is an index vector, and its linear is stored as `W[:, permutation]`, which is N:M. The
inputs of the linear must be permuted in the same way:

- `folded`: the rows of earlier weights and biases are permuted, or the norms and embeddings of the
  residual stream. The model computes the same function as before, with the code of the dense model.
- `gathered`: a permutation is folded into neighbouring weights if they alone can absorb it. Else
  the activations are gathered before the linear.
- `simulate`: nothing is permuted. The weights are N:M only in permuted order, which is how the
  papers evaluate them.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup, decoder_layers, family_of, produced_rows
from permllm.models.head import head_path
from permllm.permutation.foldable import RESIDUAL, folded_permutations, produced_permutation


@dataclass
class StoredOrder:
    """Index vectors that turn tensors in original order into stored tensors.

    Attributes:
        form: `simulate`, `folded` or `gathered`.
        rows: int64 index along the first dimension, by parameter name.
        columns: int64 index along the last dimension, by parameter name.
        gathers: int64 permutation of a module's input, by module path.
    """

    form: Literal["folded", "gathered", "simulate"]
    rows: dict[str, Tensor] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    gathers: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor as it is stored."""
        if name in self.rows:
            tensor = tensor.index_select(0, self.rows[name])
        if name in self.columns:
            tensor = tensor.index_select(-1, self.columns[name])
        return tensor


def stored_order(
    form: Literal["none", "folded", "gathered", "simulate"],
    model: nn.Module,
    groups: list[ChannelGroup],
    permutations: dict[str, Tensor],
) -> StoredOrder:
    """Return the stored order of a model.

    Args:
        form: `simulate`, `folded` or `gathered`; `none`: `folded` if it is possible, or `gathered`.
        model: the model; may be on the meta device.
        groups: all channel groups of the model, whether pruned or not.
        permutations: permutations of the pruned groups, int64 `(C_in,)`, by group. Other groups
            that read the same channels are stored in the same order.

    Raises:
        ConfigError: the form is `folded`, and a permutation does not fold.
    """
    if form == "none":
        try:
            return stored_order("folded", model, groups, permutations)
        except ConfigError:
            return stored_order("gathered", model, groups, permutations)
    stored = StoredOrder(form)
    parameters = dict(model.named_parameters())
    if form == "folded":
        _fold(stored, parameters, model, groups, permutations)
    elif form == "gathered":
        _gather(stored, parameters, groups, permutations)
    return stored


def _fold(
    stored: StoredOrder,
    parameters: dict[str, nn.Parameter],
    model: nn.Module,
    groups: list[ChannelGroup],
    permutations: dict[str, Tensor],
) -> None:
    permuted = [group for group in groups if group.name in permutations]
    shared = folded_permutations(permuted, permutations)
    stream = shared.get(RESIDUAL)
    for group in groups:
        if not group.table.folds:  # `folded_permutations` has checked that it has no permutation
            continue
        permutation = permutations.get(group.name) if group.table.producers else stream
        if permutation is not None:
            stored.columns |= {f"{path}.weight": permutation for path in group.members}
            _put_producers(stored, parameters, group, shared.get(group.name, permutation))
    if stream is not None:
        _put_stream(stored, parameters, model, stream)


def _put_stream(
    stored: StoredOrder, parameters: dict[str, nn.Parameter], model: nn.Module, stream: Tensor
) -> None:
    """Permute all modules at the residual stream, except for the linears that read it."""
    family = family_of(model)
    rows = [path for path in family.after if path not in family.projections]
    for index in range(len(decoder_layers(model))):
        rows += [f"{family.layers}.{index}.{path}" for path in family.norms + family.writers]
    tokens, *columns = family.embeddings
    into, out_of = family.projections or ("", "")
    if f"{into}.weight" in parameters:
        rows.append(into)
    else:
        columns.append(tokens)
    # A head that is tied to the embedding is permuted with it.
    columns.append(out_of if f"{out_of}.weight" in parameters else head_path(model))
    names = [f"{path}.{kind}" for path in rows for kind in ("weight", "bias")]
    stored.rows |= {name: stream for name in names if name in parameters}
    stored.columns |= {f"{path}.weight": stream for path in columns}


def _put_producers(
    stored: StoredOrder,
    parameters: dict[str, nn.Parameter],
    group: ChannelGroup,
    permutation: Tensor,
) -> None:
    for producer, part in group.table.produced():
        for name in (f"{group.prefix}{producer}.weight", f"{group.prefix}{producer}.bias"):
            if name in parameters:
                rows = produced_rows(len(parameters[name]), part, permutation)
                stored.rows[name] = stored.rows[name][rows] if name in stored.rows else rows


def _gather(
    stored: StoredOrder,
    parameters: dict[str, nn.Parameter],
    groups: list[ChannelGroup],
    permutations: dict[str, Tensor],
) -> None:
    for group in groups:
        permutation = permutations.get(group.name)
        if permutation is None:
            continue
        stored.columns |= {f"{path}.weight": permutation for path in group.members}
        producers = group.table.producers
        absorbed = produced_permutation(group).contract(permutation) if producers else None
        if absorbed is not None:
            _put_producers(stored, parameters, group, absorbed)
        elif not torch.equal(permutation, torch.arange(len(permutation))):
            stored.gathers |= {group.prefix + path: permutation for path in group.table.readers}
