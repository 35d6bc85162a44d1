"""Between rounds the groups of M are dealt anew to the blocks: the masks stay, and channels meet others than before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from permllm.learning.masked_linear import PermutedMaskedLinear
from permllm.learning.problem import LearningProblem
from permllm.learning.training import Learner, Moment, Window
from permllm.permutation.lcp.learner import members
from permllm.permutation.lcp.settings import LCPSettings
from permllm.permutation.shared import SharedOrder
from permllm.sparsity import NMPattern

# Positions among which exchanges are looked for, about: their gradients are so many numbers a channel.
_WIDE = 1024


def span_size(block_size: int) -> int:
    """Positions among which exchanges are looked for: whole blocks, two at least."""
    return block_size * max(2, _WIDE // block_size)


def random_deal(order: SharedOrder, present: Tensor, pattern: NMPattern, generator: torch.Generator) -> Tensor:
    """The groups of M of an order, int64 `(channels,)`, in random sequence inside of its segments."""
    groups = order.segment // order.m(pattern)
    segments = range(order.channels // order.segment)
    return order.deal(present, pattern, [torch.randperm(groups, generator=generator) for _ in segments])


def contested_deal(order: SharedOrder, present: Tensor, pattern: NMPattern, saliency_of: Callable[[str], Tensor]) -> Tensor:
    """The groups in the sequence of how contested they are: those where little decides what is kept share blocks.

    Args:
        order, present, pattern: as in `random_deal`.
        saliency_of: `(C_out, C_in)` of the linear at a module path.
    """
    m, sums = order.m(pattern), torch.zeros(order.channels // order.m(pattern))
    for group in order.groups:
        for path in group.members:
            sums += contest(order.collect(saliency_of(path))[:, present], order.m(pattern), group.pattern or pattern).cpu()
    return order.deal(present, pattern, [part.argsort(stable=True) for part in sums.split(order.segment // m)])


def contest(saliency: Tensor, m: int, pattern: NMPattern) -> Tensor:
    """How contested groups are: the largest entry that is left out over the smallest that is kept, a sum over rows.

    Args:
        saliency: `(rows, C)`, in the order.
        m: channels of a group; the M of the pattern divides it.
        pattern: N:M.

    Returns:
        float32 `(C / m,)`.
    """
    ranked = saliency.float().unflatten(1, (-1, pattern.m)).sort(dim=2, descending=True).values
    kept, left_out = ranked[..., pattern.n - 1], ranked[..., pattern.n]
    ratio = torch.where(kept > 0, left_out / kept, 0.0).sum(0)
    return ratio.view(-1, m // pattern.m).mean(1)


def exchange_deal(
    order: SharedOrder, present: Tensor, pattern: NMPattern, changes: Iterable[Tensor], block_size: int
) -> Tensor:
    """The groups so that those share a block whose best exchange of a channel promises the most.

    Args:
        order, present, pattern: as in `random_deal`.
        changes: as `Exchanges.changes` gives them.
        block_size: B.
    """
    groups = block_size // order.m(pattern)
    return order.deal(present, pattern, [by_affinity(exchange_gain(part), groups) for stack in changes for part in stack])


def exchange_gain(changes: Tensor) -> Tensor:
    """By how much the loss falls, to first order, when two groups exchange the channels that gain the most by it.

    Args:
        changes: `(G M, G)`, of the loss when the channel at a position takes the place of a random member of a group; for its
            own group, if it stays.

    Returns:
        `(G, G)`, symmetric, nonnegative.
    """
    groups = changes.shape[1]
    by_group = changes.unflatten(0, (groups, -1))
    stays = by_group.diagonal(dim1=0, dim2=2).t().unsqueeze(2)  # (G, M, 1)
    best = (stays - by_group).amax(1)
    return (best + best.t()).clamp_min(0.0)


def by_affinity(affinity: Tensor, size: int) -> Tensor:
    """Groups in a sequence that is cut into blocks: the pair that has the most begins one, and those with most for it join.

    Args:
        affinity: `(G, G)`, symmetric.
        size: groups of a block; the last one may be smaller.

    Returns:
        int64 `(G,)` on the CPU.
    """
    affinity = affinity.detach().to("cpu", torch.float64, copy=True).fill_diagonal_(-1.0)
    pairs = affinity.clone()  # of groups that are in no block yet
    sequence: list[int] = []
    for number in range(len(affinity)):
        if number % size == 0:
            chosen, for_block = int(pairs.amax(1).argmax()), torch.zeros(len(affinity), dtype=torch.float64)
        else:
            chosen = int(for_block.argmax())
        sequence.append(chosen)
        for_block += affinity[chosen]
        for_block[sequence] = pairs[chosen] = pairs[:, chosen] = -torch.inf
    return torch.tensor(sequence)


class Exchanges(Learner):
    """What any channel would change in any group of its span of positions, as gradients; nothing learns.

    Args:
        settings: of LCP, whose blocks are the spans.
        learning: orders whose exchanges are looked for.
        shared: all orders of the model.
        window: of layers.
        orders: int64 `(channels,)` of all orders of the model.
        linears: masked linears by channel group of the window, a span of positions a block.
        problem: whose model they are in.
    """

    def __init__(
        self,
        settings: LCPSettings,
        learning: list[SharedOrder],
        shared: list[SharedOrder],
        window: Window,
        orders: Mapping[str, Tensor],
        linears: Mapping[str, list[PermutedMaskedLinear]],
        problem: LearningProblem,
    ) -> None:
        self.size = settings.block_size
        self.shared, self.window, self.linears = shared, window, linears
        self.orders = {name: order.to(problem.device) for name, order in orders.items()}
        dtype = torch.promote_types(next(problem.model.parameters()).dtype, torch.float32)
        self.spans: dict[str, list[Tensor]] = {}
        for order in learning:
            shapes = [(stack.count, stack.size, stack.size) for stack in order.stacks(self.size)]
            # Only gradients are wanted: the values take no memory.
            self.spans[order.name] = [
                torch.zeros((), dtype=dtype, device=problem.device).expand(shape).requires_grad_() for shape in shapes
            ]

    def changes(self, order: SharedOrder, pattern: NMPattern) -> list[Tensor]:
        """The sum over what backward went through: `(spans, G M, G)` for each stack of spans of an order that learns.

        M is the largest of the groups that use the order. What a channel changes in a group is the mean over its places,
        which differ where some of these have a smaller M; in its own group it is that of the place where it stays.
        """
        m, found = order.m(pattern), []
        for stack in self.spans[order.name]:
            assert stack.grad is not None
            changes = stack.grad.unflatten(-1, (-1, m)).mean(-1)
            own = (torch.arange(stack.shape[1], device=stack.device) // m).view(1, -1, 1)
            stays = stack.grad.diagonal(dim1=1, dim2=2).unsqueeze(-1)
            found.append(changes.scatter(2, own.expand(len(stack), -1, -1), stays))
        return found

    @override
    def set_layer(self, index: int, moment: Moment | None) -> None:
        for order, group in members(self.shared, self.window, index):
            present = self.orders[order.name]
            spans = self.spans.get(order.name, []) if moment is not None else []
            hard = order.expand_rows(torch.cat([_positions(stack) for stack in spans])) if spans else None
            for linear in self.linears[group.name]:
                linear.set_order(order.expand(present), hard, order.expand_blocks(spans))

    @override
    def parameters(self) -> list[dict[str, Any]]:
        return [{"params": [span for spans in self.spans.values() for span in spans]}]

    @override
    def keep(self) -> None:
        """Nothing: the orders are as they were."""

    @override
    def state(self) -> dict[str, Any]:
        return {}

    @override
    def restore(self, state: dict[str, Any]) -> None:
        """Nothing."""


def _positions(spans: Tensor) -> Tensor:
    return torch.arange(spans.shape[1], device=spans.device).repeat(len(spans))
