"""Distillation: gradients of kept weights, and one that is killed and continued."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from permllm.errors import TrainingError
from permllm.models.families import channel_groups, linear_at
from permllm.pruner.magnitude import Magnitude
from permllm.pruning import layerwise, methods
from permllm.pruning.methods import methods_of
from permllm.reconstruction.distill import Distill, KeptWeights
from permllm.sparsity.statistics import Gram
from permllm.store.directory import Record, RunDirectory
from permllm.store.files import DISTILL_CHECKPOINT
from permllm.training import objective
from permllm.training import trainer as training
from permllm.training.learner import Progress
from tests.conftest import tiny_model
from tests.problems import method, pruned, same, tokens
from tests.settings.test_config import config


def test_kept_weights_get_the_gradients_of_their_places_and_are_written_back() -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(8, rows, bias=False, dtype=torch.float64) for rows in (3, 5)]
    masks = [torch.rand(rows, 8) < 0.5 for rows in (3, 5)]
    for linear, mask in zip(linears, masks, strict=True):
        linear.requires_grad_(False).weight.mul_(mask)
    learner = KeptWeights(linears, masks)
    with learner.gradients():
        for _ in range(2):  # of two portions
            sum(linear.weight.pow(4).sum() + linear.weight.sum() for linear in linears).backward()
    for linear, mask, value in zip(linears, masks, learner.parameters(), strict=True):
        kept = linear.weight[mask]
        torch.testing.assert_close(value.grad, 2 * (4 * kept**3 + 1))
        assert linear.weight.grad is None
        assert not linear.weight.requires_grad
        value += 1
        learner.begin(Progress(0, 1, 0, 1))
        assert torch.equal(linear.weight[mask], kept + 1)
        assert not linear.weight[~mask].any()


def test_a_relative_step_changes_each_linear_by_the_same_share() -> None:
    torch.manual_seed(0)
    linears = [nn.Linear(8, 5, bias=False, dtype=torch.float64) for _ in range(3)]
    masks = [torch.rand(5, 8) < 0.5 for _ in linears]
    for linear, mask, scale in zip(linears, masks, (0.01, 3.0, 0.0), strict=True):
        linear.requires_grad_(False).weight.mul_(mask * scale)
    before = [linear.weight.clone() for linear in linears]
    learner = KeptWeights(linears, masks, relative=True)
    with learner.gradients():
        sum(linear.weight.sum() for linear in linears).backward()
    torch.optim.AdamW(learner.parameters(), lr=0.1, weight_decay=0.0).step()
    learner.begin(Progress(0, 1, 0, 1))
    for linear, mask, old in zip(linears, masks, before, strict=True):
        share = old[mask].square().mean().sqrt()  # Adam's first step is the sign of the gradient
        expected = old - 0.1 * (share if share else 1.0) * mask
        torch.testing.assert_close(linear.weight, expected, rtol=1e-5, atol=0.0)


def test_a_gradient_that_is_not_finite_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    update = torch.optim.AdamW.step

    def broken(optimizer: torch.optim.AdamW) -> None:
        for value in optimizer.param_groups[0]["params"]:
            value.grad.fill_(math.nan)
        update(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", broken)
    with pytest.raises(TrainingError):
        distilled(steps=1)


def test_deterministic_kernels_learn_the_same_weights() -> None:
    expected = distilled(steps=2)
    torch.use_deterministic_algorithms(True)
    try:
        assert same(distilled(steps=2), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    paths = (path for group in channel_groups(model) for path in group.members)
    return {path: linear_at(model, path).weight for path in paths}


def distilled(directory: Path | None = None, **settings: Any) -> dict[str, Tensor]:
    """Return the weights of a model that is pruned and distilled, in a run directory if given."""
    model, record = tiny_model("llama"), Record()
    if directory is not None:
        record = RunDirectory(directory, config("model=tiny-random"))
    record.metrics["status"] = "running"
    usual = {"epochs": 2, "batch_size": 2, "samples": 10, "learning_rate": 0.003}
    made = method("reconstruction=distill", **usual | settings)
    pruned(model, Magnitude(), windows=tokens(10), record=record, reconstruction=made)
    return weights_of(model)


@pytest.fixture(scope="module")
def whole() -> dict[str, Tensor]:
    """Return what is learned without an interruption."""
    return distilled()


def test_statistics_of_the_last_layer_are_gone_while_the_network_learns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: list[object] = []

    def network(*_: Any) -> None:
        alive.extend(one for one in gc.get_objects() if type(one) is Gram)

    monkeypatch.setattr(Distill, "network", network)
    distilled(start="admm")
    assert not alive


def test_a_distillation_that_is_stopped_continues_to_the_same_weights(
    whole: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write, step = training.save_state, 8  # of 10, in the second epoch

    def write_and_stop(path: Path, state: Any) -> None:
        write(path, state)
        if state["scheduler"]["last_epoch"] == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training, "CHECKPOINT_TIMES_WRITING", 0.0)
    monkeypatch.setattr(training, "save_state", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        distilled(tmp_path)
    with caplog.at_level("INFO"):
        assert same(whole, distilled(tmp_path))
    assert f"continuing after step {step} of 10" in caplog.text
    # What is of something else, or broken, is not continued, and says so.
    (tmp_path / DISTILL_CHECKPOINT).write_bytes(b"of something else")
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", math.inf)
    monkeypatch.setattr(training, "save_state", lambda *_: None)
    assert same(whole, distilled(tmp_path))
    assert "learning starts over" in caplog.text


@pytest.mark.parametrize("start", ["admm", "obs"])
def test_it_starts_from_what_another_reconstruction_makes(start: str) -> None:
    found = []
    learned = method("reconstruction=distill", start=start, learning_rate=1e-12, epochs=1)
    for reconstruction in (learned, method(f"reconstruction={start}")):
        model = tiny_model("llama", dtype=torch.float64)
        pruned(model, Magnitude(), reconstruction=reconstruction)
        found.append(weights_of(model))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


def test_samples_and_skip_ask_for_windows_after_those_of_the_calibration() -> None:
    words = ("model=tiny-random", "calibration.samples=4", "calibration.seqlen=16")
    words += ("reconstruction=distill",)
    whole, asked = config(*words), config(*words, "reconstruction.samples=7")
    for word, extra in (("samples=7", 3), ("samples=2", 0), ("samples=null", 0), ("skip=4", 4)):
        assert methods_of(config(*words, f"reconstruction.{word}")).extra_windows(4) == extra
    assert config(*words, "reconstruction.skip=0").hash == whole.hash
    assert config(*words, "reconstruction.samples=null").hash == whole.hash != asked.hash


def test_layers_that_would_keep_much_are_recomputed_to_the_same_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recomputed = Mock(wraps=objective.checkpoint)
    monkeypatch.setattr(objective, "checkpoint", recomputed)
    kept = distilled(epochs=1)
    assert not recomputed.called  # a tiny model needs little
    monkeypatch.setattr(objective, "KEPT_ON_A_HOST", 0.0)
    torch.testing.assert_close(distilled(epochs=1), kept)
    assert recomputed.called


def test_a_teacher_gives_the_same_targets_as_states_that_are_stored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored = distilled()
    teacher = Mock(wraps=layerwise.Teacher)
    monkeypatch.setattr(layerwise, "Teacher", teacher)
    assert same(distilled(), stored)
    assert not teacher.called
    monkeypatch.setattr(methods, "MOST_STATES", 0)
    torch.testing.assert_close(distilled(), stored)
    assert teacher.called


def test_steps_go_through_the_samples_as_often_as_they_take(
    whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert same(whole, distilled(epochs=1, steps=10))
    seen: list[Tensor] = []
    real = training.Trainer.step

    def watched(self: training.Trainer, batch: Tensor, *more: Any) -> Any:
        seen.append(batch)
        return real(self, batch, *more)

    monkeypatch.setattr(training.Trainer, "step", watched)
    distilled(epochs=1, steps=7)
    assert [len(batch) for batch in seen] == 7 * [2]
    assert sorted(torch.cat(seen[:5]).tolist()) == list(range(10))
    assert len(torch.cat(seen[5:]).unique()) == 4


def test_kept_weights_in_half_precision_are_trained_as_float32() -> None:
    linear = nn.Linear(8, 4).bfloat16()
    weights = KeptWeights([linear], [torch.ones(4, 8, dtype=torch.bool)])
    assert weights.values[0].dtype == torch.float32
