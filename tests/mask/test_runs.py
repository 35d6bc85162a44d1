"""Learned masks in whole runs: exported, verified, continued, refused where they cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from permllm import job
from permllm.config import read_config
from permllm.data.windows import calibration_tokens
from permllm.errors import ConfigError
from permllm.export.verify import verify
from permllm.models.layers import last_states
from permllm.models.load import load_model
from permllm.pruning import stages
from permllm.runs.files import read_json
from permllm.training.loop import Training
from permllm.training.problem import LearningProblem
from tests.test_config import composed
from tests.test_job import run

LEARNING = ("mask.learning_rate=0.1", "mask.batch_size=4")


def test_without_a_permutation_the_export_is_folded_and_nm_as_it_is_stored(cache: Path, tmp_path: Path) -> None:
    metrics, directory = run(tmp_path, "permutation=none", "mask=lowrank", *LEARNING, "export=folded")
    assert read_json(directory / "metrics.json") == metrics
    assert directory.name.startswith("tiny-wanda-none-lowrank-2x4-")
    assert metrics["seconds"]["mask"] > 0
    assert verify(directory / "export").passed
    plain, _ = run(tmp_path, "permutation=none")
    assert plain["perplexity"]["sparse"] != metrics["perplexity"]["sparse"]
    lines = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    assert [line["mask_flips"] > 0 for line in lines] == [True]


@pytest.mark.parametrize("interrupted", ["prune", "masks"])
def test_a_run_that_learns_both_goes_on_where_it_stopped(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    overrides = ("mask=score", "mask.epochs=2", *LEARNING)
    whole, whole_directory = run(tmp_path / "whole", *overrides)

    real = Training.run

    def fail(*args: Any, **keywords: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if interrupted == "prune":
            patched.setattr(stages, "prune", fail)
        else:
            patched.setattr(Training, "run", lambda self: fail() if self.name == "mask" else real(self))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, *overrides)
    learned = trained_from_here(monkeypatch)
    metrics, directory = run(tmp_path, *overrides)
    assert learned == ([] if interrupted == "prune" else ["mask"])
    assert metrics["perplexity"] == whole["perplexity"]
    for file in ("masks", "permutations"):
        name = f"{file}.safetensors"
        assert (directory / name).read_bytes() == (whole_directory / name).read_bytes()
    lines, expected = (
        [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()] for run in (directory, whole_directory)
    )
    assert [line["loss"] for line in lines] == [line["loss"] for line in expected]
    assert sum("mask_flips" in line for line in lines) == 2
    assert not list(directory.glob("*.pt"))


def problems_seen(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> list[LearningProblem]:
    """What each training learns from, as it begins; its target is checked against the dense model's output."""
    seen: list[LearningProblem] = []
    real = Training.__init__

    def watched(self: Training, settings: Any, problem: LearningProblem, *more: Any, **others: Any) -> None:
        seen.append(problem)
        dense = last_states(tiny, problem.tokens, 4, torch.float32)
        torch.testing.assert_close(problem.target, dense, rtol=1e-4, atol=1e-5)
        real(self, settings, problem, *more, **others)

    monkeypatch.setattr(Training, "__init__", watched)
    return seen


def test_each_method_learns_from_its_own_amount_of_text(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (
        "mask=score",
        *LEARNING,
        "calibration.samples=8",
        "permutation.samples=4",
        "mask.samples=12",
        "compute_dtype=float32",
    )
    settings = read_config(composed("model=tiny", *words))
    seen = problems_seen(load_model(settings.model, settings.seed).model, monkeypatch)
    forwards: list[int] = []

    def counted(model: Any, tokens: torch.Tensor, *more: Any) -> torch.Tensor:
        forwards.append(len(tokens))
        return last_states(model, tokens, *more)

    monkeypatch.setattr("permllm.pruning.layerwise.last_states", counted)
    run(tmp_path, *words)
    assert not forwards  # no weight changes: nobody asks for the target of the further text again
    orders, masks = seen
    assert (len(orders.tokens), len(masks.tokens)) == (4, 12)
    assert torch.equal(orders.tokens, masks.tokens[:4])
    assert len(masks.tokens.unique(dim=0)) == 12


def test_weights_can_pass_over_the_text_before(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("mask=score", "reconstruction=distill", *LEARNING, "calibration.samples=8", "compute_dtype=float32")
    words = (
        *words,
        "permutation.samples=4",
        "mask.samples=10",
        "reconstruction.skip=6",
        "reconstruction.samples=4",
    )
    settings = read_config(composed("model=tiny", *words))
    loaded = load_model(settings.model, settings.seed)
    seen = problems_seen(loaded.model, monkeypatch)
    drawn = calibration_tokens(loaded.tokenizer, settings.calibration, settings.seed, further=settings.further)
    computed: list[torch.Tensor] = []
    real_target = stages.shared_target

    def watched_target(loaded: Any, tokens: torch.Tensor, *more: Any) -> torch.Tensor:
        computed.append(tokens)
        return real_target(loaded, tokens, *more)

    monkeypatch.setattr(stages, "shared_target", watched_target)
    run(tmp_path, *words)
    assert settings.further == 2
    assert torch.equal(torch.cat(computed), drawn[8:10])
    for problem, windows in zip(seen, (slice(0, 4), slice(0, 10), slice(6, 10)), strict=True):
        assert torch.equal(problem.tokens, drawn[windows])
    # Without an amount it is as much as without passing over anything.
    distilled = ("model=tiny", "reconstruction=distill")
    plain, skipping = (read_config(composed(*distilled, f"reconstruction.skip={skip}")) for skip in (0, 3))
    assert skipping.further == 3
    assert plain.hash == read_config(composed(*distilled)).hash != skipping.hash


def stopped_before_pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Path:
    """The directory of a run that was interrupted when its masks were found."""
    with monkeypatch.context() as patched:
        patched.setattr(stages, "prune", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, *overrides)
    (directory,) = (tmp_path / "runs").iterdir()
    return directory


def trained_from_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of what trains from now on, as it does."""
    names: list[str] = []
    real = Training.run

    def counted(self: Training) -> None:
        names.append(self.name)
        real(self)

    monkeypatch.setattr(Training, "run", counted)
    return names


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("mask=score", "calibration.statistics=sequential", "permutation=none"), "is not valid with mask=score"),
    ],
)
def test_what_cannot_be_is_refused(cache: Path, tmp_path: Path, overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        job.run(read_config(composed("model=tiny", "logger=none", f"runs_dir={tmp_path}/runs", *overrides)))
    assert not list(tmp_path.rglob("metrics.json"))
