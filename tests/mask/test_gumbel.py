"""Masks by candidates: forward and gradients against autograd, start, schedules, whole runs."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.errors import ConfigError
from permllm.export.verify import verify
from permllm.mask.gumbel import Gates, GumbelLearner, GumbelLinear
from permllm.permutation.heuristic import Heuristic
from permllm.runtime.precision import products_in
from permllm.settings.config import NMPattern
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.saliency import saliency
from permllm.training import trainer
from tests.conftest import tiny_model
from tests.mask.test_score_linear import CHANNELS, ROWS, given, permuted
from tests.problems import Interrupt, check_masks, method, problem, random, same
from tests.settings.test_config import config
from tests.test_job import run


def candidates_of(pattern: NMPattern) -> Tensor:
    """Return all masks of a group, `(K, M)`, the ones as far left as they can be first."""
    masks = [mask for mask in product((1.0, 0.0), repeat=pattern.m) if sum(mask) == pattern.n]
    return torch.tensor(masks, dtype=torch.float64)


def gumbel_linear(pattern: NMPattern) -> tuple[GumbelLinear, Tensor, Tensor]:
    """Return a linear in the middle of learning, its dense weight, and the permutation."""
    linear, factors, order = given("one term")
    there = permuted(linear, order)
    generator = torch.Generator().manual_seed(7)
    gates = Gates(there.weight, factors.permuted(order), pattern, generator)
    gates.temperature, gates.scale, gates.noise_seed = 0.8, 120.0, 11
    return GumbelLinear(there, gates, pattern, order), linear.weight, order


def noise(gates: Tensor, seed: int) -> Tensor:
    uniform = torch.empty_like(gates).uniform_(generator=torch.Generator().manual_seed(seed))
    return -(-uniform.log()).log()


def test_a_candidate_is_the_largest_as_often_as_its_softmax_says() -> None:
    linear, factors, _ = given("one term")
    gates = Gates(linear.weight, factors, NMPattern(2, 4), torch.Generator())
    logits = random(6, seed=1)
    gates.gates = torch.nn.Parameter(logits.view(6, 1, 1).repeat(1, 1, 200_000) / 100)
    gates.temperature, gates.scale, gates.noise_seed = 0.8, 100.0, 11
    chosen = gates.soft().argmax(0).flatten().bincount(minlength=6)
    torch.testing.assert_close(chosen.double() / 200_000, logits.softmax(0), rtol=0, atol=0.005)


@pytest.mark.parametrize("pattern", [NMPattern(2, 4), NMPattern(1, 4), NMPattern(3, 6)], ids=str)
def test_forward_and_gradients_against_the_formula(pattern: NMPattern) -> None:
    module, weight, order = gumbel_linear(pattern)
    x = random(5, CHANNELS, seed=4).requires_grad_()
    grad = random(5, ROWS, seed=5)
    output = module(x)
    ((output * grad).sum() + 0.3 * module.energy).backward()
    assert module.energy is None  # which would hold the graph

    gates = module.scores.gates.detach().clone().requires_grad_()
    inputs = x.detach().clone().requires_grad_()
    y = ((120.0 * gates + noise(gates.detach(), 11)) / 0.8).softmax(0)
    mask = torch.einsum("kgr,km->rgm", y, candidates_of(pattern)).flatten(1)
    masked = weight[:, order] * mask
    expected = inputs[:, order] @ masked.T + module.linear.bias
    ((expected * grad).sum() + 0.3 * masked.square().sum()).backward()

    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x.grad, inputs.grad, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(module.scores.gates.grad, gates.grad, rtol=1e-8, atol=1e-10)

    best = candidates_of(pattern)[gates.detach().argmax(0)]  # (groups, rows, M)
    hard = best.transpose(0, 1).flatten(1).bool()[:, order.argsort()]
    assert torch.equal(module.mask(), hard)
    with torch.no_grad():
        result = module(x)
    torch.testing.assert_close(result, x.detach() @ (weight * hard).T + module.linear.bias)


def test_gates_start_near_the_mask_of_the_pruner() -> None:
    linear, factors, order = given("one term")
    module, _, _ = gumbel_linear(NMPattern(2, 4))
    prior = permuted_nm_mask(saliency(linear.weight, factors), order, NMPattern(2, 4))
    groups = prior[:, order].double().unflatten(1, (-1, 4))
    shared = torch.einsum("rgm,km->kgr", groups, candidates_of(NMPattern(2, 4)))
    # The candidate itself, those that share one weight with it, and its complement.
    assert shared.unique(return_counts=True)[1].tolist() == [36, 4 * 36, 36]
    rest = module.scores.gates.detach() - 0.03 * (shared - 1)
    assert float(rest.std()) == pytest.approx(0.01, rel=0.15)
    assert float(rest.abs().max()) < 0.05


def learned(name: str = "gumbel", learning: Any = None, **settings: Any) -> dict[str, Tensor]:
    usual = {"batch_size": 3, "loss": "cosine", "learning_rate": 0.1, "epochs": 2}
    learning = problem() if learning is None else learning
    permutations = Heuristic("free").permutations(learning)
    masks: dict[str, Tensor] = method(f"mask={name}", **usual | settings).masks(
        learning, permutations
    )
    check_masks(learning.groups, permutations, masks)
    return masks


def test_learning_lowers_the_loss_and_settings_of_memory_make_the_same_steps() -> None:
    losses: list[list[float]] = []
    for memory in ({}, {"micro_batch_size": 1}, {"activation_checkpointing": True}):
        seen: list[float] = []
        learning = problem(on_step=lambda _, values, seen=seen: seen.append(values["loss"]))
        learned(learning=learning, epochs=8, learning_rate=0.02, **memory)
        losses.append(seen)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)
    assert sum(losses[0][-2:]) < 0.8 * sum(losses[0][:2])


def test_rates_fall_to_a_tenth_and_gradients_are_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    norms: list[float] = []
    step = trainer.Trainer.step

    def noted(self: trainer.Trainer, *arguments: Any) -> dict[str, float]:
        (group,) = self.optimizer.param_groups
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-5, 0.1)
        rates.append(group["lr"])
        values = step(self, *arguments)
        gradients = [value.grad for value in self.learner.parameters()]
        norms.append(math.sqrt(sum(float(part.square().sum()) for part in gradients)))
        return values

    monkeypatch.setattr(trainer.Trainer, "step", noted)
    learned(epochs=4, learning_rate=0.2)
    cosines = [math.cos(math.pi * done / 8) for done in range(8)]
    assert rates == pytest.approx([0.02 + 0.18 * (1 + cosine) / 2 for cosine in cosines])
    assert max(norms) == pytest.approx(1.0, rel=1e-4)


def test_the_penalty_is_the_formula_of_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[float] = []
    shares: list[float] = []
    penalty = GumbelLearner.penalty

    def noted(self: GumbelLearner) -> Tensor:
        weights = [linear.linear.weight for linear in self.linears.values()]
        energy = sum(float(linear.energy.detach()) for linear in self.linears.values())
        shares.append(energy / sum(float(weight.square().sum()) for weight in weights))
        found.append(float(penalty(self).detach()))
        return penalty(self)

    monkeypatch.setattr(GumbelLearner, "penalty", noted)
    learned(epochs=2, regularization=7.0)
    steps = len(shares)
    assert steps == 4
    assert 0.3 < min(shares) < max(shares) < 1.0
    expected = [-7.0 * (1 - step / steps) * share for step, share in enumerate(shares)]
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_penalty_favours_large_weights_until_it_is_gone() -> None:
    free = learned(regularization=0.0)
    pulled = learned(regularization=1e4)
    model = tiny_model("llama")

    def energy(masks: dict[str, Tensor]) -> float:
        parameters = dict(model.named_parameters())
        weights = {path: parameters[f"{path}.weight"] for path in masks}
        return sum(float((weights[path] * mask).square().sum()) for path, mask in masks.items())

    assert energy(pulled) > 1.02 * energy(free)


def test_an_interrupted_training_has_the_noise_of_its_step_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(trainer, "CHECKPOINT_TIMES_WRITING", 0.0)
    steps: list[int] = []

    def stop(step: int, values: dict[str, float]) -> None:
        steps.append(step)
        if len(steps) == 2:
            raise Interrupt

    whole = learned()
    with pytest.raises(Interrupt):
        learned(learning=problem(directory=tmp_path, on_step=stop))
    assert same(whole, learned(learning=problem(directory=tmp_path, on_step=stop)))
    assert steps == [0, 1, 1, 2, 3]


def test_patterns_with_too_many_candidates_are_refused() -> None:
    assert config("mask=gumbel", "sparsity=4:8").pattern == NMPattern(4, 8)
    method("mask=gumbel").validate(config("mask=gumbel", "sparsity=4:8"))
    with pytest.raises(ConfigError, match=r"^sparsity=5:10 has 252"):
        method("mask=gumbel").validate(config("mask=gumbel", "sparsity=5:10"))


def test_a_run_by_the_loss_of_the_text_gives_a_checkpoint_that_verifies(
    cache: Path, tmp_path: Path
) -> None:
    words = ("mask=gumbel", "mask.cross_entropy=1", "mask.batch_size=4", "export=folded")
    metrics, directory = run(tmp_path, "permutation=none", *words)
    assert metrics["sparsity"]["violations"] == 0
    assert verify(directory / "export")["passed"]


def test_gates_are_not_rounded_where_products_are() -> None:
    learning = problem()
    path = learning.groups[0].members[0]
    weight = learning.model.get_parameter(f"{path}.weight")
    with products_in(torch.bfloat16, torch.device("cpu")):
        gates = Gates(weight, learning.factors_of(path), NMPattern(2, 4), torch.Generator())
    assert gates.gates.dtype == torch.float32
