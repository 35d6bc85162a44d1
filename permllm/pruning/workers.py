"""What the processes of torchrun beside the first do in a job, and how the first calls them (`permllm.runtime.parallel`)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from permllm.config import RunConfig, read_config
from permllm.errors import ConfigError, DataError, PermLLMError, TrainingError, one_line
from permllm.models.load import LoadedModel, load_model
from permllm.models.selection import groups_to_prune
from permllm.pruning.methods import methods_of
from permllm.runs.cache import choose_cache
from permllm.runtime import parallel
from permllm.runtime.devices import resolve_device
from permllm.runtime.memory import keep_freed_memory
from permllm.runtime.precision import half_products, products_in
from permllm.runtime.seeding import seed_everything
from permllm.sparsity.calibration_cache import packed_factors, unpacked_factors
from permllm.training.problem import LearningProblem


def assist() -> float:
    """Help the first process in one job: learn with it what it learns, as it says, and leave no record.

    What the job is, the settings too, comes from the first process.

    Returns:
        What the job is worth to a search, as the first process found it.

    Raises:
        PermLLMError: this process alone cannot go on in the middle of learning.
    """
    config: RunConfig
    loaded: LoadedModel | None = None
    reason = ""  # why this process cannot learn
    word, given = parallel.told()
    while word != parallel.OVER:
        if word == parallel.PREPARE:
            config = read_config(given)
            try:
                with loaded_by_all(config):
                    loaded = _prepared(config)
            except (PermLLMError, torch.OutOfMemoryError, OSError) as error:
                reason = one_line(error)
        elif word == parallel.LEARN:
            if loaded is not None and loaded.identity != given["model"]:
                reason = f"its model is {loaded.identity}, and that of the first process {given['model']}"
            if not any(parallel.gathered(reason)) and loaded is not None:
                _learn(config, loaded, given)
            done = given["orders"] is not None or "mask" not in methods_of(config).learned
            if done and config.model.placement != "sharded":
                loaded = None  # its memory is free while the first process goes on
        else:
            parallel.serve(word, given)
        word, given = parallel.told()
    parallel.serve_with(None)
    return float(given)


@contextmanager
def loaded_by_all(config: RunConfig) -> Iterator[None]:
    """Around the loading of a model that each process has a part of: each learns afterwards whether all have theirs.

    Raises:
        DataError: another process could not load it.
    """
    several = config.model.placement == "sharded" and parallel.world_size() > 1
    reason = ""
    try:
        yield
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise
    finally:
        found = parallel.gathered(reason) if several else []
    for number, of_process in enumerate(found):
        if of_process:
            raise DataError(f"the process of rank {number} has no part of the model: {of_process}")


def call_helpers(
    problem: LearningProblem, identity: str, products: torch.dtype, orders: Mapping[str, Tensor] | None = None
) -> None:
    """In the first process: have the others learn the same from now on; nothing happens without torchrun.

    Args:
        problem: what is learned from.
        identity: of its model (`LoadedModel.identity`).
        products: dtype of its matrix products.
        orders: of all channel groups, where masks are learned in them; None where the orders are.

    Raises:
        DataError: one of them cannot.
    """
    if parallel.world_size() == 1:
        return
    given: dict[str, Any] = {"model": identity, "products": str(products).removeprefix("torch.")}
    given["orders"] = None if orders is None else dict(orders)
    # A view would be sent with all that it is a view of.
    given |= {"tokens": problem.tokens.clone(), "target": problem.target.clone()}
    given["calibration"] = None if problem.calibration is None else problem.calibration.clone()
    parallel.tell(parallel.LEARN, given | {"factors": packed_factors(problem.factors)})
    for number, reason in enumerate(parallel.gathered("")):
        if reason:
            raise DataError(f"the process of rank {number} cannot learn: {reason}")


def check_shares(learned: Mapping[str, Any], samples: int) -> None:
    """Raise ConfigError where one of several processes would never have a sample to learn from.

    Args:
        learned: methods that learn from `batch_size` samples a step, by their group.
        samples: `calibration.samples`.
    """
    processes = parallel.world_size()
    if processes == 1:
        return
    sizes = {f"{group}.batch_size": method.batch_size for group, method in learned.items()}
    counts = {f"{group}.samples": method.samples for group, method in learned.items() if getattr(method, "samples", None)}
    for name, value in (sizes | counts | {"calibration.samples": samples}).items():
        if value < processes:
            raise ConfigError(
                f"{name}={value} leaves some of {processes} processes without a sample: the smallest is {name}={processes}"
            )


def _prepared(config: RunConfig) -> LoadedModel:
    choose_cache(config.paths.cache_dir)
    device = resolve_device(config.model.device)
    parallel.use_device(device)
    if device.type == "cpu":
        keep_freed_memory()
    seed_everything(config.seed, config.deterministic)
    return load_model(config.model, config.seed)


def _learn(config: RunConfig, loaded: LoadedModel, given: dict[str, Any]) -> None:
    problem = LearningProblem(
        model=loaded.model,
        groups=groups_to_prune(loaded.model, config),
        tokens=given["tokens"],
        factors=unpacked_factors(given["factors"]),
        target=given["target"],
        pattern=config.pattern,
        seed=config.seed,
        calibration_batch_size=config.calibration.batch_size,
        calibration=given["calibration"],
    )
    try:
        half = half_products(loaded.model.dtype, problem.device)
        with parallel.in_step(), half, products_in(getattr(torch, given["products"]), problem.device):
            methods = methods_of(config)
            if given["orders"] is None:
                methods.permutation.orders(problem)
            else:
                methods.mask.masks(problem, given["orders"])
    except TrainingError:
        pass  # the first process has met it at the same step, and says so
