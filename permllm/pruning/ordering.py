"""Stages that find the permutation of each channel group, and the masks if the pruner does not choose them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from permllm.config import windows_learned_from
from permllm.errors import ConfigError
from permllm.models.families import decoder_layers
from permllm.permutation.base import checked_order
from permllm.pruning.kept_weights import WEIGHTS_LEARNED
from permllm.pruning.methods import Job
from permllm.runs.names import MASKS, PERMUTATIONS
from permllm.runs.tensors import load_masks, load_orders, save_masks, save_tensors
from permllm.runtime.precision import products_in
from permllm.sparsity.calibrate import DenseCalibration, NormOver
from permllm.sparsity.calibration_cache import shared_calibration, shared_target
from permllm.sparsity.saliency import SaliencyFactors
from permllm.training.problem import LearningProblem
from permllm.training.settings import LearningSettings

# Groups in the order in which their methods learn, each with a key of the lines of the history that are no earlier group's.
_LINES = {"permutation": "loss", "mask": "mask_flips", "reconstruction": WEIGHTS_LEARNED}


def calibrate(job: Job, drawn: Tensor) -> DenseCalibration:
    """Calibrate the dense model; all linears, so that jobs which keep some of them dense share the result.

    The targets are those of the calibration samples, and of the further samples that orders and masks learn from.

    Args:
        job: of the dense model.
        drawn: int64 `(samples, length)`, those of the calibration first.
    """
    config, calibration = job.config, job.config.calibration
    norm_over: NormOver = "samples" if config.permutation.get("conventions") == "paper" else "tokens"
    dense = shared_calibration(
        job.loaded,
        drawn[: calibration.samples],
        job.methods.pruner,
        config.pruner,
        calibration.batch_size,
        job.products,
        norm_over,
    )
    stops = [windows_for(method, calibration.samples).stop for method in job.methods.learned.values()]
    further = slice(calibration.samples, max(stops, default=0))
    if further.stop > further.start:
        target = dense.target
        dense.target = target.new_empty(len(drawn), *target.shape[1:])  # only samples that are asked for are filled
        dense.target[: len(target)] = target
        dense.target[further] = shared_target(job.loaded, drawn[further], calibration.batch_size, job.products)
    return dense


def windows_for(method: object, calibration: int) -> slice:
    """Return the windows of the text that a method learns from; the first `calibration` ones are those of the calibration."""
    return windows_learned_from(getattr(method, "samples", None), getattr(method, "skip", None), calibration)


def learning_problem(
    job: Job, group: str, tokens: Tensor, calibration: Tensor, factors: Mapping[str, SaliencyFactors], target: Tensor
) -> LearningProblem:
    """Return the problem of a method that learns from the whole model, whose steps and epochs record and logger are told.

    Args:
        job: of the method.
        group: of the method: `permutation`, `mask` or `reconstruction`.
        tokens: int64 `(samples, length)`, to learn from.
        calibration: int64 `(samples, length)`, those that the factors are of.
        factors: saliency factors of the linears.
        target: dense output of the last layer for the tokens, `(samples, length, hidden)`.
    """
    config = job.config
    problem = LearningProblem(
        model=job.loaded.model,
        groups=job.groups,
        tokens=tokens,
        factors=dict(factors),
        target=target,
        pattern=config.pattern,
        seed=config.seed,
        calibration_batch_size=config.calibration.batch_size,
        calibration=calibration,
        directory=job.record.directory,
    )
    names = list(_LINES)
    steps = sum(_steps_of(job, before) for before in names[: names.index(group)])
    problem.on_step = lambda step, values: job.logger.log(values, steps + step)
    epochs = _Epochs(job, _LINES[group])
    problem.on_epoch, problem.on_resume = epochs.add, epochs.resume
    return problem


def _of_the_dense(job: Job, group: str, drawn: Tensor, dense: DenseCalibration) -> LearningProblem:
    """Return the problem of a method that learns before the model is pruned."""
    samples = job.config.calibration.samples
    chosen = windows_for(getattr(job.methods, group), samples)
    return learning_problem(job, group, drawn[chosen], drawn[:samples], dense.factors, dense.target[chosen])


def found_orders(job: Job, drawn: Tensor, dense: DenseCalibration) -> Mapping[str, Tensor]:
    """Return the orders of the channel groups, int64 `(C_in,)` by their names.

    Args:
        job: whose record and logger learn of what is found.
        drawn: int64 `(samples, length)`, those of the calibration first.
        dense: what the dense model tells.
    """
    key = job.permutation_key

    def compute() -> dict[str, Tensor]:
        problem = _of_the_dense(job, "permutation", drawn, dense)
        with products_in(job.products, job.device):
            found = job.methods.permutation.orders(problem)
        if not isinstance(found, Mapping):
            kind = type(found).__name__
            raise ConfigError(f"{key}: `orders` must give a dict of orders by channel group, and it gave a {kind}")
        return {group.name: checked_order(key, group.name, group.channels, found.get(group.name)) for group in job.groups}

    with job.record.stage("permute", job.device):
        return job.record.kept(PERMUTATIONS, compute, save_tensors, load_orders)


def found_masks(job: Job, drawn: Tensor, dense: DenseCalibration, orders: Mapping[str, Tensor]) -> Mapping[str, Tensor] | None:
    """Return the masks of all linears; None: the pruner chooses them.

    Args:
        job: whose record and logger learn of what is found.
        drawn: int64 `(samples, length)`, those of the calibration first.
        dense: what the dense model tells.
        orders: int64 `(C_in,)` by channel group.
    """
    if job.methods.mask.local:
        return None

    def compute() -> Mapping[str, Tensor]:
        problem = _of_the_dense(job, "mask", drawn, dense)
        with products_in(job.products, job.device):
            masks: Mapping[str, Tensor] = job.methods.mask.masks(problem, orders)
        return masks

    with job.record.stage("mask", job.device):
        return job.record.kept(MASKS, compute, save_masks, load_masks)


def _steps_of(job: Job, group: str) -> int:
    """Return the number of steps in which the method of a group learns."""
    method = getattr(job.methods, group)
    if not isinstance(method, LearningSettings):
        return 0
    count = method.samples or job.config.calibration.samples
    return method.steps_in_all(count, len(decoder_layers(job.loaded.model)))


class _Epochs:
    """Epochs of a method's learning, as history and logger keep them, also where an interrupted run continues.

    Args:
        job: whose history has the epochs of methods that have learned before.
        key: of the lines of this method.
    """

    def __init__(self, job: Job, key: str) -> None:
        self._record, self._logger = job.record, job.logger
        self._earlier = [line for line in job.record.history if key not in line]

    def resume(self, epochs: list[dict[str, Any]]) -> None:
        logged = len(self._record.history)
        self._record.write_history([*self._earlier, *epochs])
        # The process before may have ended between checkpoint and history.
        for number, values in enumerate(self._record.history[logged:], logged + 1):
            self._logger.log_epoch(values, number)

    def add(self, values: dict[str, Any]) -> None:
        self._record.write_history([*self._record.history, values])
        self._logger.log_epoch(values, len(self._record.history))
