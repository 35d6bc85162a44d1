"""What a statistic is, and how a method is given those that it names: the classes in its `statistics`, here or anybody's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor


class InputStatistic(ABC):
    """Sums over what a channel group reads, which all of its members share.

    Args:
        channels: C_in.
        device: where the sums live.
        norm_tokens: tokens that count as one in a norm, see `InputStatistics`.
    """

    @abstractmethod
    def __init__(self, channels: int, device: torch.device | str, norm_tokens: int) -> None: ...

    @abstractmethod
    def update(self, rows: Tensor) -> None:
        """Add activations, `(tokens, C_in)`, float32 or wider."""

    @staticmethod
    def memory(channels: int) -> int:
        """Bytes that it takes for a group of so many channels, with what methods derive from it; for `plan=true`."""
        return 8 * channels


Statistics: TypeAlias = tuple[type[InputStatistic], ...]

_Kind = TypeVar("_Kind", bound=InputStatistic)


class InputStatistics:
    """The statistics that were asked for, of a channel group's inputs.

    `statistics[Norm]` is the one of a class.

    Args:
        channels: C_in.
        device: where the sums live.
        kinds: the classes.
        norm_tokens: tokens that count as one in a norm: 1, or the length of a sample for the scale of the released code of
            Wanda, RIA and PermLLM, `sqrt(sum of squares over all tokens / number of samples)`.

    Attributes:
        tokens: that were added.
    """

    def __init__(
        self, channels: int, device: torch.device | str, kinds: Iterable[type[InputStatistic]] = (), norm_tokens: int = 1
    ) -> None:
        self.tokens = 0
        self._held = {kind: kind(channels, device, norm_tokens) for kind in dict.fromkeys(kinds)}
        self._derived: dict[str, Any] = {}

    def update(self, x: Tensor) -> None:
        """Add the activations `x (..., C_in)`, any floating dtype."""
        rows = x.detach().flatten(0, -2)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self._derived.clear()
        self.tokens += rows.shape[0]
        for statistic in self._held.values():
            statistic.update(rows)

    def derived(self, name: str, compute: Callable[[], Any]) -> Any:
        """Return what follows from the inputs, computed for all members of the group the first time it is asked for."""
        if name not in self._derived:
            self._derived[name] = compute()
        return self._derived[name]

    def __getitem__(self, kind: type[_Kind]) -> _Kind:
        """The statistic of a class. Raises RuntimeError when it was not asked for."""
        found = self._held.get(kind)
        if not isinstance(found, kind):
            raise RuntimeError(f"{kind.__name__} was not asked for: the method must name it in its `statistics`")
        return found
