"""The settings of the studies, apart from what they measure: reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from permllm.errors import ConfigError
from permllm.validation import check_number, check_whole

# Tokens of each sequence of a step.
SEQUENCE = 128


@dataclass(frozen=True)
class ExportMemorySettings:
    """Settings of the memory of an export.

    Attributes:
        layers: of the random model, whose other dimensions are the model's.
        shard_gb: largest file of the checkpoint and of the export, in 10^9 bytes.
    """

    layers: int = 8
    shard_gb: float = 2.0

    def __post_init__(self) -> None:
        check_whole("study.layers", self.layers, 1)
        check_number("study.shard_gb", self.shard_gb, positive=True)


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
class LCPStepSettings:
    """Settings of the times of a step of LCP.

    Attributes:
        tokens: of a step, each a multiple of 128.
        block_sizes: B of LCP.
        repeats: of each measurement after one to warm up, in turns with the others; medians are given.
        heuristic_channels: of a matrix whose scores of one position the heuristic makes, beside a loop over its groups; 0 is
            none.
    """

    tokens: list[int] = field(default_factory=lambda: [512, 2048])
    block_sizes: list[int] = field(default_factory=lambda: [32, 64, 128])
    repeats: int = 5
    heuristic_channels: int = 0

    def __post_init__(self) -> None:
        for tokens in self.tokens:
            check_whole("study.tokens", tokens, SEQUENCE)
            if tokens % SEQUENCE:
                raise ConfigError(f"study.tokens={tokens} is not a multiple of {SEQUENCE}, the tokens of a sequence")
        for size in self.block_sizes:
            check_whole("study.block_sizes", size, 4)
        check_whole("study.repeats", self.repeats, 1)
        check_whole("study.heuristic_channels", self.heuristic_channels, 0)


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
