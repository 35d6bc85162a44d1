"""Sums over the inputs of linears: the norm of each channel, and the Gram matrix."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from typing_extensions import override

from permllm.models.families import ChannelGroup, decoder_layers, linear_at
from permllm.models.offload import placement_of
from permllm.runtime import parallel


class InputStatistic(ABC):
    """Base of the statistics: sums over the inputs of a channel group.

    The arguments are those of `InputStatistics`.
    """

    @abstractmethod
    def __init__(self, channels: int, device: torch.device | str, norm_tokens: int) -> None: ...

    @abstractmethod
    def update(self, rows: Tensor) -> None:
        """Add activations, `(tokens, C_in)`, float32 or wider."""

    def all_reduce(self) -> None:
        """Sum the tensors among the attributes over all ranks; others than sums override it."""
        parallel.all_reduce(value for value in vars(self).values() if isinstance(value, Tensor))

    @staticmethod
    def memory(channels: int) -> int:
        """Return the bytes for a group of `channels`, with tensors that methods derive from it."""
        return 8 * channels


class Norm(InputStatistic):
    """Sum of squares of each channel over tokens, float64, for Wanda and RIA."""

    def __init__(self, channels: int, device: torch.device | str, norm_tokens: int) -> None:
        self._norm_tokens = norm_tokens
        self._tokens = torch.zeros((), dtype=torch.float64)
        self._square_sum = torch.zeros(channels, dtype=torch.float64, device=device)
        self._dtype = torch.float32

    @override
    def update(self, rows: Tensor) -> None:
        """Add the squares of activations, `(tokens, C_in)`."""
        self._tokens += rows.shape[0]
        self._dtype = rows.dtype
        self._square_sum += rows.square().sum(0).double()

    @property
    def value(self) -> Tensor:
        """Root mean square of each channel over tokens, times `sqrt(norm_tokens)`, `(C_in,)`.

        Its dtype is float32, or the wider dtype of the activations.
        """
        count = (self._tokens / self._norm_tokens).clamp_min(1)
        return (self._square_sum / count).sqrt().to(self._dtype)


class Gram(InputStatistic):
    """Gram matrix `X^T X`, the Hessian of a linear's squared output error (SparseGPT).

    Attributes:
        value: float32 `(C_in, C_in)`.
    """

    def __init__(self, channels: int, device: torch.device | str, norm_tokens: int) -> None:
        self.value = torch.zeros(channels, channels, dtype=torch.float32, device=device)

    @override
    def update(self, rows: Tensor) -> None:
        """Add the products of activations, `(tokens, C_in)`."""
        self.value.addmm_(rows.t().float(), rows.float())

    @staticmethod
    @override
    def memory(channels: int) -> int:
        """Return the bytes of the matrix and of four copies, which inverting it takes."""
        return 5 * 4 * channels**2


Statistics: TypeAlias = tuple[type[InputStatistic], ...]

_Kind = TypeVar("_Kind", bound=InputStatistic)


class InputStatistics:
    """Statistics of a channel group's inputs, by their classes (`statistics[Norm]`).

    Args:
        channels: C_in.
        kinds: classes of the statistics.
        norm_tokens: number of tokens that count as one in a norm. The released code of Wanda, RIA
            and PermLLM divides by windows, so that it is the length of a window.

    Attributes:
        tokens: number of tokens that were added.
    """

    def __init__(
        self,
        channels: int,
        device: torch.device | str,
        kinds: Iterable[type[InputStatistic]] = (),
        norm_tokens: int = 1,
    ) -> None:
        self.tokens = 0
        self._held = {kind: kind(channels, device, norm_tokens) for kind in dict.fromkeys(kinds)}
        self._derived: dict[str, Any] = {}

    def update(self, x: Tensor) -> None:
        """Add activations `x (..., C_in)` of any floating dtype."""
        rows = x.detach().flatten(0, -2)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.tokens += rows.shape[0]
        for statistic in self._held.values():
            statistic.update(rows)

    def all_reduce(self) -> None:
        """Combine the statistics of all ranks, which have read different windows."""
        tokens = torch.tensor(self.tokens)
        parallel.all_reduce([tokens])
        self.tokens = int(tokens)
        for statistic in self._held.values():
            statistic.all_reduce()

    def derived(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return a value that depends on all inputs; it is computed once for the whole group."""
        if name not in self._derived:
            self._derived[name] = compute()
        return self._derived[name]

    def __getitem__(self, kind: type[_Kind]) -> _Kind:
        """Return the statistic of a class in `kinds`."""
        return self._held[kind]  # type: ignore[return-value]


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
