"""The run directory: phases as files, several evaluations, two processes, damaged files."""

from __future__ import annotations

import importlib
import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from permllm import job
from permllm.errors import ConfigError, DataError, InUseError, PermLLMError
from permllm.evaluation import measure
from permllm.permutation.heuristic import Heuristic
from permllm.permutation.lcp.lcp import LCP
from permllm.runtime import precision
from permllm.settings.config import RunConfig, read_config
from permllm.settings.identity import digest_of
from permllm.store.directory import RunDirectory, run_directory
from permllm.store.files import read_json, read_lines, read_yaml
from tests.settings.test_config import composed

SMALL = (
    "model=tiny-random logger=none calibration.samples=4 calibration.seqlen=16 "
    "calibration.batch_size=4 evaluation.perplexity.limit=2"
)
LEARNED = ("permutation=lcp", "permutation.epochs=3", "permutation.batch_size=2")
EVERYTHING = (*LEARNED, "mask=score", "mask.epochs=2", "reconstruction=distill")
EVERYTHING += ("reconstruction.epochs=2", "export=gathered")
OTHER = ("evaluation.perplexity.seqlen=32", "evaluation.perplexity.limit=3")


Stop = tuple[Any, str, Callable[..., bool]]  # a function of an owner, and whether it is now


def settings(folder: Path, *words: str) -> RunConfig:
    return read_config(composed(*SMALL.split(), f"runs_dir={folder}", *words))


def run(folder: Path, *words: str) -> tuple[dict[str, Any], Path]:
    result = job.run(settings(folder, *words))
    assert result is not None
    return result.metrics, result.directory


def is_finished(config: RunConfig) -> bool:
    record = RunDirectory(run_directory(config), config)
    with record.opened():
        return record.is_finished()


def begun(
    folder: Path, words: Sequence[str], owner: Any, name: str, when: Any = lambda *_: True
) -> Path:
    """Return the directory of a run that was interrupted where a function is called."""
    original = getattr(owner, name)

    def stop(*arguments: Any, **named: Any) -> Any:
        if when(*arguments):
            raise KeyboardInterrupt
        return original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder, *words)
    return run_directory(settings(folder, *words))


def line_with(key: str, epoch: int = 1) -> Stop:
    """Stop where the history gets the line of an epoch of the method that has this key."""

    def when(_: object, lines: list[dict[str, Any]]) -> bool:
        return bool(lines) and key in lines[-1] and lines[-1]["epoch"] == epoch

    return RunDirectory, "write_history", when


def results(directory: Path) -> dict[str, Any]:
    """All that must not depend on where a run was stopped."""
    metrics = read_json(directory / "metrics.json")
    keys = ("perplexity", "sparsity", "retained_saliency", "output_error", "status", "sha256")
    found = {key: metrics[key] for key in keys}
    for file in directory.rglob("*.safetensors"):
        tensors = {name: value.tolist() for name, value in load_file(file).items()}
        found[str(file.relative_to(directory))] = tensors
    varying = {"step_seconds": 0, "peak_memory_bytes": 0}
    lines = read_lines(directory / "history.jsonl")
    return found | {"history": [line | varying for line in lines]}


def differing(directory: Path, expected: dict[str, Any]) -> list[str]:
    found = results(directory)
    return [key for key in expected if found.get(key) != expected[key]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a finished run with everything, exported."""
    return run(tmp_path_factory.mktemp("whole"), *EVERYTHING)[1]


def test_a_run_continues_after_its_last_file(whole: Path, tmp_path: Path) -> None:
    """Stop one run at each of its phases in turn."""
    stops: list[Stop] = [line_with("temperature", 2), line_with("mask_flips")]
    stops += [line_with("weights_learned"), (job, "prune_layers", lambda *_: True)]
    stops += [(measure, "measure_perplexity", lambda *arguments: "sparse" in arguments[-1])]
    stops += [(job, "export_run", lambda *_: True)]
    assert "continuing" not in (whole / "run.log").read_text()
    for owner, name, when in stops:
        directory = begun(tmp_path, EVERYTHING, owner, name, when)
    assert "continuing with masks.safetensors" in (directory / "run.log").read_text()
    assert run(tmp_path, *EVERYTHING)[1] == directory
    assert differing(directory, results(whole)) == []
    assert not [*directory.glob("*.pt"), *directory.glob("pruned_layers")]


def test_weights_that_are_not_kept_stay_until_the_run_is_finished(tmp_path: Path) -> None:
    words = ("pruner=sparsegpt", "permutation=none", "save_weights=false")
    last = (measure, "measure_perplexity", lambda *arguments: "sparse" in arguments[-1])
    assert list(begun(tmp_path, words, *last).glob("weights/*"))
    metrics, directory = run(tmp_path, *words)
    assert metrics["status"] == "finished"
    assert metrics["sha256"].keys() == {"permutations.safetensors", "masks.safetensors"}
    assert not (directory / "weights").exists()


def test_a_run_keeps_its_name_when_its_settings_are_typed_one_by_one(tmp_path: Path) -> None:
    typed = ("pruner=wanda", "permutation=none")
    _, directory = run(tmp_path, "method=wanda")
    assert run(tmp_path, *typed)[1] == directory
    assert read_yaml(directory / "config.yaml")["method"] == "wanda"
    _, unnamed = run(tmp_path / "other", *typed)
    run(tmp_path / "other", "method=wanda")
    assert read_yaml(unnamed / "config.yaml")["method"] == "wanda"


def test_a_run_does_not_continue_with_another_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "changing.py").write_text(
        "from permllm.data.texts import Documents\nTEXT = Documents(['one of two texts ' * 200])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ("calibration.dataset=changing.text", "permutation=heuristic")
    monkeypatch.setitem(sys.modules, "changing.text", importlib.import_module("changing"))
    begun(tmp_path, words, job, "prune_layers")
    sys.modules["changing"].TEXT.documents = ["another text " * 200]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match=r"began with texts"):
        run(tmp_path, *words)
    assert run(tmp_path, *words, "force=true")[0]["status"] == "finished"


def test_the_card_of_an_export_has_the_last_evaluation(tmp_path: Path) -> None:
    words = ("permutation=heuristic", "export=gathered")
    _, directory = run(tmp_path, *words)
    card = directory / "export" / "README.md"
    assert "window 32" not in card.read_text()
    weights = (directory / "export" / "model.safetensors").stat().st_mtime_ns
    run(tmp_path, *words, *OTHER)
    assert "window 32" in card.read_text()
    assert (directory / "export" / "model.safetensors").stat().st_mtime_ns == weights
    card.write_text("mine")
    run(tmp_path, *words, *OTHER)
    assert card.read_text() == "mine"


def test_finished_stages_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("permutation=heuristic", "mask=score", "mask.epochs=1")
    begun(tmp_path, words, job, "prune_layers")
    learned = begun(tmp_path / "lcp", LEARNED, *line_with("temperature"))
    assert (learned / "lcp_checkpoint.pt").exists()
    monkeypatch.setattr(Heuristic, "permutations", lambda *_: pytest.fail("searched again"))
    monkeypatch.setattr(LCP, "start_permutations", lambda *_: pytest.fail("searched again"))
    run(tmp_path, *words)
    run(tmp_path / "lcp", *LEARNED)


def test_a_damaged_file_gives_the_same_result_or_is_named(whole: Path, tmp_path: Path) -> None:
    before, refused, directory = results(whole), set(), tmp_path / "run"
    files = [file for file in whole.rglob("*") if file.is_file()]
    for file in files:
        shutil.copytree(whole, directory)
        content = file.read_bytes()
        middle = len(content) // 2
        garbled = content[:middle] + b"\x80\xff\x00" + content[middle + 3 :]
        (directory / file.relative_to(whole)).write_bytes(garbled)
        # The run has `gathered`; `simulate` reads all tensors.
        outcome = attempt(tmp_path, *EVERYTHING[:-1], "export=simulate", f"run_dir={directory}")
        if isinstance(outcome, PermLLMError):
            assert file.name in str(outcome)
            assert "\n" not in str(outcome)
            refused.add(file.name)
        else:
            assert outcome["perplexity"] == before["perplexity"]
        shutil.rmtree(directory)
    named = {"metrics.json", "config.yaml", "masks.safetensors", "permutations.safetensors"}
    assert named | {"00000.safetensors"} <= refused


def attempt(folder: Path, *words: str) -> dict[str, Any] | PermLLMError:
    try:
        return run(folder, *words)[0]
    except PermLLMError as error:
        return error


def test_a_damaged_checkpoint_is_learned_anew(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = begun(tmp_path, EVERYTHING, *line_with("temperature"))
    content = bytearray((directory / "lcp_checkpoint.pt").read_bytes())
    content[2000] ^= 4
    (directory / "lcp_checkpoint.pt").write_bytes(content)
    run(tmp_path, *EVERYTHING)
    assert "learning starts over" in caplog.text
    assert differing(directory, results(whole)) == []


def test_another_evaluation_of_a_finished_run_only_evaluates(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, directory = run(tmp_path)
    monkeypatch.setattr(job, "prune_model", None)
    second, there = run(tmp_path, *OTHER)
    assert there == directory
    assert second["evaluation"]["perplexity"] == {"dataset": "builtin", "seqlen": 32, "limit": 3}
    assert second["perplexity"]["sparse"]["builtin"]["tokens"] == 3 * 31
    assert second["seconds"]["prune"] == first["seconds"]["prune"]
    files = {file.stem: read_json(file) for file in (directory / "evaluations").iterdir()}
    assert files.keys() == {first["evaluation_hash"], second["evaluation_hash"]}
    for metrics in (first, second):
        found = files[metrics["evaluation_hash"]]
        assert found["perplexity"] == metrics["perplexity"]
        for which, values in found["perplexity"].items():
            losses = found["scores"]["perplexity"][which]["builtin"]
            mean = math.fsum(losses) / values["builtin"]["tokens"]
            assert values["builtin"]["value"] == pytest.approx(math.exp(mean), rel=1e-12)
    # Nothing is measured for an evaluation that is there; `metrics.json` shows it again.
    monkeypatch.setattr(job, "load_model", None)
    again, _ = run(tmp_path)
    assert again["perplexity"] == first["perplexity"]
    assert read_json(directory / "metrics.json") == again


def test_a_killed_evaluation_leaves_the_others_and_force_none(cache: Path, tmp_path: Path) -> None:
    first, directory = run(tmp_path, "export=simulate")
    begun(
        tmp_path, OTHER, measure, "measure_perplexity", lambda *arguments: "sparse" in arguments[-1]
    )
    assert read_json(directory / "metrics.json")["perplexity"] == first["perplexity"]
    assert is_finished(settings(tmp_path))
    assert not is_finished(settings(tmp_path, *OTHER))
    assert run(tmp_path, *OTHER)[0]["perplexity"]["sparse"]["builtin"]["window"] == 32
    assert is_finished(settings(tmp_path, *OTHER))
    run(tmp_path, "force=true")
    assert len(list((directory / "evaluations").iterdir())) == 1
    assert not (directory / "export").exists()


def test_a_command_that_fails_changes_nothing_of_a_finished_run(
    cache: Path, tmp_path: Path
) -> None:
    _, directory = run(tmp_path, "permutation=heuristic")
    (tmp_path / "short.txt").write_text("short")

    def files() -> dict[str, bytes]:
        """Return the settings and the results, without the seconds in `metrics.json`."""
        kinds = {".json", ".jsonl", ".safetensors", ".yaml"}
        found = (file for file in directory.rglob("*") if file.suffix in kinds)
        return {file.name: file.read_bytes() for file in found if file.name != "metrics.json"}

    (directory / "tensorboard").mkdir()
    (directory / "tensorboard" / "events.json").write_text("{}")
    before = files()
    short = f"evaluation.perplexity.data_files={tmp_path / 'short.txt'}"
    for words in (
        ["force=true", short],
        ["force=true", "evaluation.tasks=[nothing]"],
        ["deterministic=true", "evaluation.perplexity.seqlen=50000"],
        ["deterministic=true", short],
    ):
        with pytest.raises((ConfigError, DataError)):
            run(tmp_path, "permutation=heuristic", *words)
        assert files() == before
        assert is_finished(settings(tmp_path, "permutation=heuristic"))
    # Another evaluation changes what it is about.
    run(tmp_path, "permutation=heuristic", "deterministic=true", *OTHER)
    config = read_yaml(directory / "config.yaml")
    assert config["evaluation"]["perplexity"]["seqlen"] == 32
    assert not config["deterministic"]


def test_a_directory_of_another_run_is_refused(cache: Path, tmp_path: Path) -> None:
    run(tmp_path, f"run_dir={tmp_path}/run")
    with pytest.raises(ConfigError, match=f"{tmp_path}/run.* seed"):
        run(tmp_path, f"run_dir={tmp_path}/run", "seed=1")
    with pytest.raises(ConfigError, match=r"calibration\.batch_size, seed"):
        run(tmp_path, f"run_dir={tmp_path}/run", "seed=1", "calibration.batch_size=2")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(ConfigError, match="run_dir="):
        run(tmp_path, f"run_dir={tmp_path}/mine")
    assert (tmp_path / "mine" / "notes.txt").exists()


def test_a_run_does_not_continue_in_products_of_another_dtype(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("permutation=heuristic",)
    expected = run(tmp_path / "whole", *words, "compute_dtype=bfloat16")[1]

    def on_a_machine(multiplies: bool) -> None:
        monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: multiplies)

    on_a_machine(True)
    directory = begun(tmp_path, words, job, "prune_layers")
    on_a_machine(False)
    with pytest.raises(ConfigError, match=r"bfloat16.*float32.*compute_dtype=bfloat16.*force=true"):
        run(tmp_path, *words)
    with pytest.raises(ConfigError, match="compute_dtype"):
        run(tmp_path, *words, "compute_dtype=float32", f"run_dir={directory}")
    here = f"run_dir={directory}"
    metrics, continued = run(tmp_path, *words, "compute_dtype=bfloat16", here)
    assert (continued, metrics["compute_dtype"]) == (directory, "bfloat16")
    assert read_yaml(directory / "config.yaml")["compute_dtype"] == "auto"
    assert differing(directory, results(expected)) == []
    assert run(tmp_path, *words)[0] == metrics  # it is finished
    assert run(tmp_path, *words, "force=true")[0]["compute_dtype"] == "float32"


@pytest.mark.parametrize(
    "words", [("calibration.samples=90000",), ("evaluation.perplexity.seqlen=900000",)]
)
def test_a_job_that_ends_by_its_settings_leaves_no_directory(
    cache: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    with pytest.raises((ConfigError, DataError)):
        run(tmp_path / "runs", *words)
    assert not list((tmp_path / "runs").glob("tiny*"))


def lock_file(config: RunConfig) -> Path:
    """The file that processes with the same evaluation of a run lock."""
    directory = run_directory(config)
    evaluation = digest_of(config.evaluation_identity)
    return directory.parent / ".locks" / f"{directory.name}-{evaluation}.lock"


def fail(config: RunConfig, meanwhile: Callable[[], object]) -> None:
    """Open a run, and end it by an error after `meanwhile`."""
    record = RunDirectory(run_directory(config), config)
    with record.opened():
        assert record.directory.is_dir()
        meanwhile()
        raise DataError("no text")


def fail_too(config: RunConfig, begins: Any) -> None:
    begins.set()
    with pytest.raises(DataError):
        fail(config, lambda: None)


@pytest.mark.parametrize("words", [(), OTHER])
def test_a_process_that_waits_for_a_new_run_that_fails_takes_its_turn(
    words: tuple[str, ...], tmp_path: Path
) -> None:
    config = settings(tmp_path)
    fork = multiprocessing.get_context("fork")
    begins = fork.Event()
    waiting = fork.Process(target=fail_too, args=[settings(tmp_path, *words), begins])

    def let_it_wait() -> None:
        waiting.start()
        begins.wait(60)
        time.sleep(0.3)  # it tries twenty times a second

    with pytest.raises(DataError):
        fail(config, let_it_wait)
    waiting.join(60)
    assert waiting.exitcode == 0
    assert not run_directory(config).exists()


def test_locks_lie_in_a_directory_that_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # such as a volume of a container
    config = settings(tmp_path, f"run_dir={tmp_path}/run")
    (tmp_path / "run").mkdir()
    with RunDirectory(run_directory(config), config).opened():
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["run"]


def test_two_processes_on_one_run_take_turns(tmp_path: Path) -> None:
    same, other = settings(tmp_path), settings(tmp_path, *OTHER)
    holder, entered = RunDirectory(run_directory(same), same), []

    def enter(config: RunConfig) -> None:
        with RunDirectory(run_directory(config), config).opened():
            entered.append(time.monotonic())

    with holder.opened():
        with pytest.raises(InUseError), RunDirectory(run_directory(same), same).opened(wait=False):
            pytest.fail("entered")
        threads = [threading.Thread(target=enter, args=[config]) for config in (same, other)]
        for thread in threads:
            thread.start()
        while not lock_file(other).exists():
            time.sleep(0.01)
        time.sleep(0.2)  # they try twenty times a second
        assert not entered
        left = time.monotonic()
    for thread in threads:
        thread.join(60)
    assert len(entered) == 2
    assert min(entered) >= left


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_a_job_that_was_killed_anywhere_ends_with_the_same_result(
    every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Continue what `kill -9` leaves before what a job moves or removes: a copy of its folder."""
    words = ["pruner=sparsegpt", "permutation.epochs=2", "calibration.samples=2", "export=gathered"]
    places: list[Path] = []

    def run_in(folder: Path) -> dict[str, Any]:
        monkeypatch.setenv("PERMLLM_CACHE", str(folder / "cache"))
        _, directory = run(folder, *LEARNED, *words, f"run_dir={folder}/run")
        files = [file for file in folder.rglob("*") if file.suffix != ".lock"]
        names = sorted(str(file.relative_to(folder)) for file in files)
        return results(directory) | {"files": names}

    def copy_before(owner: Any, name: str, patch: pytest.MonkeyPatch) -> None:
        original = getattr(owner, name)

        def copying(*arguments: Any, **named: Any) -> Any:
            places.append(tmp_path / str(len(places)))
            shutil.copytree(tmp_path / "whole", places[-1])
            return original(*arguments, **named)

        patch.setattr(owner, name, copying)

    (tmp_path / "whole").mkdir()
    moved = ((os, "replace"), (Path, "rename"), (Path, "unlink"), (shutil, "rmtree"))
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in moved:
            copy_before(owner, name, patch)
        expected = run_in(tmp_path / "whole")
    assert len(places) > 40
    for place in places[every // 2 :: every]:
        found = run_in(place)
        assert [key for key in expected if found.get(key) != expected[key]] == []
        shutil.rmtree(place)
