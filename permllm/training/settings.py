"""Settings that all learning shares, apart from what it computes: reading them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from typing_extensions import override

from permllm.errors import ConfigError, check_number, check_one_of, check_whole

Loss = Literal["cosine", "kl"]
StraightThrough = Literal["swap", "hard", "soft"]


@dataclass(kw_only=True)
class DescentSettings:
    """Settings of descent through the whole model, whatever learns.

    Attributes:
        learning_rate: of AdamW, with a cosine schedule to zero over all steps.
        epochs: over the samples, each time in an order of its own.
        steps: how many steps there are in all, over as many epochs as that takes; null is what `epochs` says.
        samples: windows of the calibration text to learn from: those of `calibration.samples` come first, further ones are
            drawn like them; null takes as many as `calibration.samples`.
        batch_size: samples a step.
        micro_batch_size: how many of them are computed at a time, to hold the activations of so few: their gradients add up to
            the same step. None computes all of a step's together.
        activation_checkpointing: recompute each decoder layer in backward; null decides by the size of the activations.
    """

    learning_rate: float = 1e-2
    epochs: int = 3
    steps: int | None = None
    samples: int | None = None
    batch_size: int = 4
    micro_batch_size: int | None = None
    activation_checkpointing: bool | None = None

    def check(self, group: str) -> None:
        """Raise ConfigError for a value that cannot work; its key is in `group`."""
        for name in ("epochs", "batch_size"):
            check_whole(f"{group}.{name}", getattr(self, name), 1)
        check_number(f"{group}.learning_rate", self.learning_rate, positive=True)
        for name in ("steps", "samples", "micro_batch_size"):
            if getattr(self, name) is not None:
                check_whole(f"{group}.{name}", getattr(self, name), 1)


@dataclass(kw_only=True)
class LearningSettings(DescentSettings):
    """Settings of descent that may go through some layers at a time.

    Attributes:
        weight_decay: of AdamW.
        loss: `kl` of the next-token distributions, which needs `layers_per_stage=all`, or `cosine` of the stage's output (the
            paper). None is `kl` where the whole model learns together, else `cosine`.
        layers_per_stage: how many consecutive decoder layers learn together: `all` of them (the paper), 1, or so many. Stages
            learn in turn, each on the inputs that the pruned layers before give it, against its own dense output, in the
            memory of its layers alone.
        last_layers: learn only the last so many decoder layers; None learns all.
        select_from: after each of the last so many epochs the loss of all samples is measured with what was learned so far,
            and the best is the result; 0 takes the last one and measures nothing. Losses during an epoch do not tell: each
            step has its own state and its own samples.
        compile: compile the elementwise work of the masked linears and of `kl`, which takes 10 to 20 seconds each; None does
            it where that is soon made up for. Without a compiler the step is the slower one.
    """

    weight_decay: float = 0.0
    loss: Loss | None = None
    layers_per_stage: int | str = "all"
    last_layers: int | None = None
    select_from: int = 2
    compile: bool | None = None

    @classmethod
    def of(cls, descent: DescentSettings, **more: Any) -> LearningSettings:
        """The settings of a descent, and what else is to be said."""
        return cls(**{field.name: getattr(descent, field.name) for field in fields(DescentSettings)}, **more)

    @override
    def check(self, group: str) -> None:
        """Set the loss that follows, and raise ConfigError for a value that cannot work; its key is in `group`."""
        if self.loss is None:
            self.loss = "kl" if self.layers_per_stage == "all" else "cosine"
        check_one_of(f"{group}.loss", self.loss, get_args(Loss))
        if self.layers_per_stage != "all":
            if not isinstance(self.layers_per_stage, int):
                raise ConfigError(
                    f"{group}.layers_per_stage={self.layers_per_stage!r} is not valid; valid are: all, a number of layers"
                )
            check_whole(f"{group}.layers_per_stage", self.layers_per_stage, 1)
            if self.loss == "kl":
                raise ConfigError(
                    f"{group}.loss=kl needs {group}.layers_per_stage=all: only the last layer has next-token logits"
                )
        super().check(group)
        check_whole(f"{group}.select_from", self.select_from, 0)
        check_number(f"{group}.weight_decay", self.weight_decay, positive=False)
        if self.last_layers is not None:
            check_whole(f"{group}.last_layers", self.last_layers, 1)

    def spans(self, layers: int) -> list[tuple[int, int]]:
        """First layer and the one after the last of each stage, for a model of so many decoder layers."""
        first = max(0, layers - self.last_layers) if self.last_layers is not None else 0
        size = self.layers_per_stage if isinstance(self.layers_per_stage, int) else layers
        return [(start, min(start + size, layers)) for start in range(first, layers, size)]
