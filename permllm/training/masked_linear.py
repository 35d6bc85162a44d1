"""Masked linears in the places of a model's linears while permutations or scores learn.

Masks are made in the transposed layout `(C_in, C_out)`: a channel is a contiguous row, a
permutation gathers rows, and a group of M is M consecutive rows. Forward keeps neither saliency nor
mask for backward, which recomputes both, a chunk of channels at a time.

All products have one dtype: that of the weights, or autocast's inside of
`permllm.runtime.precision.products_in`. Saliencies and masks use the weights in their own dtype.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

from torch import Tensor, nn

from permllm.models.families import ChannelGroup, linear_at
from permllm.models.offload import placement_of
from permllm.runtime.precision import product

MaskedLinear = TypeVar("MaskedLinear", bound=nn.Module)


@contextmanager
def replaced_linears(
    model: nn.Module,
    groups: Iterable[ChannelGroup],
    replacement: Callable[[ChannelGroup, str, nn.Linear], MaskedLinear],
    change: Callable[[ChannelGroup, Tensor], Tensor],
    back: Callable[[ChannelGroup, Tensor], Tensor],
) -> Iterator[dict[str, MaskedLinear]]:
    """Replace every linear of some groups inside the context; yield the masked linears by path.

    Args:
        model: model of a known family.
        groups: channel groups of the linears.
        replacement: returns the masked linear for the linear at a path; called before `change`.
        change: returns a weight in the layout for learning.
        back: returns such a weight in its original layout.
    """
    placement = placement_of(model)
    replaced: list[tuple[ChannelGroup, str, nn.Linear]] = []
    masked_linears: dict[str, MaskedLinear] = {}
    try:
        for group in groups:
            with placement.layer(group.layer):
                for path in group.members:
                    linear = linear_at(model, path)
                    masked_linears[path] = replacement(group, path, linear)
                    placement.rearrange(linear, partial(change, group))
                    replaced.append((group, path, linear))
                    model.set_submodule(path, masked_linears[path])
        yield masked_linears
    finally:
        for group, path, linear in replaced:
            placement.restore(linear, partial(back, group))
            model.set_submodule(path, linear)


def masked_product(states: Tensor, masked_t: Tensor, bias: Tensor | None) -> Tensor:
    """Return `states @ masked_t + bias`, `(tokens, C_out)`, of a masked weight `(C_in, C_out)`."""
    y = product(states, masked_t)
    if bias is not None:
        y += bias
    return y
