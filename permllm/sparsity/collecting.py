"""Layers one after the other, and statistics of their inputs."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from tqdm.auto import tqdm

from permllm.models.families import ChannelGroup, decoder_layers, linear_at
from permllm.models.offload import placement_of
from permllm.sparsity.statistics import InputStatistic, InputStatistics


def by_layer(
    model: nn.Module, groups: list[ChannelGroup], label: str
) -> Iterator[tuple[int, list[ChannelGroup]]]:
    """Enter each decoder layer, with a progress bar; yield its index and its groups."""
    placement = placement_of(model)
    for index in tqdm(range(len(decoder_layers(model))), desc=label, unit="layer"):
        with placement.layer(index):
            yield index, [group for group in groups if group.layer == index]


@contextmanager
def collecting(
    model: nn.Module,
    groups: list[ChannelGroup],
    kinds: Iterable[type[InputStatistic]],
    norm_tokens: int = 1,
) -> Iterator[dict[str, InputStatistics]]:
    """Sum statistics of the inputs of each group, by its name, while layers run.

    They are complete after the context, when the ranks have combined those of their windows.
    """
    device = next(model.parameters()).device
    statistics = {}
    with ExitStack() as hooks:
        for group in groups:
            sums = InputStatistics(group.channels, device, kinds, norm_tokens)
            statistics[group.name] = sums
            # All members of a group have the same inputs.
            linear = linear_at(model, group.members[0])
            hook = linear.register_forward_pre_hook(lambda _, args, sums=sums: sums.update(args[0]))
            hooks.enter_context(hook)
        yield statistics
    for sums in statistics.values():
        sums.all_reduce()
