"""Whether orders fold, and whether gathers are right: permute the small model and compare its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permllm.models.discovery.small import logits
from permllm.models.families import Family, GroupTable, Part, produced_rows
from permllm.models.head import head_path

# What folding leaves of the change that permuting the columns alone makes; norms that compute in
# float32 leave a 1e-5.
_UNDONE = 1e-3


class Proof:
    """The small model and its logits.

    Args:
        model: the small model; it is as it was after each method.
        whole: its logits.
        family: what is known of it; `writers`, `norms`, `after` and `embeddings` are what is proved
            of the residual stream.
        heads: key-value heads and query heads for each.
    """

    def __init__(
        self, model: PreTrainedModel, whole: Tensor, family: Family, heads: tuple[int, int]
    ) -> None:
        self._model, self._family, self._heads = model, family, heads
        self._parameters = dict(model.named_parameters())
        self._depth = len(list(model.get_submodule(family.layers).children()))
        self._generator = torch.Generator().manual_seed(3)
        self._whole = whole

    def gathers(self, group: GroupTable) -> bool:
        """Whether gathering what the reader is given does what permuting the members' columns asks for."""

        def gather(order: Tensor) -> Callable[..., object]:
            def hook(_: object, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> object:
                if args:
                    return (args[0].index_select(-1, order), *args[1:]), kwargs
                return args, kwargs | {
                    "hidden_states": kwargs["hidden_states"].index_select(-1, order)
                }

            return hook

        def changed(gathered: bool) -> Tensor:
            handles = []
            with self._permuting() as permute:
                for prefix in self._prefixes():
                    order = self._random(self._channels(prefix + group.members[0]))
                    permute(-1, [prefix + member for member in group.members], order)
                    if gathered:
                        reader = self._model.get_submodule(prefix + group.reader)
                        handles.append(
                            reader.register_forward_pre_hook(gather(order), with_kwargs=True)
                        )
                try:
                    return logits(self._model)
                finally:
                    for handle in handles:
                        handle.remove()

        return self._undone(changed)

    def folds(self, group: GroupTable) -> bool:
        """Whether the rows of a group's producers absorb its order."""
        key_value, each = self._heads if group.by_head else (1, 1)

        def changed(folded: bool) -> Tensor:
            with self._permuting() as permute:
                for prefix in self._prefixes():
                    channels = self._channels(prefix + group.members[0]) // each
                    width = channels // key_value
                    parts = [self._random(width) + head * width for head in range(key_value)]
                    local = [
                        part - head * width for head, part in enumerate(parts) for _ in range(each)
                    ]
                    order = torch.cat([part + head * width for head, part in enumerate(local)])
                    permute(-1, [prefix + member for member in group.members], order)
                    for producer, part in group.produced() if folded else ():
                        permute(0, [prefix + producer], torch.cat(parts), part)
                return logits(self._model)

        return self._undone(changed)

    def stream_folds(self, groups: Iterable[GroupTable]) -> bool:
        """Whether norms, writers, embeddings and the head absorb an order of the residual stream, which these groups read."""
        family, groups = self._family, tuple(groups)
        head = head_path(self._model)
        into, out_of = family.projections or (None, None)

        def changed(folded: bool) -> Tensor:
            with self._permuting() as permute:
                order = self._random(self._channels(f"{family.layers}.0.{groups[0].members[0]}"))
                for prefix in self._prefixes():
                    permute(
                        -1, [prefix + member for group in groups for member in group.members], order
                    )
                    if folded:
                        permute(0, [prefix + path for path in family.norms + family.writers], order)
                if folded:
                    permute(
                        0, [path for path in family.after if path not in family.projections], order
                    )
                    tokens, *others = family.embeddings
                    permute(-1, [*others, out_of or head], order)
                    if into is None:
                        permute(-1, [tokens], order)
                    else:
                        permute(0, [into], order)
                return logits(self._model)

        return self._undone(changed)

    def _undone(self, changed: Callable[[bool], Tensor]) -> bool:
        state = self._generator.get_state()
        columns = (changed(False) - self._whole).abs().max()
        self._generator.set_state(state)
        whole = (changed(True) - self._whole).abs().max()
        return bool(whole < _UNDONE * columns)

    def _prefixes(self) -> list[str]:
        return [f"{self._family.layers}.{index}." for index in range(self._depth)]

    def _channels(self, linear: str) -> int:
        return self._parameters[f"{linear}.weight"].shape[-1]

    def _random(self, channels: int) -> Tensor:
        return torch.randperm(channels, generator=self._generator)

    @contextmanager
    def _permuting(self) -> Iterator[Callable[..., None]]:
        """A function that permutes weights, and rows of biases, of modules until the end."""
        before: dict[int, tuple[Tensor, Tensor]] = {}

        def permute(dim: int, paths: Iterable[str], order: Tensor, part: Part = "whole") -> None:
            for path in paths:
                for kind in ("weight", "bias") if dim == 0 else ("weight",):
                    parameter = self._parameters.get(f"{path}.{kind}")
                    if (
                        parameter is None
                    ):  # also a weight that is another's: the head's, where it is the embedding's
                        continue
                    before.setdefault(id(parameter), (parameter, parameter.data))
                    index = produced_rows(parameter.shape[dim], part, order)
                    parameter.data = parameter.data.index_select(dim, index)

        try:
            yield permute
        finally:
            for parameter, data in before.values():
                parameter.data = data
