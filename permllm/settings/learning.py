"""Settings of gradient descent."""

import math
from dataclasses import field
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic.dataclasses import dataclass

from permllm.errors import ConfigError
from permllm.settings.values import SETTINGS, Amount, Count, Positive, Share, Whole

Loss = Literal["cosine", "kl"]
# Metadata of settings that only change memory and time.
_OF_THE_MACHINE = {"identity": lambda value: None}


class LearningPlan(NamedTuple):
    """Plan of a method that learns permutations or masks, for `plan=true`."""

    spans: list[range]  # decoder layers of each stage
    parameters: int  # that learn in all stages
    keeps_masked: bool = False  # masked weights stay in memory until backward

    @property
    def layers(self) -> int:
        """Return the number of layers that learn."""
        return sum(map(len, self.spans))

    @property
    def depth(self) -> int:
        """Return the number of layers of the largest stage."""
        return max(map(len, self.spans))


@dataclass(kw_only=True, config=SETTINGS)
class DescentSettings:
    """Settings of gradient descent through the whole model; see `conf/_descent.yaml`."""

    learning_rate: Positive
    epochs: Count
    steps: Count | None
    samples: Count | None
    batch_size: Count
    cross_entropy: Share = field(metadata={"former": [0.0]})
    micro_batch_size: Count | None = field(metadata=_OF_THE_MACHINE)
    activation_checkpointing: bool | None = field(metadata=_OF_THE_MACHINE)

    def steps_for(self, samples: int) -> int:
        """Return the number of steps in a stage that learns from `samples` windows."""
        return self.steps or self.epochs * math.ceil(samples / self.batch_size)


@dataclass(kw_only=True, config=SETTINGS)
class LearningSettings(DescentSettings):
    """Settings of gradient descent, for all layers or in stages; see `conf/_learning.yaml`.

    Attributes:
        betas, eps: of AdamW.
        clip: largest norm of all gradients together; None: no limit.
        last_rate: learning rate at the end, as a share of `learning_rate`.
    """

    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    eps: ClassVar[float] = 1e-8
    clip: ClassVar[float | None] = None
    last_rate: ClassVar[float] = 0.0

    weight_decay: Amount
    loss: Loss | None
    layers_per_stage: Literal["all"] | Count
    last_layers: Count | None
    # In the hash, null counts as 2, so that older runs keep theirs.
    select_from: Whole | None = field(
        metadata={"identity": lambda value: 2 if value is None else value}
    )
    compile: bool | None = field(metadata=_OF_THE_MACHINE)

    def __post_init__(self) -> None:
        if self.loss is None:
            self.loss = "kl" if self.layers_per_stage == "all" else "cosine"
        if self.loss == "kl" and self.layers_per_stage != "all":
            raise ValueError(
                "loss=kl needs layers_per_stage=all: only the last layer has next-token logits"
            )
        if self.loss == "cosine" and self.cross_entropy:
            raise ValueError(f"cross_entropy={self.cross_entropy} needs loss=kl")
        epochs = math.inf if self.steps else self.epochs  # steps take as many as they need
        if self.select_from is None:  # one epoch has nothing to select from
            self.select_from = 2 if epochs > 1 else 0
        if self.select_from > epochs:
            raise ValueError(f"select_from={self.select_from} is more than epochs={epochs}")

    def needs_device(self) -> str | None:
        """Return the reason why all layers must be on the device at once; None: no reason."""
        if self.activation_checkpointing is False:
            return "activation_checkpointing=false keeps all layers for backward"
        return None

    def check_last_layers(self, group: str, groups: list[Any], layers: int) -> None:
        """Raise ConfigError if the layers that learn have no pruned channel group."""
        if not any(pruned.layer in span for pruned in groups for span in self.spans(layers)):
            raise ConfigError(
                f"{group}.last_layers={self.last_layers}: keep_dense or the allocation keeps these "
                "layers dense; expected a layer that is pruned"
            )

    def spans(self, layers: int) -> list[range]:
        """Return the decoder layers of each stage of a model."""
        learning = range(layers)[-(self.last_layers or layers) :]
        size = self.layers_per_stage if isinstance(self.layers_per_stage, int) else layers
        return [learning[first : first + size] for first in range(0, len(learning), size)]
