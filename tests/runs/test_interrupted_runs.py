"""What lies in a run directory or in the cache may be anything: what can be computed again is, the rest is refused by name."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from permllm import job
from permllm.config import read_config
from permllm.errors import ConfigError, DataError
from permllm.evaluation import measure
from permllm.export.checkpoint import Request, export_run
from permllm.permutation.heuristic import Heuristic
from permllm.permutation.lcp.lcp import LCP
from permllm.pruning import ordering, stages
from permllm.runs.directory import is_finished
from permllm.runs.files import read_json, write_json
from permllm.runs.run_tensors import read_masks, write_masks
from permllm.runs.schema import Metrics
from tests.test_config import composed

SMALL = (
    "model=tiny",
    "logger=none",
    "calibration.samples=4",
    "calibration.seqlen=16",
    "calibration.batch_size=4",
    "evaluation.perplexity.limit=2",
    "permutation=heuristic",
)
LEARNED = (*SMALL[:-1], "permutation=lcp", "permutation.epochs=3", "permutation.batch_size=2", "permutation.compile=false")
ORDERS, MASKS, WEIGHTS = "permutations.safetensors", "masks.safetensors", "weights.safetensors"
UP = "model.layers.0.mlp.up_proj"
GROUP = "model.layers.1.mlp.down_proj"

Change = Callable[[Path], object]


def run(folder: Path, *overrides: str) -> dict[str, Any]:
    result = job.run(read_config(composed(*overrides, f"run_dir={folder}")))
    assert result is not None
    return result[0]


def interrupted(module: ModuleType | type, function: str, when: Callable[..., bool] = lambda *_: True) -> pytest.MonkeyPatch:
    """A job that is interrupted where a module, or an object of a class, calls a function."""
    original = getattr(module, function)

    def stop(*arguments: Any, **named: Any) -> Any:
        if when(*arguments):
            raise KeyboardInterrupt
        return original(*arguments, **named)

    patch = pytest.MonkeyPatch()
    patch.setattr(module, function, stop)
    return patch


def before_a_line(when: Callable[[dict[str, Any]], bool]) -> pytest.MonkeyPatch:
    """A job that is interrupted after the checkpoint of an epoch, before its line of the history."""
    return interrupted(ordering._Passes, "add", lambda _, values: when(values))


def results(folder: Path) -> dict[str, Any]:
    """What must not depend on what happened in between."""
    metrics = read_json(folder / "metrics.json", Metrics)
    kept = {key: metrics[key] for key in ("perplexity", "sparsity", "retained_saliency", "output_error", "status")}  # type: ignore[literal-required]
    tensors = {name: load_file(folder / name) for name in (ORDERS, MASKS, WEIGHTS) if (folder / name).is_file()}
    return kept | {name: {key: value.tolist() for key, value in found.items()} for name, found in tensors.items()}


def flipped(position: int) -> Callable[[Path], object]:
    def change(file: Path) -> object:
        data = bytearray(file.read_bytes())
        data[position] ^= 4
        return file.write_bytes(data)

    return change


def cut(file: Path) -> object:
    return file.write_bytes(file.read_bytes()[:-3])


def garbage(file: Path) -> object:
    return file.write_bytes(b"\x80\x04garbage" * 9)


def without_checksums(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    """The file as another tool would write it."""

    def write(file: Path) -> object:
        if file.name == MASKS:
            masks = dict(read_masks(file))
            change(masks)
            write_masks(file, masks)
            from safetensors import safe_open

            with safe_open(file, framework="pt") as opened:
                shapes = opened.metadata()["shapes"]
            return save_file(load_file(file), file, {"shapes": shapes})
        tensors = load_file(file)
        change(tensors)
        return save_file(tensors, file)

    return write


def duplicate(orders: dict[str, torch.Tensor]) -> None:
    orders[GROUP][0] = orders[GROUP][1]


BROKEN_MASKS: dict[str, Change] = {
    "removed": Path.unlink,
    "a flipped bit": flipped(-5),
    "garbage": garbage,
    "a layer is missing": without_checksums(lambda masks: masks.pop(UP)),
    "another shape": without_checksums(lambda masks: masks.update({UP: masks[UP][:-4].contiguous()})),
    "not N:M": without_checksums(lambda masks: masks[UP][0, 0].logical_not_()),
}
BROKEN_ORDERS: dict[str, Change] = {
    "removed": Path.unlink,
    "a flipped bit": flipped(-8),
    "garbage": garbage,
    "a channel twice": without_checksums(duplicate),
    "a group is missing": without_checksums(lambda orders: orders.pop(GROUP)),
    "another width": without_checksums(lambda orders: orders.update({GROUP: torch.arange(32)})),
    "floats": without_checksums(lambda orders: orders.update({GROUP: orders[GROUP].float()})),
}
BROKEN_WEIGHTS: dict[str, Change] = {
    "removed": Path.unlink,
    "a flipped bit": flipped(-5),
    "NaN": without_checksums(lambda weights: weights[UP].view(-1)[3].fill_(float("nan"))),
    "a layer is missing": without_checksums(lambda weights: weights.pop(UP)),
    "whole numbers": without_checksums(lambda weights: weights.update({UP: weights[UP].int()})),
}


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs that were interrupted in the evaluation of the pruned model, and the same ones finished, by pruner."""
    found = {}
    for pruner in ("wanda", "sparsegpt"):
        folder = tmp_path_factory.mktemp(pruner)
        patch = interrupted(measure, "perplexity", lambda *arguments: "sparse" in arguments[-1])
        with pytest.raises(KeyboardInterrupt):
            run(folder / "interrupted", *SMALL, f"pruner={pruner}")
        patch.undo()
        run(folder / "finished", *SMALL, f"pruner={pruner}")
        found[pruner] = folder
    return found


@pytest.mark.parametrize(
    ("name", "case", "pruner"),
    [
        *((MASKS, case, "wanda") for case in BROKEN_MASKS),
        *((ORDERS, case, "wanda") for case in BROKEN_ORDERS),
        *((WEIGHTS, case, "sparsegpt") for case in BROKEN_WEIGHTS),
    ],
)
def test_a_run_that_lost_what_it_had_pruned_prunes_again(
    pruned: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, case: str, pruner: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(pruned[pruner] / "interrupted", folder)
    (BROKEN_MASKS if name == MASKS else BROKEN_ORDERS if name == ORDERS else BROKEN_WEIGHTS)[case](folder / name)
    run(folder, *SMALL, f"pruner={pruner}")
    assert "pruning again" in caplog.text
    assert results(folder) == results(pruned[pruner] / "finished")


def test_a_run_that_was_interrupted_and_lost_nothing_does_not_prune_again(
    pruned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(pruned["wanda"] / "interrupted", tmp_path / "run")
    monkeypatch.setattr(job, "prune_model", None)
    run(tmp_path / "run", *SMALL)
    assert results(tmp_path / "run") == results(pruned["wanda"] / "finished")


@pytest.mark.parametrize(("name", "change"), [(MASKS, Path.unlink), (ORDERS, cut)], ids=["removed", "cut"])
def test_a_finished_run_without_its_tensors_is_not_finished(
    pruned: dict[str, Path], tmp_path: Path, name: str, change: Change
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(pruned["wanda"] / "finished", folder)
    assert is_finished(folder)
    change(folder / name)
    assert not is_finished(folder)
    run(folder, *SMALL)
    assert is_finished(folder)
    assert results(folder) == results(pruned["wanda"] / "finished")


@pytest.mark.parametrize(
    ("name", "case"), [*((MASKS, case) for case in BROKEN_MASKS), *((ORDERS, case) for case in BROKEN_ORDERS)]
)
def test_no_export_is_made_of_what_is_broken(pruned: dict[str, Path], tmp_path: Path, name: str, case: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(pruned["wanda"] / "finished", folder)
    (BROKEN_MASKS if name == MASKS else BROKEN_ORDERS)[case](folder / name)
    with pytest.raises(DataError, match=name) as caught:
        export_run(folder, Request("gathered"), tmp_path / "export")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "export").exists()


def test_a_finished_run_that_kept_no_weights_stays_finished_and_one_that_was_interrupted_prunes_again(
    cache: Path, tmp_path: Path
) -> None:
    words = (*SMALL, "pruner=sparsegpt", "save_weights=false")
    patch = interrupted(measure, "perplexity", lambda *arguments: "sparse" in arguments[-1])
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", *words)
    patch.undo()
    first = run(tmp_path / "run", *words)
    assert first["status"] == "finished"
    assert is_finished(tmp_path / "run")
    run(tmp_path / "other", *words)
    assert results(tmp_path / "run") == results(tmp_path / "other")


def test_what_was_found_is_not_searched_again(cache: Path, tmp_path: Path, learning: Path) -> None:
    """The order behind masks that are learned, and the start of an order that has begun to learn."""

    def searched(*arguments: object) -> None:
        raise AssertionError("searched again")

    words = (*SMALL, "permutation=heuristic", "mask=score", "mask.learning_rate=0.1")
    patch = interrupted(stages, "prune")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", *words)
    patch.undo()
    shutil.copytree(learning / "second", tmp_path / "lcp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Heuristic, "order", searched)
        patch.setattr(LCP, "start_orders", searched)
        run(tmp_path / "run", *words)
        run(tmp_path / "lcp", *LEARNED)
    run(tmp_path / "other", *words)
    assert results(tmp_path / "run") == results(tmp_path / "other")
    assert results(tmp_path / "lcp") == results(learning / "finished")


def test_the_history_has_the_epochs_of_masks_and_then_of_weights(cache: Path, tmp_path: Path) -> None:
    learned = ("permutation=none", "mask=score", "mask.epochs=2", "reconstruction=distill", "reconstruction.epochs=3")
    words = (*SMALL, *learned, "calibration.samples=8")
    patch = before_a_line(lambda values: values["pass"] == 2 and "weights_learned" in values)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "run", *words)
    patch.undo()
    assert len(history(tmp_path / "run")) == 3
    run(tmp_path / "run", *words)
    run(tmp_path / "other", *words)
    lines = history(tmp_path / "other")
    assert [("mask_flips" in line, "weights_learned" in line) for line in lines] == [(True, False)] * 2 + [(False, True)] * 3
    assert lines[-1]["loss"] < lines[2]["loss"]
    assert history(tmp_path / "run") == lines


@pytest.fixture(scope="module")
def learning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run interrupted after its second pass of three (`second`), with its orders alone (`orders`), and `finished`."""
    folder = tmp_path_factory.mktemp("learning")
    patch = before_a_line(lambda values: values["pass"] == 2)
    with pytest.raises(KeyboardInterrupt):
        run(folder / "second", *LEARNED)
    patch.undo()
    patch = interrupted(stages, "prune")
    with pytest.raises(KeyboardInterrupt):
        run(folder / "orders", *LEARNED)
    patch.undo()
    run(folder / "finished", *LEARNED)
    return folder


def history(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("step_seconds", "peak_memory_bytes")} for line in lines]


def test_no_line_of_the_history_is_lost(learning: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "run"
    shutil.copytree(learning / "second", folder)
    assert len(history(folder)) == 1
    with open(folder / "history.jsonl", "a") as stream:
        stream.write('{"pass": 2, "lo')  # cut short
    run(folder, *LEARNED)
    assert "continuing after epoch 2 of 3" in caplog.text
    assert history(folder) == history(learning / "finished")
    assert results(folder) == results(learning / "finished")


def other_run(file: Path) -> object:
    state = torch.load(file, weights_only=True)
    return torch.save(state | {"run": "0123456789"}, file)


def bad_best(file: Path) -> object:
    state = torch.load(file, weights_only=True)
    next(iter(state["learner"]["best"].values()))[:2] = 0
    return torch.save(state, file)


def lacks(file: Path) -> object:
    state = torch.load(file, weights_only=True)
    del state["optimizer"]
    return torch.save(state, file)


@pytest.mark.parametrize(
    "change",
    [garbage, flipped(2000), other_run, bad_best, lacks],
    ids=["garbage", "flipped", "another run", "no permutation", "lacks a key"],
)
def test_a_broken_checkpoint_of_learning_is_learned_anew(
    learning: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, change: Change
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(learning / "second", folder)
    change(folder / "lcp_checkpoint.pt")
    run(folder, *LEARNED)
    assert "learning begins anew" in caplog.text
    assert history(folder) == history(learning / "finished")
    assert results(folder) == results(learning / "finished")


@pytest.mark.parametrize("case", [case for case in BROKEN_ORDERS if case != "removed"])
def test_broken_orders_of_an_interrupted_run_are_found_again(
    learning: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(learning / "orders", folder)
    BROKEN_ORDERS[case](folder / ORDERS)
    run(folder, *LEARNED)
    assert "finding the permutations again" in caplog.text
    assert results(folder) == results(learning / "finished")


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 2, "status": 3}'], ids=["cut", "list", "another type"])
def test_metrics_that_cannot_be_read_are_measured_again(
    pruned: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(pruned["wanda"] / "finished", folder)
    (folder / "metrics.json").write_text(text)
    assert not is_finished(folder)
    run(folder, *SMALL)
    assert "this run is done again" in caplog.text
    assert results(folder) == results(pruned["wanda"] / "finished")


@pytest.mark.parametrize("text", ["", "- 1", "a: ["], ids=["empty", "list", "cut"])
def test_a_config_that_cannot_be_read_is_refused_by_name(pruned: dict[str, Path], tmp_path: Path, text: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(pruned["wanda"] / "finished", folder)
    (folder / "config.yaml").write_text(text)
    with pytest.raises((DataError, ConfigError), match=r"config\.yaml") as caught:
        run(folder, *SMALL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["tokens", "saliency", "target", "dense"])
@pytest.mark.parametrize("change", ["a digit", "cut"])
def test_what_the_cache_holds_is_what_was_written_or_computed_again(
    cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str, change: str
) -> None:
    words = (*SMALL[:-1], "permutation=none", "calibration.statistics=dense")
    run(tmp_path / "first", *words)
    files = [file for file in (cache / kind).iterdir() if file.suffix != ".lock"]
    assert files
    for file in files:
        data = bytearray(file.read_bytes())
        if change == "a digit":
            place = data.index(b'"value": ') + 10 if kind == "dense" else len(data) - 2
            data[place] ^= 1
        file.write_bytes(data if change == "a digit" else data[:-9])
    run(tmp_path / "second", *words)
    assert "computing it again" in caplog.text
    assert results(tmp_path / "second") == results(tmp_path / "first")


def test_orders_of_a_file_are_checked_where_they_are_read(pruned: dict[str, Path], tmp_path: Path) -> None:
    for name, change in BROKEN_ORDERS.items():
        file = tmp_path / f"{name}.safetensors"
        shutil.copyfile(pruned["wanda"] / "finished" / ORDERS, file)
        change(file)
        with pytest.raises((DataError, ConfigError), match=name) as caught:
            run(tmp_path / f"run of {name}", *SMALL[:-1], "permutation=from_file", f"permutation.path='{file}'")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / f"run of {name}" / MASKS).exists()


def test_what_a_killed_process_was_writing_is_cleared(pruned: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(pruned["wanda"] / "finished", folder)
    left = [folder / ".metrics.json.0123abcd", folder / ".masks.safetensors.0123abcd", folder / "lcp_checkpoint.pt"]
    (cache / "target").mkdir(parents=True)
    for file in left:
        file.write_bytes(b"x")
    for name in ("export.new", ".export.new.0123abcd"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"x")
    kept = folder / ".notes.txt"
    kept.write_text("mine")
    run(folder, *SMALL)
    assert not any(file.exists() for file in left)
    assert {entry.name for entry in folder.iterdir() if entry.is_dir()} == set()
    assert kept.exists()
    scratch = cache / "target" / ".abc.safetensors.0123abcd"
    scratch.write_bytes(b"x")
    run(tmp_path / "another", *SMALL)
    assert not scratch.exists()


def test_an_export_is_what_its_folder_says(pruned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    shutil.copytree(pruned["wanda"] / "finished", folder)
    first = run(folder, *SMALL, "export=gathered")["export"]
    # Killed between the move of the folder and the record of it: the record says what the folder held before.
    metrics = json.loads((folder / "metrics.json").read_text())
    del metrics["crc32"]
    metrics["export"] |= {"form": "simulate", "gathers": 0}
    write_json(folder / "metrics.json", metrics)
    assert run(folder, *SMALL, "export=simulate")["export"]["form"] == "simulate"
    assert json.loads((folder / "export" / "permllm.json").read_text())["form"] == "simulate"
    run(folder, *SMALL, "export=gathered")
    file = folder / "export" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    assert run(folder, *SMALL, "export=gathered")["export"]["bytes"] == first["bytes"]
    assert file.read_bytes() == whole


def test_a_checkpoint_of_another_shape_is_refused_by_name(learning: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(learning / "second", folder)
    file = folder / "lcp_checkpoint.pt"
    state = torch.load(file, weights_only=True)
    logits = state["learner"]["logits"]
    logits[next(iter(logits))] = torch.zeros(3)
    torch.save(state, file)
    with pytest.raises(DataError, match=r"lcp_checkpoint\.pt: it has logits of other shapes: remove it"):
        run(folder, *LEARNED)
