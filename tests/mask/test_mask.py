"""Learned masks: they learn, in any order or with it, are N:M in it, continue where they stopped, and are what is pruned."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.errors import ConfigError
from permllm.learning import training as training_module
from permllm.learning.problem import LearningProblem
from permllm.learning.training import Training
from permllm.mask.contract import FoundMasks
from permllm.mask.lowrank import LowRankMask
from permllm.mask.score import ScoreMask
from permllm.models.families import linear_at
from permllm.permutation.heuristic import Heuristic
from permllm.permutation.shared import foldable
from permllm.pipeline import prune
from permllm.pruning.sparsegpt import SparseGPT
from permllm.pruning.wanda import Wanda
from permllm.record.masks import violations
from permllm.sparsity import permuted_nm_mask
from tests.conftest import tiny_model
from tests.permutation.test_lcp import output_loss_of
from tests.pruning.test_pipeline import PATTERN, lcp, problem, tokens

METHODS = {"score": ScoreMask, "lowrank": LowRankMask}


def mask(name: str, **settings: Any) -> Any:
    return METHODS[name](**{"batch_size": 3, "loss": "cosine", "learning_rate": 0.1} | settings)


def ordered(learning: LearningProblem, permutation: str) -> dict[str, Tensor]:
    if permutation == "none":
        return {group.name: torch.arange(group.channels) for group in learning.groups}
    return {
        group.name: Heuristic().order(group.name, torch.cat([learning.saliency_of(path) for path in group.members]), PATTERN)
        for group in learning.groups
    }


def pruners(learning: LearningProblem, orders: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        path: permuted_nm_mask(learning.saliency_of(path), orders[group.name], PATTERN)
        for group in learning.groups
        for path in group.members
    }


def check_masks(learning: LearningProblem, orders: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    for group in learning.groups:
        for path in group.members:
            assert not violations(masks[path].float(), orders[group.name], PATTERN)
            assert int(masks[path].sum()) * 2 == masks[path].numel()


@pytest.mark.parametrize("permutation", ["none", "heuristic"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_learning_lowers_the_loss_of_the_really_pruned_model(name: str, permutation: str) -> None:
    measured: list[float] = []
    learning = problem(tiny_model("llama"), Wanda(), on_pass=lambda values: measured.append(values["measured_loss"]))
    orders = ordered(learning, permutation)
    found, masks, *_ = mask(name, epochs=12, select_from=12).masks(learning, orders)
    assert all(torch.equal(found[group], order) for group, order in orders.items())
    check_masks(learning, orders, masks)
    assert output_loss_of(orders, masks) == pytest.approx(min(measured), rel=1e-4)
    assert output_loss_of(orders, masks) < 0.9 * output_loss_of(orders, pruners(learning, orders))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_what_does_not_move_is_the_pruners_mask_and_layers_that_do_not_learn_have_it(name: str) -> None:
    learning = problem(tiny_model("llama"), Wanda())
    orders = ordered(learning, "heuristic")
    start = pruners(learning, orders)
    _, still, *_ = mask(name, learning_rate=1e-12).masks(learning, orders)
    assert all(torch.equal(still[path], start[path]) for path in start)
    _, last, *_ = mask(name, epochs=6, last_layers=1).masks(learning, orders)
    same = {path: torch.equal(last[path], start[path]) for path in start}
    assert all(same[path] == path.startswith("model.layers.0.") for path in same)


@pytest.mark.parametrize(
    ("orders", "stage"),
    [("fixed", "all"), ("fixed", 1), ("together", "all"), ("turns", 1), ("searched", "all"), ("searched", 1)],
)
def test_an_interrupted_training_continues_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orders: str, stage: str | int
) -> None:
    monkeypatch.setattr(training_module, "_CHECKPOINT_EVERY", 0.0)
    monkeypatch.setattr(training_module, "_TIMES_WRITING", 0.0)
    rounds = {"epochs": 1, "rounds": 3} if orders == "searched" else {"epochs": 3}
    # With a scaler of gradients, which is a part of what goes on.
    dtype = torch.float16 if (orders, stage) == ("together", "all") else torch.float32
    method = mask("score", batch_size=2, layers_per_stage=stage, orders=orders, **rounds)
    permutation = lcp(init="random", learning_rate=0.1)

    def learned(**extra: Any) -> FoundMasks:
        learning = problem(tiny_model("llama", dtype=dtype), Wanda(), **extra)
        start = permutation.start(learning) if orders in ("together", "turns") else ordered(learning, "heuristic")
        found: FoundMasks = method.masks(learning, start, permutation)
        check_masks(learning, found.orders, found.masks)
        return found

    class Interrupt(Exception):
        pass

    steps: list[int] = []
    stop_at = [4, 11]  # in the middle of an epoch, of the first stage and of the second

    def stop(step: int, values: dict[str, float]) -> None:
        steps.append(step)
        if stop_at and len(steps) == stop_at[0]:
            stop_at.pop(0)
            raise Interrupt

    whole = learned()
    for _ in range(2):
        if stop_at and (stage == 1 or len(stop_at) == 2):
            with pytest.raises(Interrupt):
                learned(directory=tmp_path, on_step=stop)
    stop_at.clear()
    continued = learned(directory=tmp_path, on_step=stop)
    assert 9 <= len(steps) <= 22  # the step in which it stopped is done again, those before are not
    for before, after in zip(whole, continued, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("orders", ["together", "turns", "searched"])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_orders_follow_from_the_masks(name: str, orders: str) -> None:
    learning = problem(tiny_model("llama"), Wanda())
    permutation = lcp(init="heuristic", learning_rate=0.1, constraint="foldable", block_size=16, temperature=lambda _: 0.5)
    start = permutation.start(learning)
    method = mask(name, epochs=6, rounds=2, orders=orders, learning_rate={"score": 0.03, "lowrank": 0.1}[name], select_from=6)
    found, masks, *_ = method.masks(learning, start, permutation)
    check_masks(learning, found, masks)
    assert any(not torch.equal(found[name], order) for name, order in start.items())
    foldable(learning.groups, found)  # raises where one does not
    assert output_loss_of(found, masks) < output_loss_of(start, pruners(learning, start))


# At 3.0 scores are too large for their exponentials.
@pytest.mark.parametrize(("seed", "rate", "worse"), [(0, 0.3, True), (2, 0.3, True), (0, 3.0, False)])
def test_stages_whose_later_rounds_are_worse_keep_the_orders_that_their_masks_are_in(
    seed: int, rate: float, worse: bool
) -> None:
    lines: list[dict[str, Any]] = []
    learning = problem(tiny_model("llama", seed=seed), Wanda(), on_pass=lines.append)
    rounds = {"orders": "searched", "rounds": 2, "epochs": 1, "select_from": 1, "layers_per_stage": 1}
    method = mask("lowrank", batch_size=2, learning_rate=rate, **rounds)
    check_masks(learning, *method.masks(learning, ordered(learning, "heuristic"), lcp(init="heuristic"))[:2])
    first, second = (line["measured_loss"] for line in lines if line["first_layer"] == 0)
    assert (first < second) is worse


def values_of(training: Training) -> list[list[Tensor]]:
    """What each learner learns, as it is now."""
    return [
        [value.detach().clone() for part in learner.parameters() for value in part["params"]] for learner in training.learners
    ]


def test_in_turns_one_stands_still_while_the_other_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[list[bool]] = []
    real = Training.step

    def step(self: Training, *given: Any) -> Any:
        before = values_of(self)
        found = real(self, *given)
        pairs = zip(before, values_of(self), strict=True)
        moved.append([not all(map(torch.equal, then, now)) for then, now in pairs])
        return found

    monkeypatch.setattr(Training, "step", step)
    learning = problem(tiny_model("llama"), Wanda())
    permutation = lcp(init="random", learning_rate=0.1)
    mask("score", orders="turns", epochs=2).masks(learning, permutation.start(learning), permutation)
    turns = [[True, False], [False, True]]
    assert moved[:2] in (turns, turns[::-1])
    assert moved == (moved[:2] * len(moved))[: len(moved)]


@pytest.mark.parametrize("orders", ["together", "turns"])
def test_layers_whose_orders_all_stay_learn_masks_in_them(orders: str) -> None:
    learning = problem(tiny_model("llama"), Wanda())
    # Those of the residual stream alone, whose order the whole model shares: as with keep_dense=[o_proj,down_proj].
    learning.groups = [group for group in learning.groups if not group.table.producers]
    permutation = lcp(init="heuristic", constraint="foldable", block_size=16)
    start = permutation.start(learning)
    found, masks, *_ = mask("score", orders=orders, layers_per_stage=1).masks(learning, start, permutation)
    check_masks(learning, found, masks)
    assert all(torch.equal(found[name], order) for name, order in start.items())
    assert any(not torch.equal(masks[path], kept) for path, kept in pruners(learning, start).items())


@pytest.mark.parametrize("settings", [{"layers_per_stage": 1}, {"orders": "searched", "rounds": 2}], ids=["stages", "rounds"])
def test_only_what_learns_now_is_in_memory(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    scores: list[weakref.ref[Any]] = []
    made = ScoreMask.scores
    alive: list[int] = []

    def counted(self: ScoreMask, *arguments: Any) -> Any:
        found = made(self, *arguments)
        scores.append(weakref.ref(found))
        return found

    def run(_: Training) -> None:
        alive.append(sum(one() is not None for one in scores))

    monkeypatch.setattr(ScoreMask, "scores", counted)
    monkeypatch.setattr(Training, "run", run)
    learning = problem(tiny_model("llama"), Wanda())
    method = mask("score", **settings)
    method.masks(learning, ordered(learning, "heuristic"), lcp())
    linears = sum(len(group.members) for group in learning.groups)
    assert alive == ([linears // 2] * 2 if "layers_per_stage" in settings else [linears] * 2)


def test_a_pruner_that_corrects_weights_does_so_under_the_learned_masks() -> None:
    model = tiny_model("llama")
    learning = problem(model, SparseGPT())
    orders = ordered(learning, "heuristic")
    _, masks, *_ = mask("score").masks(learning, orders)
    dense = {path: linear_at(model, path).weight.clone() for path in masks}
    result = prune(model, learning.groups, tokens(), SparseGPT(), PATTERN, lambda n, _, __: orders[n], 4, None, masks=masks)
    for path, kept in masks.items():
        assert torch.equal(result.masks[path], kept)
        weight = linear_at(model, path).weight
        assert not weight[~kept].any()
        assert not torch.equal(weight[kept], dense[path][kept])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"orders": "both"}, "mask.orders='both'"),
        ({"orders": "searched"}, "mask.orders=searched searches an order between rounds: set mask.rounds to 2"),
        ({"rank": -1}, "mask.rank=-1"),
        ({"steps": 0}, "mask.steps=0"),
        ({"samples": 0}, "mask.samples=0"),
        ({"select_from": -1}, "mask.select_from=-1"),
        ({"learning_rate": 0}, "mask.learning_rate=0"),
        ({"layers_per_stage": 2, "loss": "kl"}, "mask.loss=kl needs mask.layers_per_stage=all"),
    ],
)
def test_values_that_cannot_work_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        mask("lowrank", **settings)
