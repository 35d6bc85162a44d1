"""Learned masks: they learn, in any order, are N:M in it, continue, and are what is pruned."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.mask.score import MaskLearner, ScoreMask
from permllm.models.families import linear_at
from permllm.permutation.heuristic import Heuristic
from permllm.pruner.sparsegpt import SparseGPT
from permllm.sparsity.nm import permuted_nm_mask
from permllm.training import trainer
from permllm.training.learner import Progress
from permllm.training.problem import LearningProblem
from tests.conftest import tiny_model
from tests.problems import (
    PATTERN,
    Interrupt,
    check_masks,
    identities,
    method,
    output_loss,
    problem,
    pruned,
    same,
)

METHODS = ("score", "lowrank")


def mask(name: str, **settings: Any) -> Any:
    usual = {"batch_size": 3, "loss": "cosine", "learning_rate": 0.1}
    return method(f"mask={name}", **usual | settings)


def ordered(learning: LearningProblem, permutation: str) -> dict[str, Tensor]:
    if permutation == "none":
        return identities(learning.groups)
    return Heuristic("free").permutations(learning)


def pruners(learning: LearningProblem, orders: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        path: permuted_nm_mask(learning.saliency_of(path), orders[group.name], PATTERN)
        for group in learning.groups
        for path in group.members
    }


@pytest.mark.parametrize(("name", "permutation"), [("score", "none"), ("lowrank", "heuristic")])
def test_learning_lowers_the_loss_of_the_really_pruned_model(name: str, permutation: str) -> None:
    measured: list[float] = []
    learning = problem(on_epoch=lambda values: measured.append(values["measured_loss"]))
    orders = ordered(learning, permutation)
    masks = mask(name, epochs=8, select_from=8).masks(learning, orders)
    check_masks(learning.groups, orders, masks)
    loss = output_loss(orders, masks)
    assert loss == pytest.approx(min(measured), rel=1e-4)
    assert loss < 0.9 * output_loss(orders, pruners(learning, orders))


@pytest.mark.parametrize("name", METHODS)
def test_what_does_not_move_is_the_pruners_mask_and_layers_that_do_not_learn_have_it(
    name: str,
) -> None:
    learning = problem()
    orders = ordered(learning, "heuristic")
    start = pruners(learning, orders)
    assert same(start, mask(name, learning_rate=1e-12).masks(learning, orders))
    last = mask(name, epochs=6, last_layers=1).masks(learning, orders)
    for path, kept in start.items():
        assert torch.equal(last[path], kept) == path.startswith("model.layers.0.")


@pytest.mark.parametrize("stage", ["all", 1])
def test_an_interrupted_training_continues_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str | int
) -> None:
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "CHECKPOINT_TIMES_WRITING", 0.0)
    # With a scaler of gradients, which is a part of what goes on: it falls from a large start.
    scaler = partial(torch.amp.GradScaler, init_scale=2.0**20)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    dtype = torch.float16 if stage == "all" else torch.float32
    method = mask("score", batch_size=2, layers_per_stage=stage, epochs=3)

    def learned(**extra: Any) -> dict[str, Tensor]:
        learning = problem(tiny_model("llama", dtype=dtype), **extra)
        orders = ordered(learning, "heuristic")
        found: dict[str, Tensor] = method.masks(learning, orders)
        check_masks(learning.groups, orders, found)
        return found

    steps: list[int] = []
    # In the middle of an epoch, of the first stage and of the second.
    stop_at = [5] if stage == "all" else [5, 13]

    def stop(step: int, values: dict[str, float]) -> None:
        steps.append(step)
        if stop_at and len(steps) == stop_at[0]:
            stop_at.pop(0)
            raise Interrupt

    whole = learned()
    for _ in list(stop_at):
        with pytest.raises(Interrupt):
            learned(directory=tmp_path, on_step=stop)
    continued = learned(directory=tmp_path, on_step=stop)
    # The step in which it stopped is done again, those before are not.
    assert len(steps) == (10 if stage == "all" else 20)
    assert same(whole, continued)


def test_only_what_learns_now_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, made, alive = weakref.WeakSet[Any](), ScoreMask.scores, list[int]()

    def noted(*arguments: Any, **named: Any) -> Any:
        found = made(*arguments, **named)
        scores.add(found)
        return found

    monkeypatch.setattr(ScoreMask, "scores", noted)
    monkeypatch.setattr(trainer.Trainer, "run", lambda _: alive.append(len(scores)))
    learning = problem()
    mask("score", layers_per_stage=1).masks(learning, ordered(learning, "heuristic"))
    assert alive == [sum(len(group.members) for group in learning.groups) // 2] * 2


def test_a_pruner_that_corrects_weights_does_so_under_the_learned_masks() -> None:
    model = tiny_model("llama")
    learning = problem(model, SparseGPT(0.01))
    orders = ordered(learning, "heuristic")
    masks = mask("score").masks(learning, orders)
    dense = {path: linear_at(model, path).weight.clone() for path in masks}
    result = pruned(model, SparseGPT(0.01), permutations=orders, masks=masks)
    for path, kept in masks.items():
        assert torch.equal(result.masks[path], kept)
        weight = linear_at(model, path).weight
        assert not weight[~kept].any()
        assert not torch.equal(weight[kept], dense[path][kept])


def test_the_flips_of_an_epoch_are_those_since_the_epoch_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ends: list[dict[str, Tensor]] = []
    told: list[dict[str, Any]] = []
    values = MaskLearner.epoch_values

    def seen(learner: MaskLearner, progress: Progress) -> dict[str, Any]:
        ends.append({path: linear.mask() for path, linear in learner.linears.items()})
        return values(learner, progress)

    monkeypatch.setattr(MaskLearner, "epoch_values", seen)
    learning = problem(on_epoch=told.append)
    mask("score", epochs=2).masks(learning, ordered(learning, "none"))
    before, after = ends
    flips = sum(int((kept != before[path]).sum()) for path, kept in after.items())
    share = flips / sum(kept.numel() for kept in after.values())
    assert told[1]["mask_flips"] == pytest.approx(share, abs=1e-12)
    assert share > 0
