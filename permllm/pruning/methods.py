"""Methods of a job, checked before the job computes, and the problems that they learn from."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from permllm.allocation.base import Allocation
from permllm.errors import ConfigError
from permllm.mask.base import Mask
from permllm.models.checkpoint import check_dense
from permllm.models.families import ChannelGroup, channel_groups, decoder_layers
from permllm.models.layers import Teacher
from permllm.models.load import LoadedModel
from permllm.models.selection import pruned_groups
from permllm.permutation.base import Permutation
from permllm.pruner.base import Pruner
from permllm.reconstruction.base import Reconstruction
from permllm.runtime import parallel
from permllm.settings.config import LEARNING, METHOD_GROUPS, RunConfig, check_divides
from permllm.settings.learning import LearningSettings
from permllm.sparsity.method import Method, instantiate
from permllm.sparsity.saliency import SaliencyFactors
from permllm.store.directory import Record
from permllm.store.loggers import RunLogger
from permllm.training.problem import LearningProblem

log = logging.getLogger(__name__)

# Most bytes of dense states that are stored for a method to learn from; a `Teacher` computes more.
MOST_STATES = 4e9
# Base class of the methods of each group.
METHODS = {
    "pruner": Pruner,
    "allocation": Allocation,
    "permutation": Permutation,
    "mask": Mask,
    "reconstruction": Reconstruction,
}


@dataclass(frozen=True)
class Methods:
    """Methods of a job.

    Attributes:
        pruner: the base pruner.
        allocation: method that keeps more linears dense than `keep_dense`; None: nothing does.
        permutation: method that finds the permutation of each channel group; None: the identity.
        mask: method that finds the masks; None: the pruner chooses them.
        reconstruction: method that changes the kept weights; None: nothing does.
    """

    pruner: Pruner
    allocation: Allocation | None = None
    permutation: Permutation | None = None
    mask: Mask | None = None
    reconstruction: Reconstruction | None = None

    @property
    def all(self) -> list[Method]:
        """All methods that there are, in the order of the attributes."""
        return [method for method in vars(self).values() if method is not None]

    @property
    def change_weights(self) -> bool:
        """Tell whether the kept weights differ from the dense model's."""
        return self.pruner.updates_weights or self.reconstruction is not None

    @property
    def learned(self) -> dict[str, Any]:
        """Return the methods that train, by group."""
        methods = {group: getattr(self, group) for group in LEARNING}
        return {group: method for group, method in methods.items() if method and method.learned}

    def extra_windows(self, calibration: int) -> int:
        """Return how many windows methods learn from beyond the `calibration` first ones."""
        return max(windows_for(method, calibration).stop for method in self.all) - calibration

    @property
    def needs_device(self) -> str | None:
        """Return the reason why all weights must be on the device at once; None: no reason."""
        return next((reason for method in self.all if (reason := method.needs_device())), None)


@dataclass(frozen=True)
class ModelGroups:
    """Channel groups of a model.

    Attributes:
        every: all groups of the decoder layers.
        pruned: groups that a job prunes, with the members to prune.
    """

    every: list[ChannelGroup]
    pruned: list[ChannelGroup]


@dataclass
class Job:
    """Parts of a job that its phases work on.

    Attributes:
        config: settings of the job.
        methods: methods of the settings.
        record: results of the job, in a run directory or in memory.
        logger: logger of the job's measures.
        loaded: the model, dense until it is pruned.
        groups: channel groups of the model.
        compute_dtype: dtype of matrix products before the evaluation.
        windows: int64 `(windows, tokens)`, the calibration windows and then the extra windows from
            which methods learn; empty: nothing is left to prune.
    """

    config: RunConfig
    methods: Methods
    record: Record
    logger: RunLogger
    loaded: LoadedModel
    groups: ModelGroups
    compute_dtype: torch.dtype
    windows: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def is_layerwise(self) -> bool:
        """Tell whether each layer is calibrated, and permuted, only while it is pruned."""
        permutation = self.methods.permutation
        is_local = permutation is None or permutation.local
        return self.config.calibration.statistics == "sequential" and is_local

    @property
    def device(self) -> torch.device:
        """Return the device of the model."""
        return self.loaded.model.device

    @property
    def window_bytes(self) -> int:
        """Return the bytes of the states of a window."""
        model = self.loaded.model
        return int(self.windows.shape[1] * model.config.hidden_size * model.dtype.itemsize)

    def rounded(self, weight: Tensor) -> Tensor:
        """Return a changed weight, rounded to the dtype of the record (`model.dtype`)."""
        return weight.to(getattr(torch, self.config.model.dtype))


def methods_of(config: RunConfig) -> Methods:
    """Return the methods that the settings name.

    Raises:
        ConfigError: a method cannot be made, or its settings and those of the run contradict each
            other.
    """
    methods_by_group: dict[str, Any] = {}
    for group, base in METHODS.items():
        settings = getattr(config, group)
        method = instantiate(group, settings)
        if method is None and group != "pruner":
            continue
        if not isinstance(method, base):
            kind = f"{base.__module__}.{base.__name__}"
            raise ConfigError(f"{group}={settings.get('name')}: expected a subclass of {kind}")
        statistics = config.calibration.statistics
        if method.needs_dense_statistics and statistics != "dense":
            raise ConfigError(
                f"calibration.statistics={statistics} is not valid with "
                f"{group}={settings.get('name')}; expected dense"
            )
        method.validate(config)
        methods_by_group[group] = method
    methods = Methods(**methods_by_group)
    if methods.needs_device and config.model.placement not in ("auto", "device"):
        raise ConfigError(f"{methods.needs_device}, which needs model.placement=device")
    if config.model.placement == "sharded" and parallel.world_size() == 1 and not config.plan:
        raise ConfigError(
            "model.placement=sharded needs several processes: "
            "torchrun --nproc-per-node 2 run.py model.placement=sharded"
        )
    return methods


def checked_groups(config: RunConfig, methods: Methods, model: PreTrainedModel) -> ModelGroups:
    """Return the channel groups of a model.

    Raises:
        ConfigError: the model is already pruned, M does not divide a group's channels, or a method
            cannot work on the model.
    """
    check_dense(config.model.path or config.model.name, model.config)
    every = channel_groups(model)
    groups = ModelGroups(every, pruned_groups(every, config.keep_dense))
    check_groups(config, methods, model, groups)
    return groups


def check_groups(
    config: RunConfig, methods: Methods, model: PreTrainedModel, groups: ModelGroups
) -> None:
    """Raise ConfigError if M does not divide some channels, or a method cannot take the groups."""
    for group in groups.pruned:
        check_divides(config.pattern, group.channels, group.name)
    for method in methods.all:
        method.check_groups(config, groups.pruned, len(decoder_layers(model)))


def windows_for(method: Method, calibration: int) -> slice:
    """Return the windows of the text that a method learns from.

    Args:
        method: the method.
        calibration: number of calibration windows, the first ones of the text.
    """
    start = method.skip or 0
    return slice(start, start + (method.samples or calibration))


def needs_teacher(method: Method, calibration: int, window_bytes: int, streams: bool) -> bool:
    """Tell whether a `Teacher` computes the dense states that a method learns from.

    It does if they are too large to be stored, and its copy of the layers fits on the device.

    Args:
        method: the method.
        calibration: number of calibration windows.
        window_bytes: bytes of the states of a window.
        streams: the placement streams weights to the device.
    """
    span = windows_for(method, calibration)
    return not streams and (span.stop - span.start) * window_bytes > MOST_STATES


def stored_windows(
    methods: Iterable[Method], calibration: int, window_bytes: int, streams: bool
) -> int:
    """Return how many windows, the first of the text, need stored dense states for some methods.

    The arguments are those of `needs_teacher`.
    """
    stops = [
        windows_for(method, calibration).stop
        for method in methods
        if not needs_teacher(method, calibration, window_bytes, streams)
    ]
    return max([calibration, *stops])


def learning_problem(
    job: Job,
    group: str,
    factors: Mapping[str, SaliencyFactors],
    target: Tensor | Teacher,
) -> LearningProblem:
    """Return the problem of a method, which writes steps and epochs to the record and the logger.

    Args:
        job: job of the method.
        group: group of the method.
        factors: saliency factors of the linears, from the calibration windows.
        target: dense output of the last layer for the windows that the method learns from,
            `(windows, tokens, hidden)`, or its teacher.
    """
    config, record, logger = job.config, job.record, job.logger
    samples = config.calibration.samples
    steps = sum(_steps_of(job, before) for before in METHOD_GROUPS[: METHOD_GROUPS.index(group)])
    earlier = [line for line in record.history if line.get("group") != group]

    def on_epoch(values: dict[str, Any]) -> None:
        line = {"group": group, **values}
        record.write_history([*record.history, line])
        logger.log_epoch(line, len(record.history))

    def on_resume(epochs: list[dict[str, Any]]) -> None:
        lines = [{"group": group, **values} for values in epochs]
        record.write_history([*earlier, *lines])

    return LearningProblem(
        model=job.loaded.model,
        groups=job.groups.pruned,
        tokens=job.windows[windows_for(getattr(job.methods, group), samples)],
        factors=dict(factors),
        target=target,
        calibration=job.windows[:samples],
        pattern=config.pattern,
        seed=config.seed,
        calibration_batch_size=config.calibration.batch_size,
        directory=record.directory,
        on_step=lambda step, values: logger.log(group, values, steps + step),
        on_epoch=on_epoch,
        on_resume=on_resume,
    )


def _steps_of(job: Job, group: str) -> int:
    method = getattr(job.methods, group)
    if not isinstance(method, LearningSettings):
        return 0
    count = method.samples or job.config.calibration.samples
    stages = len(method.spans(len(decoder_layers(job.loaded.model))))
    return stages * method.steps_for(count)
