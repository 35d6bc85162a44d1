"""The settings of the studies, apart from what they measure: reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from permllm.validation import check_whole


@dataclass(frozen=True)
class LayerRuntimeSettings:
    """Settings of the run times of a layer.

    Attributes:
        tokens: rows of the activations.
        repeats: of each measurement, in turns with the others; medians are given.
    """

    tokens: int = 2048
    repeats: int = 9

    def __post_init__(self) -> None:
        check_whole("study.tokens", self.tokens, 1)
        check_whole("study.repeats", self.repeats, 1)


@dataclass(frozen=True)
class SaliencyAndErrorSettings:
    """Settings of the scatter of many orders of one layer's channels.

    Attributes:
        layer: index of the decoder layer; None is the middle one.
        group: name of the channel group in it, as `plan=true` lists them; None is the last one, the MLP's output.
        random: random orders, and as many of the heuristic's with some channels shuffled.
        swaps: random swaps tried in each search, for more saliency and, from both starts, for less error.
        trace: orders kept along the way of the swaps.
    """

    layer: int | None = None
    group: str | None = None
    random: int = 200
    swaps: int = 4000
    trace: int = 60

    def __post_init__(self) -> None:
        for name in ("random", "swaps", "trace"):
            check_whole(f"study.{name}", getattr(self, name), 1)
