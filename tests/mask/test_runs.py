"""Learned masks in whole runs: exported, verified, continued, from the text that they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from permllm import job
from permllm.data.lookup import calibration_text
from permllm.data.windows import calibration_windows
from permllm.export.verify import verify
from permllm.mask.score import MaskLearner
from permllm.models.layers import last_states
from permllm.models.load import load_model
from permllm.pruning import methods, phases
from permllm.pruning.methods import methods_of
from permllm.store.files import read_json, read_lines
from permllm.training.learner import Progress
from permllm.training.objective import Objective
from permllm.training.trainer import Trainer
from tests.settings.test_config import config
from tests.test_job import run

LEARNING = ("mask.learning_rate=0.1", "mask.batch_size=4")
BOTH = ("mask=score", "mask.epochs=2", *LEARNING)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """Return a run that learns permutations and masks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERMLLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        return run(tmp_path_factory.mktemp("whole"), *BOTH)


def test_without_a_permutation_the_export_is_folded_and_nm_as_it_is_stored(
    cache: Path, tmp_path: Path
) -> None:
    words = ("permutation=none", "mask=lowrank", *LEARNING, "export=folded")
    metrics, directory = run(tmp_path, *words)
    assert read_json(directory / "metrics.json") == metrics
    assert directory.name.startswith("tiny-random-wanda-none-lowrank-2x4-")
    assert metrics["seconds"]["mask"] > 0
    assert verify(directory / "export")["passed"]
    assert [line["mask_flips"] > 0 for line in read_lines(directory / "history.jsonl")] == [True]


@pytest.mark.parametrize("interrupted", ["prune", "masks"])
def test_a_run_that_learns_both_goes_on_where_it_stopped(
    whole: tuple[dict[str, Any], Path],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    interrupted: str,
) -> None:
    learned: list[str] = []
    real = Trainer.run

    def fail(*args: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    def stopped(self: Trainer) -> None:
        learned.append(self.name)
        if interrupted == "masks" and self.name == "mask" and learned.count("mask") == 1:
            fail()
        real(self)

    monkeypatch.setattr(Trainer, "run", stopped)
    with monkeypatch.context() as patched:
        if interrupted == "prune":
            patched.setattr(job, "prune_layers", fail)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, *BOTH)
    metrics, directory = run(tmp_path, *BOTH)
    assert learned == ["lcp", "mask"] + ([] if interrupted == "prune" else ["mask"])
    assert metrics["perplexity"] == whole[0]["perplexity"]
    for name in ("masks.safetensors", "permutations.safetensors"):
        assert (directory / name).read_bytes() == (whole[1] / name).read_bytes()
    lines, expected = (
        read_lines(directory / "history.jsonl"),
        read_lines(whole[1] / "history.jsonl"),
    )
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert sum("mask_flips" in line for line in lines) == 2
    assert not list(directory.glob("*.pt"))


def test_a_learner_without_measures_of_its_own_keeps_its_history_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupt learned masks of a package, whose lines have no key that we know."""
    monkeypatch.setattr(MaskLearner, "epoch_values", lambda self, progress: {})
    real = Trainer.step

    def stop_in_the_second(self: Trainer, batch: torch.Tensor, progress: Progress) -> Any:
        if self.name == "mask" and progress.epoch == 1:
            raise KeyboardInterrupt
        return real(self, batch, progress)

    words = ("permutation.epochs=1", *BOTH)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", stop_in_the_second)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, *words)
    _, directory = run(tmp_path, *words)
    lines = [(line["group"], line["epoch"]) for line in read_lines(directory / "history.jsonl")]
    assert lines == [("permutation", 1), ("mask", 1), ("mask", 2)]


def test_each_method_learns_from_its_own_part_of_the_text(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["mask=score", "reconstruction=distill", *LEARNING, "calibration.samples=8"]
    words += ["compute_dtype=float32", "permutation.samples=4", "mask.samples=10"]
    words += ["reconstruction.skip=6", "reconstruction.samples=4"]
    settings = config("model=tiny-random", *words)
    loaded = load_model(settings.model, settings.seed)
    text = calibration_text(settings.calibration)
    drawn = calibration_windows(
        loaded.tokenizer, text, settings.calibration, settings.seed, extra=2
    )
    seen: list[torch.Tensor] = []
    computed: list[torch.Tensor] = []
    real, real_states = Trainer.__init__, phases.last_states

    def watched(self: Trainer, objective: Objective, *more: Any) -> None:
        problem = objective.problem
        seen.append(problem.tokens)
        dense = last_states(loaded.model, problem.tokens, 4, torch.float32)
        torch.testing.assert_close(problem.target, dense, rtol=1e-4, atol=1e-5)
        real(self, objective, *more)

    def watched_states(model: Any, tokens: torch.Tensor, *more: Any) -> torch.Tensor:
        computed.append(tokens)
        return real_states(model, tokens, *more)

    monkeypatch.setattr(Trainer, "__init__", watched)
    monkeypatch.setattr(phases, "last_states", watched_states)
    run(tmp_path, *words)
    assert methods_of(settings).extra_windows(8) == 2
    assert torch.equal(torch.cat(computed), drawn[8:10])
    assert [len(tokens) for tokens in seen] == [4, 10, 4]
    assert all(map(torch.equal, seen, (drawn[:4], drawn[:10], drawn[6:10])))


@pytest.mark.parametrize("words", [["permutation=lcp"], ["permutation=none", "mask=score"]])
def test_a_teacher_gives_the_same_losses_as_targets_that_are_stored(
    words: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = words[-1].partition("=")[0]
    words = [*words, "calibration.samples=4", f"{group}.samples=10", "compute_dtype=float32"]
    losses = []
    for most_states in (0, 4e9):
        monkeypatch.setattr(methods, "MOST_STATES", most_states)
        _, directory = run(tmp_path / str(most_states), *words)
        losses.append([line["loss"] for line in read_lines(directory / "history.jsonl")])
        stored = [torch.load(file)["target"] for file in (cache / "results").glob("target-*.pt")]
        assert sum(map(len, stored)) == (10 if most_states else 4)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
