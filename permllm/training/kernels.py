"""The elementwise work of a masked linear on a piece of its channels: saliency, mask, and what gradients are made of.

Two forms of the same mathematics. As whole tensors it is a dozen passes over memory, which is the best that eager execution
can do. Place by place, as M slices that never meet until the end, a compiler turns it into one pass; written as whole tensors
it cannot, because it does not vectorise a softmax or a stack across the places of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from permllm.config import NMPattern
from permllm.models.families import ChannelGroup
from permllm.runtime.compiling import usable
from permllm.runtime.precision import product_dtype
from permllm.sparsity.nm import keep_largest, keep_largest_of, ranks_of
from permllm.sparsity.saliency import SaliencyFactors, saliency_t
from permllm.training.problem import LearningProblem
from permllm.training.settings import LearningSettings

# Weights times steps. Compiling takes 10 to 20 s and saves some 100 ns a weight and step on two cores; with wide groups one or
# two minutes, and saves half of that.
_COMPILE_FROM, _COMPILE_WIDE_FROM = 4e8, 2.5e9


def _wide(pattern: NMPattern, device_type: str) -> bool:
    """Whether a CPU has fewer registers than a compiled mask has comparisons: it is slower than one of whole tensors then."""
    return pattern.m > 8 and device_type == "cpu"


class Exchange(NamedTuple):
    """What it takes to say how the loss changes when channels change groups: k channels in g = k / M groups of M.

    `next` is the entry of a row of the group that would be kept if one that is kept went away, and `last` the smallest that is
    kept: what a newcomer displaces, depending on whether the one whose place it takes was kept.

    Attributes:
        masked: the piece times its mask, `(k, C_out)`.
        saliency: `(k, C_out)`.
        gradient: of the mask, kept or not, `(k, C_out)`.
        last: saliency of the smallest kept entry, `(g, C_out)`.
        next: saliency of the largest that is not kept, `(g, C_out)`.
        last_gradient, next_gradient: gradients of the mask at these entries, `(g, C_out)`.
        stay: what each channel changes in its own group, `(k,)`.
    """

    masked: Tensor
    saliency: Tensor
    gradient: Tensor
    last: Tensor
    next: Tensor
    last_gradient: Tensor
    next_gradient: Tensor
    stay: Tensor


@dataclass(frozen=True)
class Kernels:
    """All kernels of a masked linear.

    Arguments of each:

    weight_t `(C_in, C_out)`, channels int64 `(k,)`: the piece is `w = weight_t[channels]`, whole groups of M.
    power, column `(K, k)`, row `(K, C_out)` or None: the saliency factors of the piece; `(C_out, k)` of a dense score.
    n, m: the pattern.
    dtype: of what is returned; saliencies and masks are made in the dtype of the saliency.

    Attributes:
        mask: the piece times its N:M mask, `(k, C_out)`.
        select: takes a piece itself, its scores, both `(k, C_out)`, n, m and dtype: the piece times the mask of the scores.
        gradient: takes before `n` also `grad`, `(C_in, C_out)`, the gradient of the masked weight_t, and at the end also
            `hard`, bool: which mask is given back. Returns the piece times its mask; the saliency; the gradient of the
            saliency; the gradient of the mask; the mask, hard or soft.
        exchanges: takes before `n` also `grad`, as `gradient` does, and at the end also `size` (B). Returns the piece times
            its mask, and `(k / B, B, B / M)`: for each channel of a block and each group of it the change of the linearised
            loss if the channel took the place of a random member of the group, and for its own group the change if it stayed
            instead of being taken away. Only the former is in `dtype`.
        cpu_piece: number of weights to pass at a time on a CPU.
    """

    mask: Callable[..., Tensor]
    select: Callable[[Tensor, Tensor, int, int, torch.dtype], Tensor]
    gradient: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    exchanges: Callable[..., tuple[Tensor, Tensor]]
    cpu_piece: int

    def piece(self, device_type: str) -> int:
        """Number of weights to pass at a time. A GPU needs enough to hide the launches, yet little against a layer."""
        return self.cpu_piece if device_type == "cpu" else 1 << 25


def _mask(
    weight_t: Tensor, channels: Tensor, power: int, column: Tensor, row: Tensor | None, n: int, m: int, dtype: torch.dtype
) -> Tensor:
    w = weight_t.index_select(0, channels)
    s = saliency_t(w, SaliencyFactors(power, column, row))
    return _select(w, s, n, m, dtype)


def _select(w: Tensor, scores: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
    keep = keep_largest(scores.unflatten(0, (-1, m)), n, dim=1).flatten(0, 1)
    return torch.where(keep, w, 0.0).to(dtype)


def _gradient(
    weight_t: Tensor,
    channels: Tensor,
    power: int,
    column: Tensor,
    row: Tensor | None,
    grad: Tensor,
    n: int,
    m: int,
    dtype: torch.dtype,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    w = weight_t.index_select(0, channels)
    s = saliency_t(w, SaliencyFactors(power, column, row))
    groups = s.unflatten(0, (-1, m))
    keep = keep_largest(groups, n, dim=1).flatten(0, 1)
    grad_mask = grad.index_select(0, channels).to(s.dtype).mul_(w)
    soft_mask = groups.softmax(1)
    grad_s = grad_mask.view_as(groups) * soft_mask
    grad_s -= soft_mask * grad_s.sum(1, keepdim=True)
    mask = keep if hard else soft_mask.flatten(0, 1)
    return (
        w.mul_(keep).to(dtype),
        s.to(dtype),
        grad_s.flatten(0, 1).to(dtype),
        grad_mask.to(dtype),
        mask.to(dtype),
    )


def _places(t: Tensor, m: int) -> list[Tensor]:
    return [t[place::m] for place in range(m)]


def _join(places: list[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack([place.to(dtype) for place in places], 1).flatten(0, 1)


def _saliency_places(w: list[Tensor], power: int, column: Tensor, row: Tensor | None) -> list[Tensor]:
    m = len(w)
    return [saliency_t(part, SaliencyFactors(power, column[:, place::m], row)) for place, part in enumerate(w)]


def _mask_by_places(
    weight_t: Tensor, channels: Tensor, power: int, column: Tensor, row: Tensor | None, n: int, m: int, dtype: torch.dtype
) -> Tensor:
    w = _places(weight_t.index_select(0, channels), m)
    return _selected(w, _saliency_places(w, power, column, row), n, dtype)


def _select_by_places(w: Tensor, scores: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
    return _selected(_places(w, m), _places(scores, m), n, dtype)


def _selected(w: list[Tensor], scores: list[Tensor], n: int, dtype: torch.dtype) -> Tensor:
    keep = keep_largest_of(scores, n)
    return _join([torch.where(kept, part, 0.0) for kept, part in zip(keep, w, strict=True)], dtype)


def _gradient_by_places(
    weight_t: Tensor,
    channels: Tensor,
    power: int,
    column: Tensor,
    row: Tensor | None,
    grad: Tensor,
    n: int,
    m: int,
    dtype: torch.dtype,
    hard: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    w = _places(weight_t.index_select(0, channels), m)
    s = _saliency_places(w, power, column, row)
    keep = keep_largest_of(s, n)
    grad_mask = [
        part.to(s[0].dtype) * weight for part, weight in zip(_places(grad.index_select(0, channels), m), w, strict=True)
    ]
    largest = s[0]
    for part in s[1:]:
        largest = torch.maximum(largest, part)
    exponentials = [(part - largest).exp() for part in s]
    total = sum(exponentials[1:], exponentials[0])
    soft_mask = [part / total for part in exponentials]
    products = [grad_part * soft for grad_part, soft in zip(grad_mask, soft_mask, strict=True)]
    mean = sum(products[1:], products[0])
    grad_s = [product - soft * mean for product, soft in zip(products, soft_mask, strict=True)]
    masked = [torch.where(kept, part, 0.0) for kept, part in zip(keep, w, strict=True)]
    return (
        _join(masked, dtype),
        _join(s, dtype),
        _join(grad_s, dtype),
        _join(grad_mask, dtype),
        _join(keep if hard else soft_mask, dtype),
    )


def _exchange_by_places(
    weight_t: Tensor,
    channels: Tensor,
    power: int,
    column: Tensor,
    row: Tensor | None,
    grad: Tensor,
    n: int,
    m: int,
    dtype: torch.dtype,
) -> Exchange:
    w = _places(weight_t.index_select(0, channels), m)
    s = _saliency_places(w, power, column, row)
    ranks = ranks_of(s)
    d = [part.to(s[0].dtype) * weight for part, weight in zip(_places(grad.index_select(0, channels), m), w, strict=True)]

    def at(rank: int, places: list[Tensor]) -> Tensor:
        picked = [torch.where(found == rank, part, 0.0) for found, part in zip(ranks, places, strict=True)]
        return sum(picked[1:], picked[0])

    next_d = at(n, d)
    stay = [torch.where(found < n, part - next_d, 0.0).sum(-1) for found, part in zip(ranks, d, strict=True)]
    masked = [torch.where(found < n, part, 0.0) for found, part in zip(ranks, w, strict=True)]
    return Exchange(
        masked=_join(masked, dtype),
        saliency=_join(s, s[0].dtype),
        gradient=_join(d, s[0].dtype),
        last=at(n - 1, s),
        next=at(n, s),
        last_gradient=at(n - 1, d),
        next_gradient=next_d,
        stay=torch.stack(stay, 1).flatten(),
    )


def _joining(s: Tensor, d: Tensor, threshold: Tensor, displaced: Tensor) -> Tensor:
    return torch.where(s > threshold, d - displaced, 0.0)


def _foreign(piece: list[Tensor], kept: float) -> Tensor:
    """Changes in other groups, `(k / B, B, B / M)`. The place taken was that of a kept entry in a share `kept` of the rows."""
    s, d, last, next_, last_d, next_d = piece
    s, d = s.unsqueeze(2), d.unsqueeze(2)
    change = _joining(s, d, last.unsqueeze(1), last_d.unsqueeze(1)) * (1.0 - kept)
    return (change + _joining(s, d, next_.unsqueeze(1), next_d.unsqueeze(1)) * kept).sum(-1)


def _foreign_by_group(piece: list[Tensor], kept: float) -> Tensor:
    """The same without a tensor of `(k / B, B, B / M, C_out)`, which only a compiler can do without."""
    s, d, *groups = piece
    parts = [_foreign([s, d, *[part[:, index : index + 1] for part in groups]], kept) for index in range(groups[0].shape[1])]
    return torch.cat(parts, 2)


def _thresholds_by_places(*piece: Any) -> tuple[Tensor, ...]:
    """Of an `Exchange` what is of groups, or returned: its masked weight, thresholds, their gradients, and what stays."""
    exchange = _exchange_by_places(*piece)
    return exchange.masked, *exchange[3:]


def _foreign_anew(arguments: list[Any], groups: list[Tensor], size: int, kept: float) -> Tensor:
    """`_foreign`, with saliency and gradient made again from 4 bytes a weight in half precision instead of read in 8."""
    weight_t, channels, power, column, row, grad = arguments
    w = weight_t.index_select(0, channels)
    s = saliency_t(w, SaliencyFactors(power, column, row))
    d = grad.index_select(0, channels).to(s.dtype) * w
    return _foreign([part.view(len(w) // size, -1, part.shape[-1]) for part in (s, d, *groups)], kept)


def _with_own(foreign: Tensor, stay: Tensor, m: int) -> Tensor:
    """Changes in other groups, those in the own group in their places."""
    blocks, _, groups = foreign.shape
    own = foreign.view(blocks, groups, m, groups).diagonal(dim1=1, dim2=3)  # (blocks, M, groups)
    own.copy_(stay.view(blocks, groups, m).mT)
    return foreign


def _exchanges_with(
    exchange: Callable[..., Exchange], foreign: Callable[[list[Tensor], float], Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Where what one kernel writes is still in a cache when the next one reads it."""

    def exchanges(*arguments: Any) -> tuple[Tensor, Tensor]:
        *piece, n, m, dtype, size = arguments
        found = exchange(*piece, n, m, dtype)
        parts = [part.view(len(found.saliency) // size, -1, part.shape[-1]) for part in found[1:7]]
        return found.masked, _with_own(foreign(parts, n / m), found.stay, m)

    return exchanges


def _exchanges_anew(
    thresholds: Callable[..., tuple[Tensor, ...]], foreign: Callable[..., Tensor]
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Where it is not, as on a GPU, whose time goes into reading and writing."""

    def exchanges(*arguments: Any) -> tuple[Tensor, Tensor]:
        *piece, n, m, dtype, size = arguments
        masked, *groups, stay = thresholds(*piece, n, m, dtype)
        return masked, _with_own(foreign(piece, groups, size, n / m), stay, m)

    return exchanges


# The temporaries of a dozen passes should stay in a core's second-level cache.
EAGER = Kernels(_mask, _select, _gradient, _exchanges_with(_exchange_by_places, _foreign_by_group), cpu_piece=1 << 17)


@dataclass(frozen=True)
class KernelUse:
    """What kernels are wanted for.

    Attributes:
        device_type: `cpu` or `cuda`.
        straight_through: which gradient of an order (see `permllm.training.masked_linear`); None where none learns.
        pattern: N:M.
        weights, products: dtype of the weights, and of what is returned.
        power: of the weights in the saliency; 0 where it is given as it is.
        row: the saliency has row factors.
        dense: it has a factor for each weight.
    """

    device_type: str
    straight_through: str | None = "swap"
    pattern: NMPattern = NMPattern(2, 4)  # noqa: RUF009 - frozen
    weights: torch.dtype = torch.float32
    products: torch.dtype = torch.float32
    power: int = 1
    row: bool = False
    dense: bool = False


@cache
def compiled_kernels(use: KernelUse) -> Kernels | None:
    """The kernels, compiled; None, with a warning, where this machine cannot (no compiler, for one)."""
    return usable(lambda: _tried(_compiled(use), use), use.device_type, "learning runs without compiled kernels")


def _compiled(use: KernelUse) -> Kernels:
    # Without fullgraph: where the recompile limit is reached, a call runs as it stands instead of raising.
    cached = use.device_type == "cpu"
    forms: tuple[Any, ...] = (_mask_by_places, _select_by_places, _gradient_by_places)
    forms += (_exchange_by_places, _foreign) if cached else (_thresholds_by_places, _foreign_anew)
    mask, select, gradient, *of_exchanges = (_in_any_thread(torch.compile(form, dynamic=True)) for form in forms)

    def mask_of(*piece: Any) -> Tensor:
        *_, n, m, _ = piece
        return _mask(*piece) if _wide(NMPattern(n, m), use.device_type) else mask(*piece)

    def select_of(w: Tensor, scores: Tensor, n: int, m: int, dtype: torch.dtype) -> Tensor:
        form = _select if _wide(NMPattern(n, m), use.device_type) else select
        return form(w, scores, n, m, dtype)

    exchanges = (_exchanges_with if cached else _exchanges_anew)(*of_exchanges)
    return Kernels(mask_of, select_of, gradient, exchanges, cpu_piece=1 << 20)


def _in_any_thread(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with autocast's cache switched off, as `products_in` does and the thread of a GPU's backward does not know.

    The compiler guards on it, and would compile once more, in backward.
    """

    def run(*arguments: Any) -> Any:
        before = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        try:
            return compiled(*arguments)
        finally:
            torch.set_autocast_cache_enabled(before)

    return run


def _tried(kernels: Kernels, use: KernelUse) -> Kernels:
    """The same kernels, after each that a step will use has run on a small piece."""
    n, m = use.pattern.n, use.pattern.m
    # No two sizes alike, nor one tensor twice: the compiler would take them for one, and compile again where they are not.
    blocks, size, rows, terms = 3, 2 * m, 5 * m, 2 if use.row else 1
    options: dict[str, Any] = {"dtype": torch.float32, "device": use.device_type}
    # A piece has fewer channels than the weight, and its gradient, that it is taken from.
    whole = (blocks + 1) * size + m
    weight_t = torch.ones(whole, rows, **options | {"dtype": use.weights})
    channels = torch.arange(blocks * size, device=use.device_type)
    row = torch.ones(terms, rows, **options) if use.row else None
    column = torch.ones(blocks * size, rows, **options).t() if use.dense else torch.ones(terms, blocks * size, **options)
    piece = (weight_t, channels, use.power, column, row)
    grad = torch.ones(whole, rows, **options | {"dtype": use.products})
    if use.straight_through is None:
        kernels.select(weight_t, torch.ones_like(weight_t, dtype=torch.float32), n, m, use.products)
    else:
        kernels.mask(*piece, n, m, use.products)
    if use.straight_through == "swap":
        kernels.exchanges(*piece, grad, n, m, use.products, size)
    elif use.straight_through is not None:
        kernels.gradient(*piece, grad, n, m, use.products, use.straight_through == "hard")
    return kernels


def chosen_kernels(
    settings: LearningSettings,
    problem: LearningProblem,
    groups: Iterable[ChannelGroup],
    steps: int,
    straight_through: str | None,
) -> Kernels:
    """Compiled kernels where `settings.compile` asks for them, or compiling is soon made up for; else eager ones.

    The kernels of any pattern serve all; each is compiled for every pattern of the groups before it is used.

    Args:
        settings: of the descent.
        problem: what is learned from.
        groups: whose linears are masked.
        steps: how many there will be.
        straight_through: as in `KernelUse`; where none learns, the scores are a number for each weight.
    """
    groups = list(groups)
    patterns = list(dict.fromkeys(map(problem.pattern_of, groups)))
    narrow = [pattern for pattern in patterns if not _wide(pattern, problem.device.type)]
    wanted = settings.compile
    if wanted is None:
        weights = sum(group.channels * sum(group.rows) for group in groups)
        wanted = steps * weights > (_COMPILE_FROM if narrow == patterns else _COMPILE_WIDE_FROM)
    of_weights = straight_through is None  # the mask alone
    if of_weights:
        patterns = narrow
    if not wanted or not patterns:
        return EAGER
    path = problem.groups[0].members[0]
    factors, model_weight = problem.factors[path], next(problem.model.parameters())
    use = KernelUse(
        model_weight.device.type,
        straight_through,
        weights=model_weight.dtype,
        products=product_dtype(model_weight),
        power=0 if of_weights else factors.power,
        row=factors.row is not None and not of_weights,
        dense=factors.dense or of_weights,
    )
    made = [kernels for pattern in patterns if (kernels := compiled_kernels(replace(use, pattern=pattern)))]
    return made[0] if len(made) == len(patterns) else EAGER
