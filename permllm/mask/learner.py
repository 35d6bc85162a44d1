"""The masks of a window as they learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from permllm.errors import DataError
from permllm.learning.masked_linear import StandIn
from permllm.learning.ordered_linear import OrderedMaskedLinear
from permllm.learning.scores import Scores
from permllm.learning.training import Learner, Moment
from permllm.models.families import ChannelGroup
from permllm.record.masks import packed_mask, unpacked_mask
from permllm.record.run_tensors import check_order


class MaskLearner(Learner, Generic[StandIn]):
    """The masks of a window, in orders that it is given.

    Args:
        groups: of the window.
        linears: masked linears by group, whose scores learn.
        mask_of: the mask of one of them as it now is, bool `(C_out, C_in)` in original channel order.
        learning_rate: of the scores.
        earlier: masks of the windows before, like `best`.
        orders: int64 `(C_in,)` of all channel groups at the start, by name, for the checkpoint.
        orders_of_earlier: those that `earlier` is N:M in.

    Attributes:
        best: masks by linear, original channel order, on the CPU, as `packed_mask` gives them.
    """

    def __init__(
        self,
        groups: Sequence[ChannelGroup],
        linears: Mapping[str, Sequence[StandIn]],
        mask_of: Callable[[ChannelGroup, StandIn], Tensor],
        learning_rate: float,
        earlier: Mapping[str, Tensor],
        orders: Mapping[str, Tensor],
        orders_of_earlier: Mapping[str, Tensor],
    ) -> None:
        self.groups = groups
        self.linears = linears
        self.mask_of = mask_of
        self.earlier = dict(earlier)
        self._orders = {"orders": orders, "orders_of_earlier": orders_of_earlier}
        self.learning_rate = learning_rate
        self.best: dict[str, Tensor] = {}
        self._at_epoch: dict[str, Tensor] = {}
        each = [(path, linear) for group in groups for path, linear in zip(group.members, linears[group.name], strict=True)]
        self.scores = nn.ModuleDict({path.replace(".", "/"): cast(nn.Module, linear.scores) for path, linear in each})

    @property
    @override
    def gathers(self) -> bool:
        return any(linear.order is not None for linear in self._ordered())

    @override
    def masked_weights(self) -> int:
        return sum(linear.linear.weight.numel() for linear in self._ordered() if linear.scores.keeps_masked)

    def _ordered(self) -> Iterator[OrderedMaskedLinear]:
        """Those whose order is fixed."""
        each = (linear for linears in self.linears.values() for linear in linears)
        return (linear for linear in each if isinstance(linear, OrderedMaskedLinear))

    @override
    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": list(self.scores.parameters()), "lr": self.learning_rate}]

    @override
    def begin(self, moment: Moment, generator: torch.Generator | None) -> None:
        if self.turn is not None:
            self.scores.requires_grad_(self.learns(moment))

    @torch.no_grad()
    def present(self) -> dict[str, Tensor]:
        """The masks as they are now, like `best`."""
        return {
            path: packed_mask(self.mask_of(group, linear).cpu())
            for group in self.groups
            for path, linear in zip(group.members, self.linears[group.name], strict=True)
        }

    def scores_of_the_dense_order(self) -> dict[str, dict[str, Tensor]]:
        """A copy of the parameters of the scores, by linear and name, channels in the dense model's order."""
        found = {}
        for group in self.groups:
            for path, linear in zip(group.members, self.linears[group.name], strict=True):
                scores = linear.scores
                assert isinstance(scores, Scores)
                back = getattr(linear, "inverse", None)
                found[path] = scores.state_in(torch.arange(group.channels) if back is None else back)
        return found

    @override
    def begin_epoch(self) -> None:
        self._at_epoch = self.present()

    @override
    def epoch_values(self, moment: Moment) -> dict[str, Any]:
        now = self.present()
        changed = sum(int(unpacked_mask(now[path] ^ before).sum()) for path, before in self._at_epoch.items())
        return {"mask_flips": changed / sum(8 * len(bits) for bits in now.values())}

    @override
    def keep(self) -> None:
        self.best = self.present()

    @override
    def state(self) -> dict[str, Any]:
        masks = {"best": self.best, "at_epoch": self._at_epoch, "earlier": self.earlier}
        orders = {key: {name: order.cpu() for name, order in of.items()} for key, of in self._orders.items()}
        return {"scores": self.scores.state_dict()} | masks | orders

    @staticmethod
    def check(state: dict[str, Any]) -> None:
        """Raise DataError where a state is not one of masks."""
        for key in ("scores", "best", "at_epoch", "earlier", "orders", "orders_of_earlier"):
            values = state.get(key)
            if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
                raise DataError("it holds no masks")
        for name, order in [*state["orders"].items(), *state["orders_of_earlier"].items()]:
            check_order(f"the permutation of {name}", order)

    @override
    def restore(self, state: dict[str, Any]) -> None:
        mine, its = self.scores.state_dict(), state.get("scores", {})
        if {name: values.shape for name, values in mine.items()} != {name: values.shape for name, values in its.items()}:
            raise DataError("it has scores of other shapes")
        self.scores.load_state_dict(its)
        self.best = {path: bits.cpu() for path, bits in state["best"].items()}
        self._at_epoch = {path: bits.cpu() for path, bits in state["at_epoch"].items()}
