"""Learning of permutations: it learns, repeats itself, continues, stops at NaN, keeps blocks."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from permllm.errors import ConfigError, TrainingError
from permllm.models.families import channel_groups, decoder_layers, linear_at
from permllm.models.layers import LayerStream
from permllm.permutation.foldable import RESIDUAL, folded_permutations, shared_permutations
from permllm.permutation.heuristic import Heuristic
from permllm.permutation.lcp.lcp import LCP
from permllm.permutation.lcp.permutation_learner import PermutationLearner
from permllm.permutation.lcp.sinkhorn import BlockLogits
from permllm.permutation.lcp.temperature import Constant, Cosine, Exponential, Linear
from permllm.pruner.wanda import Wanda
from permllm.runtime.precision import products_in
from permllm.settings.composition import composed
from permllm.training.kernels import EAGER
from permllm.training.learner import Progress, Stage
from permllm.training.losses import cosine_loss
from permllm.training.objective import Objective
from permllm.training.problem import LearningProblem
from permllm.training.trainer import LayerOutputs, Trainer
from tests.conftest import tiny_model
from tests.problems import (
    CPU,
    PATTERN,
    Interrupt,
    lcp,
    output_loss,
    problem,
    pruned,
    same,
    states_of,
    tokens,
)


def learned(told: list[dict[str, Any]] | None = None, **settings: Any) -> dict[str, Tensor]:
    """Return the orders that LCP learns on a tiny model; the list gets the figures of epochs."""
    on_epoch = (told if told is not None else []).append
    return lcp(**settings).permutations(problem(on_epoch=on_epoch))


def begin(settings: LCP, learning: LearningProblem) -> dict[str, BlockLogits]:
    """Return the logits at the start of learning from the channels as they are."""
    shared = shared_permutations(learning.groups, settings.constraint)
    start = {order.name: torch.arange(order.channels) for order in shared}
    return settings.start_logits(learning, shared, start)


def gradients(settings: LCP, learning: LearningProblem, blocks: dict[str, BlockLogits]) -> Any:
    """Return the gradients of a step over all samples by the first logits of each order."""
    shared = shared_permutations(learning.groups, settings.constraint)
    stage, progress = Stage(0, range(2), None, learning.target), Progress(0, 1, 0, 1)
    start = {order.name: torch.arange(order.channels) for order in shared}
    with settings.masked_linears(learning, shared, stage, EAGER) as linears:
        learner = settings.learner(shared, start, blocks, linears)
        objective = Objective(settings, learning, stage, learner)
        learner.begin(progress)
        objective.backward(torch.arange(len(learning.tokens)))
    return {name: block.logits[0].grad for name, block in blocks.items()}


def test_logits_decay() -> None:
    usual, decayed = (learned(init="random", epochs=3, weight_decay=rate) for rate in (0.0, 90.0))
    assert not same(usual, decayed)


def test_logits_begin_at_a_margin_and_uniform_noise() -> None:
    starts = []
    for seed in (0, 1):
        (first, *_) = begin(lcp(margin=0.5, noise=0.02), replace(problem(), seed=seed)).values()
        logits = first.logits[0].detach()
        starts.append(logits - 0.5 * torch.eye(logits.shape[-1]))
    for noise in starts:
        assert 0.019 < noise.max() <= 0.02
        assert -0.02 <= noise.min() < -0.019
        assert noise.mean().abs() < 0.002
    assert not torch.equal(*starts)


@pytest.mark.parametrize(
    "settings",
    [
        {"init": "heuristic"},
        {"straight_through": "hard"},
        {"straight_through": "soft"},
        {"constraint": "foldable", "block_size": 16},
        {"loss": "kl"},
    ],
    ids=str,
)
def test_learning_lowers_the_loss_of_the_really_pruned_model(settings: dict[str, Any]) -> None:
    told: list[dict[str, Any]] = []
    settings = {"init": "random", "batch_size": 2, "block_size": 32} | settings
    start = learned(told, **settings, learning_rate=1e-9, margin=1.0, epochs=1, select_from=1)
    orders = learned(told, **settings, epochs=9, learning_rate=0.03, select_from=9)
    before, *measured = (values["measured_loss"] for values in told)
    assert min(measured) < (0.95 if "loss" in settings else 0.9) * before
    if "loss" not in settings:
        # The returned order is the one that was measured to be the best, not merely the last.
        assert output_loss(orders) == pytest.approx(min(measured), rel=1e-4)
    if "constraint" in settings:  # the order of the whole model is learned too
        groups = channel_groups(tiny_model("llama"))
        streams = [folded_permutations(groups, found)[RESIDUAL] for found in (start, orders)]
        assert not torch.equal(*streams)


def test_losses_of_steps_and_epochs_are_those_of_the_really_pruned_model() -> None:
    steps, epochs = list[float](), list[float]()
    learning = problem(
        on_step=lambda _, values: steps.append(values["loss"]),
        on_epoch=lambda values: epochs.append(values["loss"]),
    )
    one_step = lcp(margin=5.0, epochs=1, batch_size=6)
    orders = one_step.permutations(learning)
    assert steps == [pytest.approx(output_loss(orders), rel=1e-4)]
    lcp(init="random", learning_rate=0.05, batch_size=5, epochs=1).permutations(learning)
    large, small = steps[1:]  # of five samples and of one
    assert epochs[1] == pytest.approx((5 * large + small) / 6, rel=1e-12)
    assert epochs[1] != pytest.approx((large + small) / 2, rel=1e-6)


@pytest.mark.parametrize(("values_of", "count"), [("step_values", 6), ("epoch_values", 3)])
def test_flips_are_the_share_of_channels_that_moved_since_the_last_step_or_epoch(
    values_of: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders, flips = list[Tensor](), list[float]()
    real = getattr(PermutationLearner, values_of)

    def seen(learner: PermutationLearner, progress: Progress) -> Any:
        orders.append(torch.cat([*learner.present.values()]))
        values = real(learner, progress)
        flips.append(float(values["flips"]))
        return values

    monkeypatch.setattr(PermutationLearner, values_of, seen)
    learned(init="random", learning_rate=0.05, epochs=3)  # two steps an epoch
    moved = [float((one != other).double().mean()) for one, other in pairwise(orders)]
    assert flips[1:] == pytest.approx(moved, abs=1e-12)
    assert (len(flips), flips[2] > 0, flips[-2] > 0) == (count, True, True)


def test_an_interruption_that_python_drops_ends_learning_after_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[int] = []
    dropped = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr("permllm.training.trainer.raise_if_interrupted", dropped)
    learning = problem(on_step=lambda step, _: steps.append(step))
    with pytest.raises(KeyboardInterrupt):
        lcp(init="random", epochs=3).permutations(learning)
    assert steps == [0]


def test_a_single_epoch_is_not_measured_because_there_is_none_to_select_from() -> None:
    for settings, measured in (({"epochs": 1}, 0), ({"epochs": 2}, 2), ({"steps": 1}, 2)):
        told: list[dict[str, Any]] = []
        learned(told, **settings)
        assert sum(line["measured_loss"] is not None for line in told) == min(measured, len(told))


def test_seeds_give_equal_results_however_layers_are_recomputed_and_other_seeds_others() -> None:
    learning, found = problem(), []
    for learning.seed, recomputed in ((1, True), (1, False), (2, None)):
        method = lcp(init="random", epochs=1, activation_checkpointing=recomputed)
        found.append(method.permutations(learning))
    first, again, other = found
    assert same(first, again)
    assert not same(first, other)


def test_a_step_in_portions_is_the_undivided_step() -> None:
    def seen(**settings: Any) -> tuple[dict[str, Tensor], list[float], list[int]]:
        losses, samples = list[float](), list[int]()
        learning = problem(
            tiny_model("llama", dtype=torch.float64),
            on_step=lambda _, values: losses.append(values["loss"]),
            on_epoch=lambda values: losses.append(values["measured_loss"]),
        )

        def count(_: Any, args: tuple[Tensor]) -> None:
            if torch.is_grad_enabled():
                samples.append(len(args[0]))

        decoder_layers(learning.model)[0].mlp.register_forward_pre_hook(count)  # type: ignore[union-attr, operator]
        method = lcp(init="random", learning_rate=0.05, epochs=1, select_from=1, **settings)
        return method.permutations(learning), losses, samples

    orders, losses, samples = seen()
    assert samples == [4, 2]
    for portion, portions in [(1, [1] * 6), (3, [3, 1, 2]), (5, [4, 2])]:
        again, again_losses, again_samples = seen(micro_batch_size=portion)
        assert again_samples == portions
        assert same(orders, again)
        assert again_losses == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize(("stage", "stop_after"), [("all", 2), (1, 5)])
def test_an_interrupted_training_continues_to_the_same_result(
    tmp_path: Path, stage: str | int, stop_after: int
) -> None:
    settings = {"layers_per_stage": stage, "init": "random", "learning_rate": 0.05, "epochs": 3}
    settings |= {"batch_size": 2, "select_from": 3}  # of all stages, the best is not the last
    whole, epochs = learned(**settings), list[float]()

    def stop(values: dict[str, float]) -> None:
        epochs.append(values["epoch"])
        if len(epochs) == stop_after:
            raise Interrupt

    kept: dict[str, Any] = {"directory": tmp_path, "on_epoch": stop}
    with pytest.raises(Interrupt):
        lcp(**settings).permutations(problem(**kept))
    continued = lcp(**settings).permutations(problem(**kept))
    assert len(epochs) == (3 if stage == "all" else 6)
    assert same(whole, continued)


def test_stages_learn_in_turn_on_what_the_pruned_layers_before_give() -> None:
    told: list[dict[str, Any]] = []
    settings: dict[str, Any] = {"layers_per_stage": 1, "init": "random", "learning_rate": 0.05}
    orders = learned(told, **settings, block_size=32, epochs=3, select_from=3)
    assert [values["first_layer"] for values in told] == [0] * 3 + [1] * 3
    measured = [values["measured_loss"] for values in told]
    # The last stage's measured loss is that of the whole model, really pruned.
    assert output_loss(orders) == pytest.approx(min(measured[3:]), rel=1e-4)
    # The first stage's is that of the model with only its first layer pruned, after that layer.
    model = tiny_model("llama")
    learning, dense = problem(model), states_of(model, 1)
    pruned(model, Wanda(), factors=learning.factors, permutations=orders)
    first = float(cosine_loss(states_of(model, 1), dense))
    assert first == pytest.approx(min(measured[:3]), rel=1e-4)


def test_a_layer_is_dense_again_when_its_stage_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learning = problem(model)

    def none_kept(_: object, path: str) -> Tensor:
        return torch.zeros_like(linear_at(model, path).weight).bool()

    monkeypatch.setattr(LayerStream, "advance", Mock(side_effect=Interrupt))
    with pytest.raises(Interrupt):
        LayerOutputs(learning, none_kept).after(1)
    assert same(model.state_dict(), before)


def test_windows_split_what_learns_and_choose_the_loss() -> None:
    assert lcp(layers_per_stage=2).spans(5) == [range(0, 2), range(2, 4), range(4, 5)]
    assert lcp(layers_per_stage=2, last_layers=3).spans(5) == [range(2, 4), range(4, 5)]
    assert lcp().spans(5) == lcp(layers_per_stage=99).spans(5) == [range(5)]
    assert (lcp(loss=None).loss, lcp(loss=None, layers_per_stage=2).loss) == ("kl", "cosine")


def test_channels_do_not_leave_their_blocks_of_the_start_order() -> None:
    orders = learned(init="random", block_size=16, epochs=3, learning_rate=0.1)
    for order in orders.values():
        assert torch.equal(order.view(-1, 16).sort().values.flatten(), torch.arange(len(order)))
    assert any(not torch.equal(order, torch.arange(len(order))) for order in orders.values())


def test_only_the_last_layers_learn_and_the_others_get_the_heuristic() -> None:
    orders = learned(last_layers=1, init="random", epochs=2, learning_rate=0.1)
    learning = problem()
    searched = Heuristic("free").permutations(learning)
    for group in learning.groups:
        assert torch.equal(orders[group.name], searched[group.name]) == (group.layer == 0)


def test_a_loss_that_is_not_finite_stops_at_once_names_the_layer_and_keeps_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, updates, epochs = tiny_model("llama"), set[int](), [1]
    update = torch.optim.AdamW.step

    def step(optimizer: torch.optim.AdamW) -> None:
        updates.add(epochs[-1])
        update(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)

    def break_layer(values: dict[str, float]) -> None:
        epochs.append(int(values["epoch"]) + 1)
        if values["epoch"] == 2:
            decoder_layers(model)[1].input_layernorm.weight.data[0] = float("nan")

    learning = problem(model, directory=tmp_path, on_epoch=break_layer)
    with pytest.raises(TrainingError, match=r"epoch 3: .*decoder layer 1 "):
        lcp(epochs=5).permutations(learning)
    assert updates == {1, 2}  # the loss is read before the logits change
    assert isinstance(linear_at(model, "model.layers.0.self_attn.q_proj"), torch.nn.Linear)


def test_a_measured_loss_that_is_not_finite_stops_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objective, "mean", lambda self: float("nan"))
    with pytest.raises(TrainingError):
        learned(epochs=1, select_from=1, last_layers=1)


def test_logits_that_are_not_finite_name_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    real, name = LCP.start_logits, "model.layers.1.mlp.down_proj"

    def broken(*args: Any) -> dict[str, BlockLogits]:
        logits = real(*args)
        logits[name].logits[0].data[0, 0, 0] = float("nan")
        return logits

    monkeypatch.setattr(LCP, "start_logits", broken)
    with pytest.raises(TrainingError, match=f"epoch 1.*{name}"):
        learned()


def test_bfloat16_weights_learn_with_float32_logits() -> None:
    moving, still = (lcp(init="random", learning_rate=rate) for rate in (0.1, 1e-12))
    learning = problem(tiny_model("llama", dtype=torch.bfloat16))
    logits = [stack for block in begin(moving, learning).values() for stack in block.logits]
    assert {stack.dtype for stack in logits} == {torch.float32}
    assert not same(moving.permutations(learning), still.permutations(learning))


def test_schedules() -> None:
    expected = {
        Linear(1.0, 0.1): [1.0, 0.775, 0.55, 0.1],
        Cosine(1.0, 0.0001): [1.0, 0.8536, 0.50005, 0.0001],
        Exponential(1.0, 0.01): [1.0, 0.3162, 0.1, 0.01],
        Constant(0.3): [0.3] * 4,
    }
    for schedule, values in expected.items():
        found = [schedule(progress) for progress in (0.0, 0.25, 0.5, 1.0)]
        assert found == pytest.approx(values, abs=1e-4)


def test_the_temperature_falls_from_step_to_step() -> None:
    seen: list[float] = []
    learning = problem(on_step=lambda _, values: seen.append(values["temperature"]))
    lcp(epochs=3, learning_rate=1e-9).permutations(learning)
    assert seen == pytest.approx([Linear(1.0, 0.1)(step / 5) for step in range(6)])


def test_each_epoch_and_each_seed_has_its_own_order_of_the_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[Tensor] = []

    def step(_: Trainer, batch: Tensor, progress: Progress) -> dict[str, float]:
        batches.append(batch)
        return {"loss": 0.0}

    monkeypatch.setattr(Trainer, "step", step)
    for seed in (0, 1):
        learning = problem(samples=tokens(10))
        learning.seed = seed
        lcp(epochs=2, batch_size=5, select_from=0).permutations(learning)
    epochs = [torch.cat(batches[first : first + 2]).tolist() for first in range(0, 8, 2)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] != epochs[2]


def test_the_gradient_of_a_shared_order_is_the_sum_over_its_groups() -> None:
    found: dict[str, dict[str, Tensor]] = {}
    for constraint in ("free", "foldable"):
        settings = lcp(constraint=constraint, init="random", epochs=1, batch_size=6)
        learning = problem(tiny_model("llama", dtype=torch.float64))
        blocks = begin(settings, learning)
        for block in blocks.values():
            # The same logits everywhere: then every group has the same soft and hard permutations,
            # shared or not.
            for stack in block.logits:
                stack.data.copy_(torch.eye(stack.shape[1]) + 0.1 * torch.arange(stack.shape[1]))
        found[constraint] = gradients(settings, learning, blocks)
    free, tied = found["free"], found["foldable"]
    whole = sum(free[name] for name in free if name.endswith(("qkv_proj", "gate_up_proj")))
    torch.testing.assert_close(tied[RESIDUAL], whole, rtol=1e-9, atol=1e-12)
    down = "model.layers.1.mlp.down_proj"
    torch.testing.assert_close(tied[down], free[down], rtol=1e-9, atol=1e-12)


def test_an_order_of_the_whole_model_stays_unless_all_layers_learn_together() -> None:
    learning = problem()
    settings = lcp(constraint="foldable", block_size=16, layers_per_stage=1, learning_rate=0.1)
    moved = folded_permutations(learning.groups, settings.permutations(learning))
    start = folded_permutations(learning.groups, Heuristic("foldable").permutations(learning))
    assert torch.equal(moved[RESIDUAL], start[RESIDUAL])
    assert not same(moved, start)


@pytest.mark.parametrize(
    ("loss", "straight_through"), [("cosine", "swap"), ("kl", "hard"), ("cosine", "soft")]
)
def test_the_gradients_of_a_float16_model_do_not_vanish(loss: str, straight_through: str) -> None:
    samples = tokens(64, 64)
    settings = lcp(epochs=1, batch_size=len(samples), loss=loss, straight_through=straight_through)
    found = []
    for dtype in (torch.float32, torch.float16):
        model = tiny_model("llama", dtype=torch.float16).to(dtype)
        # As large as states of trained models are: the gradient of a mean over these tokens is
        # nothing in float16.
        model.get_input_embeddings().weight.data.mul_(3000.0)
        learning = problem(model, samples=samples)
        blocks = begin(settings, learning)
        with products_in(dtype, CPU):
            gradients(settings, learning, blocks)
        stacks = (stack for block in blocks.values() for stack in block.logits)
        found.append(torch.cat([stack.grad.double().flatten() for stack in stacks]))
    # The softmax of a group, which the others go through, is steep in differences that float16
    # rounds.
    assert torch.cosine_similarity(*found, dim=0) > (0.99 if straight_through == "swap" else 0.98)


def test_more_epochs_than_there_are_cannot_be_selected_from() -> None:
    for settings in ({"epochs": 1, "select_from": 2}, {"epochs": 3, "select_from": 4}):
        with pytest.raises(ConfigError, match="select_from"):
            lcp(**settings)
    assert lcp(epochs=3, select_from=3).select_from == 3
    assert lcp(steps=1, epochs=1, select_from=2).select_from == 2  # epochs do not count


def test_a_block_size_that_no_group_has_is_named(caplog: pytest.LogCaptureFixture) -> None:
    groups = channel_groups(tiny_model("llama"))
    largest = max(group.channels for group in groups)
    for block_size in (largest, largest + PATTERN.m):
        lcp(block_size=block_size).check_groups(Mock(pattern=PATTERN), groups, 2)
    (message,) = caplog.messages
    assert f"block_size={largest + PATTERN.m}: " in message


def test_the_norms_of_our_recipe_have_no_number_of_tokens() -> None:
    assert lcp().norm_tokens == 1
    assert lcp(conventions="paper").norm_tokens is None
    with pytest.raises(ConfigError, match="norm_tokens"):
        lcp(norm_tokens=8)
    with pytest.raises(ConfigError, match=r"permutation\.norm_tokens: permutation=lcp "):
        composed(["model=tiny-random", "permutation=lcp", "permutation.norm_tokens=8"])
