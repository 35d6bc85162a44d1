"""Stages that find the permutation of each channel group, and the masks if the pruner does not choose them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm.config import RunConfig, windows_learned_from
from permllm.errors import ConfigError
from permllm.models.families import ChannelGroup, decoder_layers
from permllm.models.load import LoadedModel
from permllm.permutation.base import checked_order
from permllm.pruning.kept_weights import WEIGHTS_LEARNED
from permllm.pruning.methods import Job
from permllm.runs.directory import Record
from permllm.runs.loggers import RunLogger
from permllm.runs.names import MASKS, PERMUTATIONS
from permllm.runs.tensors import load_masks, load_orders, save_masks, save_tensors
from permllm.runtime.precision import products_in
from permllm.sparsity.calibrate import DenseCalibration, Pruner, shared_calibration, shared_target
from permllm.training.problem import LearningProblem
from permllm.training.settings import LearningSettings

# In a line of the history where masks learn.
_MASKS = "mask_flips"


def calibrate(
    config: RunConfig, loaded: LoadedModel, tokens: Tensor, pruner: Pruner, products: torch.dtype
) -> DenseCalibration:
    """Calibrate the dense model; all linears, so that jobs which keep some of them dense share the result."""
    norm_tokens = tokens.shape[1] if config.permutation.get("conventions") == "paper" else 1
    batch_size = config.calibration.batch_size
    return shared_calibration(loaded, tokens, pruner, config.pruner, batch_size, products, norm_tokens)


def target_of_all(job: Job, drawn: Tensor, target: Tensor) -> Tensor:
    """Return the target of the calibration samples, and of the further samples that learning asks for.

    Args:
        job: of the dense model.
        drawn: int64 `(samples, length)`, those of the calibration first.
        target: of the former, `(calibration samples, length, hidden)`.
    """
    asked = (windows_for(method, job.config.calibration.samples).stop for method in job.methods.learned.values())
    further = slice(len(target), max(asked, default=0))
    if further.stop <= further.start:
        return target
    whole = target.new_empty(len(drawn), *target.shape[1:])  # only samples that are asked for are filled
    whole[: len(target)] = target
    whole[further] = shared_target(job.loaded, drawn[further], job.config.calibration.batch_size, job.products)
    return whole


def windows_for(method: object, calibration: int) -> slice:
    """Return the windows of the text that a method learns from; the first `calibration` ones are those of the calibration."""
    return windows_learned_from(getattr(method, "samples", None), getattr(method, "skip", None), calibration)


def learning_problem(
    config: RunConfig,
    loaded: LoadedModel,
    groups: list[ChannelGroup],
    drawn: Tensor,
    dense: DenseCalibration,
    directory: Path | None = None,
    chosen: slice | None = None,
) -> LearningProblem:
    """Return the problem of a method that learns from the whole model; its checkpoint goes into the directory.

    Args:
        config: of the job.
        loaded: the dense model.
        groups: that are pruned.
        drawn: int64 `(samples, length)`, those of the calibration first.
        dense: what the dense model tells, of those that are learned from too.
        directory: None keeps no checkpoint.
        chosen: windows to learn from; None is those of the calibration.
    """
    chosen = chosen or slice(0, config.calibration.samples)
    return LearningProblem(
        model=loaded.model,
        groups=groups,
        tokens=drawn[chosen],
        factors=dense.factors,
        target=dense.target[chosen],
        pattern=config.pattern,
        seed=config.seed,
        calibration_batch_size=config.calibration.batch_size,
        calibration=drawn[: config.calibration.samples],
        directory=directory,
    )


def found_orders(job: Job, drawn: Tensor, dense: DenseCalibration) -> Mapping[str, Tensor]:
    """Return the orders of the channel groups, int64 `(C_in,)` by their names.

    Args:
        job: whose record and logger learn of what is found.
        drawn: int64 `(samples, length)`, those of the calibration first.
        dense: what the dense model tells.
    """
    with job.record.stage("permute", job.device):
        chosen = windows_for(job.methods.permutation, job.config.calibration.samples)
        problem = learning_problem(job.config, job.loaded, job.groups, drawn, dense, job.record.directory, chosen)
        _tell(job, problem)
        with products_in(job.products, job.device):
            return _all_orders(job, problem)


def _all_orders(job: Job, problem: LearningProblem) -> dict[str, Tensor]:
    permutation, key = job.methods.permutation, job.permutation_key

    def compute() -> dict[str, Tensor]:
        found = permutation.orders(problem)
        if not isinstance(found, Mapping):
            kind = type(found).__name__
            raise ConfigError(f"{key}: `orders` must give a dict of orders by channel group, and it gave a {kind}")
        return {group.name: checked_order(key, group.name, group.channels, found.get(group.name)) for group in job.groups}

    return job.record.kept(PERMUTATIONS, compute, save_tensors, load_orders)


def found_masks(job: Job, drawn: Tensor, dense: DenseCalibration, orders: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """Return the masks of all linears; None: the pruner chooses them.

    Args:
        job: whose record and logger learn of what is found.
        drawn: int64 `(samples, length)`, those of the calibration first.
        dense: what the dense model tells.
        orders: int64 `(C_in,)` by channel group.
    """
    mask, record = job.methods.mask, job.record
    if mask.local:
        return None
    chosen = windows_for(mask, job.config.calibration.samples)
    problem = learning_problem(job.config, job.loaded, job.groups, drawn, dense, record.directory, chosen)

    def compute() -> Mapping[str, Tensor]:
        earlier = [line for line in record.history if _MASKS not in line]
        _tell(job, problem, earlier, _steps_of(job, "permutation"))
        with products_in(job.products, job.device):
            masks: Mapping[str, Tensor] = mask.masks(problem, orders)
        return masks

    with record.stage("mask", job.device):
        return record.kept(MASKS, compute, save_masks, load_masks)


def watch_weights(job: Job) -> Callable[[LearningProblem], None]:
    """Return the function that reports the steps and epochs of weights that learn to record and logger."""

    def watch(problem: LearningProblem) -> None:
        earlier = [line for line in job.record.history if WEIGHTS_LEARNED not in line]
        _tell(job, problem, earlier, _steps_of(job, "permutation") + _steps_of(job, "mask"))

    return watch


def _steps_of(job: Job, what: str) -> int:
    """Return the number of steps in which the permutation, or the mask, learns."""
    method = job.methods.learned.get(what)
    if not isinstance(method, LearningSettings):
        return 0
    count = method.samples or job.config.calibration.samples
    return method.steps_in_all(count, len(decoder_layers(job.loaded.model)))


def _tell(job: Job, problem: LearningProblem, earlier: Sequence[dict[str, Any]] = (), steps: int = 0) -> None:
    """Report steps and epochs of learning to record and logger, after those of the stages before."""
    problem.on_step = lambda step, values: job.logger.log(values, steps + step)
    epochs = _Epochs(job.record, job.logger, earlier)
    problem.on_epoch, problem.on_resume = epochs.add, epochs.resume


class _Epochs:
    """Epochs of learning, over all windows, as history and logger keep them, also where an interrupted run continues."""

    def __init__(self, record: Record, logger: RunLogger, earlier: Sequence[dict[str, Any]]) -> None:
        self._record, self._logger, self._earlier = record, logger, list(earlier)

    def resume(self, epochs: list[dict[str, Any]]) -> None:
        lines, logged = [*self._earlier, *epochs], len(self._record.history)
        self._record.write_history(lines)
        for number, values in enumerate(lines[logged:], logged + 1):  # the process before ended between checkpoint and history
            self._logger.log_epoch(values, number)

    def add(self, values: dict[str, Any]) -> None:
        self._record.write_history([*self._record.history, values])
        self._logger.log_epoch(values, len(self._record.history))
