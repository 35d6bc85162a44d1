"""Measures of an evaluation: what is kept of them, and what is not measured again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from permllm.data.texts import TEXTS
from permllm.evaluation import measure
from permllm.evaluation.measure import evaluate
from permllm.evaluation.perplexity import perplexity_windows
from permllm.models.load import LoadedModel, load_model
from permllm.settings.config import read_config
from permllm.store.directory import RunDirectory
from tests.settings.test_config import composed, config

FP8 = "evaluation.weights=fp8"
VALUES = {"metrics": {"acc,none": 0.5}, "n": 2, "scores": {"items": [0, 1]}}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was measured; tasks by a stand-in."""
    names: list[str] = []
    measure_perplexity = measure.measure_perplexity

    def counted(*arguments: Any) -> dict[str, Any]:
        names.append(arguments[-1])
        return measure_perplexity(*arguments)

    def task(model: object, tokenizer: object, name: str, *_: object) -> dict[str, Any]:
        names.append(Path(name).stem)
        return {Path(name).stem.removeprefix("my-"): dict(VALUES)}

    monkeypatch.setattr(measure, "measure_perplexity", counted)
    monkeypatch.setattr(measure, "run_task", task)
    return names


def asked(tasks: dict[str, str], **settings: dict[str, Any]) -> str:
    inside = {tasks[name]: how for name, how in settings.items()}
    return f"evaluation.tasks={inside}".replace("'", "")


def evaluated(folder: Path, words: list[str], loaded: LoadedModel) -> dict[str, Any]:
    """Return the evaluation of both models, which are the same one."""
    settings = read_config(composed("model=tiny-random", *words))
    of_text = settings.evaluation.perplexity
    windows = {
        name: perplexity_windows(loaded, TEXTS[name], of_text, name) for name in of_text.names
    }
    record = RunDirectory(folder, settings)
    with record.opened():
        for which in ("dense", "sparse"):
            evaluate(loaded, settings.evaluation, windows, which, record)
    return record.evaluation


def test_another_evaluation_of_the_run_is_asked_for_what_it_has_measured(
    cache: Path, tmp_path: Path, tasks: dict[str, str], ran: list[str]
) -> None:
    loaded, few = load_model(config("model=tiny-random").model, 0), "evaluation.perplexity.limit=2"
    first = evaluated(tmp_path / "run", [few, asked(tasks, colours={})], loaded)
    both = ["dense perplexity", "my-colours", "sparse perplexity", "my-colours"]
    assert ran == both
    told = {"metrics": VALUES["metrics"], "n": 2, "asked": "my-colours.yaml"}
    assert first["tasks"]["sparse"]["colours"] == told
    assert first["scores"]["tasks"]["dense"]["colours"] == VALUES["scores"]
    assert first["perplexity"]["dense"]["builtin"].keys() == {"value", "window", "tokens"}
    assert len(first["scores"]["perplexity"]["sparse"]["builtin"]) == 2

    ran.clear()
    words = [few, asked(tasks, sums={"limit": 4}, colours={})]
    second = evaluated(tmp_path / "run", words, loaded)
    assert ran == ["my-sums", "my-sums"]
    assert json.dumps(second["perplexity"]) == json.dumps(first["perplexity"])
    assert second["scores"]["perplexity"] == first["scores"]["perplexity"]
    assert second["tasks"]["sparse"].keys() == {"colours", "sums"}
    assert evaluated(tmp_path / "run", words, loaded) == second
    assert ran == ["my-sums", "my-sums"]

    # Other windows and other settings of a task are other measures.
    words = ["evaluation.perplexity.limit=1", asked(tasks, colours={"num_fewshot": 2})]
    evaluated(tmp_path / "run", words, loaded)
    assert ran[2:] == both
    ran.clear()
    rounded = evaluated(tmp_path / "run", [few, asked(tasks, colours={}), FP8], loaded)
    assert ran == both
    assert rounded["evaluation"] == first["evaluation"] | {"weights": "fp8"}
    ours, theirs = (one["perplexity"]["dense"]["builtin"]["value"] for one in (rounded, first))
    assert ours != theirs


def test_a_dense_result_is_kept_until_something_that_it_follows_from_changes(
    cache: Path, tasks: dict[str, str], ran: list[str], tmp_path: Path
) -> None:
    loaded, runs = load_model(config("model=tiny-random").model, 0), iter(range(100))

    def measured(*words: str, of: LoadedModel = loaded, **settings: dict[str, Any]) -> bool:
        """Tell whether the dense model was measured."""
        ran.clear()
        nothing = "evaluation.perplexity.dataset=null"
        words = (nothing, asked(tasks, **settings), *words)
        evaluated(tmp_path / f"run{next(runs)}", list(words), of)
        return len(ran) == 2

    for names in (["dense perplexity", "sparse perplexity"], ["sparse perplexity"]):
        ran.clear()
        evaluated(tmp_path / f"run{next(runs)}", ["evaluation.perplexity.limit=2"], loaded)
        assert ran == names
    assert measured(colours={})
    assert not measured(colours={})
    assert measured(sums={})
    assert measured(colours={"num_fewshot": 2})
    assert measured(colours={"limit": 2})
    assert not measured("evaluation.lm_eval.limit=2", colours={})
    assert measured("evaluation.lm_eval.add_bos_token=true", colours={})
    assert measured(FP8, colours={})
    assert measured(colours={}, of=load_model(config("model=tiny-random").model, 1))
    assert not measured(colours={})
    with Path(tasks["colours"]).open("a") as definition:
        definition.write("metadata: {version: 2}\n")
    assert measured(colours={})


def test_a_dense_result_is_that_of_one_device(
    cache: Path, tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_model(config("model=tiny-random").model, 0)
    few = ["evaluation.perplexity.limit=1"]
    evaluated(tmp_path / "a", few, loaded)
    ran.clear()
    monkeypatch.setattr(type(loaded.model), "device", torch.device("cuda"))
    evaluated(tmp_path / "b", few, loaded)
    assert ran == ["dense perplexity", "sparse perplexity"]
