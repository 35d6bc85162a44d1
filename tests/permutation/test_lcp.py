"""The training loop: it learns, is reproducible, continues, stops at NaN, and stays inside its blocks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from permllm.errors import TrainingError
from permllm.models.families import channel_groups, decoder_layers, linear_at
from permllm.models.layers import LayerStream
from permllm.permutation.foldable import RESIDUAL, foldable, shared_orders
from permllm.permutation.heuristic import Heuristic
from permllm.permutation.lcp import lcp as lcp_module
from permllm.permutation.lcp.learner import OrderLearner
from permllm.permutation.lcp.temperature import Constant, Cosine, Exponential, Linear
from permllm.pruning.layerwise import Found
from permllm.pruning.wanda import Wanda
from permllm.runtime.precision import products_in
from permllm.sparsity.calibrate import calibrate_dense
from permllm.training.kernels import EAGER
from permllm.training.learner import Moment, Window
from permllm.training.loop import Training
from permllm.training.losses import cosine_loss
from permllm.training.objective import Objective
from permllm.training.problem import LearningProblem
from permllm.training.windows import WindowStream
from tests.conftest import tiny_model
from tests.pruning.test_layerwise import PATTERN, lcp, problem, pruned, tokens


def test_weights_of_logits_decay_apart_from_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW (Loshchilov and Hutter, algorithm 2): after a step the logits differ by rate * decay * what they were."""
    real = Training.step
    seen: dict[float, tuple[list[Tensor], list[Tensor]]] = {}
    for decay in (0.0, 0.1):

        def step(self: Training, *given: Any, decay: float = decay) -> Any:
            logits = [value for part in self.learner.parameters() for value in part["params"]]
            before = [value.detach().clone() for value in logits]
            found = real(self, *given)
            seen.setdefault(decay, (before, [value.detach().clone() for value in logits]))
            return found

        monkeypatch.setattr(Training, "step", step)
        lcp(init="random", learning_rate=0.05, weight_decay=decay, epochs=1).orders(problem(tiny_model("llama"), Wanda()))
    (before, without), (same, decayed) = seen[0.0], seen[0.1]
    assert all(map(torch.equal, before, same))
    for start, plain, less in zip(before, without, decayed, strict=True):
        torch.testing.assert_close(plain - less, 0.05 * 0.1 * start, rtol=1e-3, atol=2e-7)


def output_loss(orders: dict[str, Tensor]) -> float:
    """Loss of the pruned model under given orders, by pruning for real."""
    return output_loss_of(orders, None)


def output_loss_of(orders: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None) -> float:
    """The same under given masks, or None for the pruner's."""
    model = tiny_model("llama")
    learning = problem(model, Wanda())
    pruned(model, Wanda(), Found(learning.factors, orders, masks))
    stream = LayerStream(model, tokens(), 4)
    for index in range(len(decoder_layers(model))):
        stream.advance(index)
    return float(cosine_loss(stream.states(), learning.target))


@pytest.mark.parametrize("init", ["random", "heuristic"])
@pytest.mark.parametrize("straight_through", ["swap", "hard", "soft"])
def test_learning_lowers_the_loss_of_the_really_pruned_model(init: str, straight_through: str) -> None:
    measured: list[float] = []
    learning = problem(tiny_model("llama"), Wanda(), on_epoch=lambda values: measured.append(values["measured_loss"]))
    settings = lcp(
        init=init,
        straight_through=straight_through,
        epochs=16,
        learning_rate=0.02,
        block_size=32,
        batch_size=3,
        select_from=16,
    )
    orders = settings.orders(learning)
    assert len(measured) == 16
    # The order that is returned is the one that was measured to be the best, not merely the last.
    assert output_loss(orders) == pytest.approx(min(measured), rel=1e-4)
    start = lcp(init=init, learning_rate=1e-9, margin=1.0, epochs=1).orders(learning)
    assert output_loss(orders) < 0.9 * output_loss(start)


def test_the_loss_of_a_step_is_the_loss_of_the_really_pruned_model() -> None:
    steps: list[float] = []
    learning = problem(tiny_model("llama"), Wanda(), on_step=lambda _, values: steps.append(values["loss"]))
    settings = lcp(margin=5.0, epochs=1, batch_size=6)  # one step, so far from the boundary that the order is the start's
    orders = settings.orders(learning)
    heuristic = {}
    for group in learning.groups:
        heuristic[group.name] = orders[group.name]
    assert steps == [pytest.approx(output_loss(heuristic), rel=1e-4)]


def test_the_loss_of_an_epoch_is_a_mean_over_its_samples() -> None:
    steps: list[float] = []
    epochs: list[float] = []
    learning = problem(
        tiny_model("llama"),
        Wanda(),
        on_step=lambda _, values: steps.append(values["loss"]),
        on_epoch=lambda values: epochs.append(values["loss"]),
    )
    lcp(init="random", learning_rate=0.05, batch_size=5, epochs=2).orders(learning)
    assert len(steps) == 4  # of five samples and of one
    assert epochs == pytest.approx([(5 * large + small) / 6 for large, small in (steps[:2], steps[2:])], rel=1e-12)
    assert epochs != pytest.approx([sum(steps[:2]) / 2, sum(steps[2:]) / 2], rel=1e-6)


def test_seeds_give_equal_results_and_other_seeds_others() -> None:
    def learned(seed: int) -> dict[str, Tensor]:
        learning = problem(tiny_model("llama"), Wanda())
        learning.seed = seed
        return lcp(init="random").orders(learning)

    first, again, other = learned(1), learned(1), learned(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("portion", [1, 3, 4, 5])
def test_a_step_in_portions_is_the_undivided_step(portion: int) -> None:
    def learned(micro_batch_size: int | None) -> tuple[dict[str, Tensor], list[float], list[float], list[int]]:
        steps: list[float] = []
        passes: list[float] = []
        learning = problem(
            tiny_model("llama", dtype=torch.float64),
            Wanda(),
            on_step=lambda _, values: steps.append(values["loss"]),
            on_epoch=lambda values: passes.append(values["measured_loss"]),
        )
        samples: list[int] = []

        def count(_: Any, args: tuple[Tensor]) -> None:
            if torch.is_grad_enabled():
                samples.append(len(args[0]))

        decoder_layers(learning.model)[0].mlp.register_forward_pre_hook(count)  # type: ignore[union-attr, operator]
        settings = lcp(init="random", learning_rate=0.05, micro_batch_size=micro_batch_size)
        return settings.orders(learning), steps, passes, samples

    orders, steps, passes, samples = learned(None)
    assert samples == [4, 2] * 2
    again, again_steps, again_passes, portions = learned(portion)
    assert portions == {1: [1] * 12, 3: [3, 1, 2] * 2, 4: [4, 2] * 2, 5: [4, 2] * 2}[portion]
    assert all(torch.equal(orders[name], again[name]) for name in orders)
    assert again_steps == pytest.approx(steps, rel=1e-12)
    assert again_passes == pytest.approx(passes, rel=1e-12)


def test_an_interrupted_training_continues_to_the_same_result(tmp_path: Path) -> None:
    whole = lcp(epochs=4, init="random").orders(problem(tiny_model("llama"), Wanda()))

    class Interrupt(Exception):
        pass

    def stop(values: dict[str, float]) -> None:
        if values["epoch"] == 2:
            raise Interrupt

    model = tiny_model("llama")
    with pytest.raises(Interrupt):
        lcp(epochs=4, init="random").orders(problem(model, Wanda(), directory=tmp_path, on_epoch=stop))
    seen: list[float] = []
    learning = problem(model, Wanda(), directory=tmp_path, on_epoch=lambda values: seen.append(values["epoch"]))
    continued = lcp(epochs=4, init="random").orders(learning)
    assert seen == [3, 4]
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_stages_learn_in_turn_on_what_the_pruned_layers_before_give() -> None:
    seen: list[dict[str, float]] = []
    settings = {
        "layers_per_stage": 1,
        "init": "random",
        "epochs": 10,
        "select_from": 10,
        "learning_rate": 0.05,
        "block_size": 32,
    }
    learning = problem(tiny_model("llama"), Wanda(), on_epoch=seen.append)
    orders = lcp(**settings).orders(learning)
    assert [values["first_layer"] for values in seen] == [0] * 10 + [1] * 10
    # The last stage's measured loss is that of the whole model, really pruned.
    assert output_loss(orders) == pytest.approx(min(values["measured_loss"] for values in seen[10:]), rel=1e-4)
    # The first stage's is that of the model with only its first layer pruned, after that layer.
    model = tiny_model("llama")
    dense = LayerStream(model, tokens(), 4)
    dense.advance(0)
    pruned(model, Wanda(), Found(learning.factors, orders))
    sparse = LayerStream(model, tokens(), 4)
    sparse.advance(0)
    first = float(cosine_loss(sparse.states(), dense.states()))
    assert first == pytest.approx(min(values["measured_loss"] for values in seen[:10]), rel=1e-4)


def test_a_layer_is_dense_again_when_its_stage_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learning = problem(model, Wanda())

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(LayerStream, "advance", stopped)
    with pytest.raises(KeyboardInterrupt):
        WindowStream(learning).inputs(1, lambda group, path: torch.zeros_like(linear_at(model, path).weight, dtype=torch.bool))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_stage_larger_than_the_model_is_the_model() -> None:
    whole = lcp(init="random").orders(problem(tiny_model("llama"), Wanda()))
    windowed = lcp(init="random", layers_per_stage=99).orders(problem(tiny_model("llama"), Wanda()))
    assert all(torch.equal(whole[name], windowed[name]) for name in whole)


def test_without_a_loss_it_follows_from_the_window() -> None:
    assert lcp(loss=None).loss == "kl"
    assert lcp(loss=None, layers_per_stage=2).loss == "cosine"


def test_windows_split_what_learns() -> None:
    assert lcp(layers_per_stage=2).spans(5) == [(0, 2), (2, 4), (4, 5)]
    assert lcp(layers_per_stage=2, last_layers=3).spans(5) == [(2, 4), (4, 5)]
    assert lcp().spans(5) == [(0, 5)]


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupted_training_in_windows_continues_to_the_same_result(tmp_path: Path, stop_after: int) -> None:
    settings = {"layers_per_stage": 1, "init": "random", "epochs": 2, "learning_rate": 0.05}
    whole = lcp(**settings).orders(problem(tiny_model("llama"), Wanda()))

    class Interrupt(Exception):
        pass

    seen: list[float] = []

    def stop(values: dict[str, float]) -> None:
        seen.append(values["epoch"])
        if len(seen) == stop_after:
            raise Interrupt

    with pytest.raises(Interrupt):
        lcp(**settings).orders(problem(tiny_model("llama"), Wanda(), directory=tmp_path, on_epoch=stop))
    continued = lcp(**settings).orders(problem(tiny_model("llama"), Wanda(), directory=tmp_path, on_epoch=stop))
    assert len(seen) == 4
    assert all(torch.equal(whole[name], continued[name]) for name in whole)


def test_the_divergence_learns_too() -> None:
    measured: list[float] = []
    learning = problem(tiny_model("llama"), Wanda(), on_epoch=lambda values: measured.append(values["measured_loss"]))
    settings: dict[str, Any] = {"loss": "kl", "block_size": 32, "batch_size": 3}
    lcp(epochs=16, learning_rate=0.02, select_from=16, **settings).orders(learning)
    start: list[float] = []
    learning = problem(tiny_model("llama"), Wanda(), on_epoch=lambda values: start.append(values["measured_loss"]))
    lcp(epochs=1, learning_rate=1e-9, margin=1.0, **settings).orders(learning)
    assert min(measured) < 0.95 * start[0]


def test_channels_do_not_leave_their_blocks_of_the_start_order() -> None:
    orders = lcp(init="random", block_size=16, epochs=3, learning_rate=0.1).orders(problem(tiny_model("llama"), Wanda()))
    moved = False
    for order in orders.values():
        for start in range(0, len(order), 16):
            block = order[start : start + 16]
            assert sorted(block.tolist()) == list(range(start, start + 16))
            moved |= not torch.equal(block, torch.arange(start, start + 16))
    assert moved


def test_only_the_last_layers_learn_and_the_others_get_the_heuristic() -> None:
    model = tiny_model("llama")
    learning = problem(model, Wanda())
    orders = lcp(last_layers=1, init="random", epochs=2, learning_rate=0.1).orders(learning)
    searched = Heuristic().orders(learning)
    for group in learning.groups:
        assert torch.equal(orders[group.name], searched[group.name]) == (group.layer == 0)


def test_checkpointing_activations_changes_nothing() -> None:
    with_it = lcp(activation_checkpointing=True, init="random").orders(problem(tiny_model("llama"), Wanda()))
    without = lcp(activation_checkpointing=False, init="random").orders(problem(tiny_model("llama"), Wanda()))
    assert all(torch.equal(with_it[name], without[name]) for name in with_it)


def test_a_loss_that_is_not_finite_stops_at_once_names_the_layer_and_keeps_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    updates: list[int] = []
    update = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: updates.append(passes[-1]) or update(self))
    passes = [1]

    def break_layer(values: dict[str, float]) -> None:
        passes.append(int(values["epoch"]) + 1)
        if values["epoch"] == 2:
            norm = decoder_layers(model)[1].input_layernorm
            norm.weight.data[0] = float("nan")

    with pytest.raises(TrainingError, match=r"epoch 3: .*decoder layer 1 .*best_so_far\.safetensors") as caught:
        lcp(epochs=5).orders(problem(model, Wanda(), directory=tmp_path, on_epoch=break_layer))
    assert set(updates) == {1, 2}  # the loss is read after backward, and still before the logits change
    kept = load_file(tmp_path / "best_so_far.safetensors")
    assert set(kept) == {group.name for group in channel_groups(model)}
    assert str(tmp_path) in str(caught.value)
    assert isinstance(linear_at(model, "model.layers.0.self_attn.q_proj"), torch.nn.Linear)


def test_bfloat16_weights_learn_with_float32_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    real, dtypes = lcp_module.LCP.start_logits, set()

    def noted(*args: Any, **keywords: Any) -> Any:
        found = real(*args, **keywords)
        dtypes.update(stack.dtype for blocks in found.values() for stack in blocks.logits)
        return found

    monkeypatch.setattr(lcp_module.LCP, "start_logits", noted)
    learned, start = (
        lcp(init="random", learning_rate=rate).orders(problem(tiny_model("llama", dtype=torch.bfloat16), Wanda()))
        for rate in (0.1, 1e-12)
    )
    assert dtypes == {torch.float32}
    assert any(not torch.equal(order, start[name]) for name, order in learned.items())


def test_logits_that_are_not_finite_name_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    real = lcp_module.LCP.start_logits

    def broken(*args: Any, **keywords: Any) -> Any:
        logits = real(*args, **keywords)
        logits["model.layers.1.mlp.down_proj"].logits[0].data[0, 0, 0] = float("nan")
        return logits

    monkeypatch.setattr(lcp_module.LCP, "start_logits", broken)
    with pytest.raises(
        TrainingError, match=r"epoch 1: the soft permutation of model\.layers\.1\.mlp\.down_proj is not finite"
    ):
        lcp().orders(problem(tiny_model("llama"), Wanda()))


def test_a_measured_loss_that_is_not_finite_stops_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Objective, "mean", lambda self, count: float("nan"))
    model = tiny_model("llama")
    with pytest.raises(TrainingError, match=r"best_so_far\.safetensors"):
        lcp(epochs=1, last_layers=1).orders(problem(model, Wanda(), directory=tmp_path))
    # Also the groups that do not learn are in the file, so that it serves as permutation.path.
    assert set(load_file(tmp_path / "best_so_far.safetensors")) == {group.name for group in channel_groups(model)}


def test_no_sinkhorn_iterations_are_valid() -> None:
    lcp(sinkhorn_iterations=0).orders(problem(tiny_model("llama"), Wanda()))


def test_schedules() -> None:
    progress = [0.0, 0.25, 0.5, 1.0]
    assert [Linear(1.0, 0.1)(p) for p in progress] == pytest.approx([1.0, 0.775, 0.55, 0.1])
    assert [Cosine(1.0, 0.0001)(p) for p in progress] == pytest.approx([1.0, 0.8536, 0.50005, 0.0001], abs=1e-4)
    assert [Exponential(1.0, 0.01)(p) for p in progress] == pytest.approx([1.0, 0.3162, 0.1, 0.01], abs=1e-4)
    assert [Constant(0.3)(p) for p in progress] == [0.3] * 4


def test_foldable_learning_finds_orders_that_fold_and_lowers_the_loss() -> None:
    measured: list[float] = []
    learning = problem(tiny_model("llama"), Wanda(), on_epoch=lambda values: measured.append(values["measured_loss"]))
    settings: dict[str, Any] = {"constraint": "foldable", "init": "random", "block_size": 16}
    orders = lcp(epochs=16, learning_rate=0.02, select_from=16, **settings).orders(learning)
    shared = foldable(learning.groups, orders)  # raises where one does not
    still = lcp(epochs=1, learning_rate=1e-12, **settings).orders(problem(tiny_model("llama"), Wanda()))
    assert not torch.equal(shared[RESIDUAL], foldable(learning.groups, still)[RESIDUAL])  # of the whole model, learned too
    assert output_loss(orders) == pytest.approx(min(measured), rel=1e-4)
    start = {group.name: torch.arange(group.channels) for group in learning.groups}
    assert output_loss(orders) < 0.95 * output_loss(start)


def test_the_gradient_of_a_shared_order_is_the_sum_over_its_groups() -> None:
    found: dict[str, dict[str, Tensor]] = {}
    for constraint in ("free", "foldable"):
        settings = lcp(constraint=constraint, init="random", epochs=1, batch_size=6, straight_through="swap", loss="cosine")
        learning = problem(tiny_model("llama", dtype=torch.float64), Wanda())
        shared = shared_orders(learning.groups, settings.constraint)
        start = {order.name: torch.arange(order.channels) for order in shared}
        blocks = settings.start_logits(learning, shared, start)
        for block in blocks.values():
            # The same logits everywhere: then every group has the same soft and hard permutations, shared or not.
            for stack in block.logits:
                stack.data.copy_(torch.eye(stack.shape[1]) + 0.1 * torch.arange(stack.shape[1]))
        window = Window(0, 0, 2, None, learning.target)
        with settings.masked(learning, shared, window, EAGER) as linears:
            learner = OrderLearner(settings, learning, shared, window, start, blocks, linears)
            training = Training(settings, learning, window, learner, "lcp", "checkpoint")
            moment = Moment(0, 1, 0, 1)
            learner.begin(moment)
            training.objective.loss(torch.arange(6), moment).backward()
            learner.collect()
        found[constraint] = {name: block.logits[0].grad for name, block in blocks.items()}
    free, tied = found["free"], found["foldable"]
    readers = [name for name in free if name.endswith(("qkv_proj", "gate_up_proj"))]
    torch.testing.assert_close(tied[RESIDUAL], sum(free[name] for name in readers), rtol=1e-9, atol=1e-12)
    down = "model.layers.1.mlp.down_proj"
    torch.testing.assert_close(tied[down], free[down], rtol=1e-9, atol=1e-12)


def test_an_order_of_the_whole_model_stays_where_it_starts_unless_all_layers_learn_together() -> None:
    settings: dict[str, Any] = {"constraint": "foldable", "block_size": 16, "layers_per_stage": 1, "loss": "cosine"}
    learning = problem(tiny_model("llama"), Wanda())
    learned = foldable(learning.groups, lcp(epochs=3, learning_rate=0.1, **settings).orders(learning))
    start = foldable(learning.groups, Heuristic("foldable").orders(learning))
    assert torch.equal(learned[RESIDUAL], start[RESIDUAL])
    assert any(not torch.equal(learned[name], order) for name, order in start.items())


@pytest.mark.parametrize(
    ("loss", "straight_through"), [("cosine", "swap"), ("kl", "swap"), ("kl", "hard"), ("cosine", "soft")]
)
def test_the_gradients_of_a_float16_model_do_not_vanish(loss: str, straight_through: str) -> None:
    samples = torch.randint(0, 259, (64, 64), generator=torch.Generator().manual_seed(0))

    def gradients(dtype: torch.dtype) -> Tensor:
        model = tiny_model("llama", dtype=torch.float16).to(dtype)
        # As large as states of trained models are: the gradient of a mean over these tokens is nothing in float16.
        model.get_input_embeddings().weight.data.mul_(3000.0)
        groups = channel_groups(model)
        dense = calibrate_dense(model, groups, samples, Wanda(), batch_size=16)
        learning = LearningProblem(model, groups, samples, dense.factors, dense.target, PATTERN, seed=0)
        settings = lcp(epochs=1, batch_size=len(samples), loss=loss, straight_through=straight_through)
        shared = shared_orders(groups, "free")
        start = {order.name: torch.arange(order.channels) for order in shared}
        blocks = settings.start_logits(learning, shared, start)
        window, moment = Window(0, 0, 2, None, learning.target), Moment(0, 1, 0, 1)
        with settings.masked(learning, shared, window, EAGER) as linears:
            learner = OrderLearner(settings, learning, shared, window, start, blocks, linears)
            training = Training(settings, learning, window, learner, "lcp", "checkpoint")
            learner.begin(moment)
            with products_in(dtype, torch.device("cpu")):
                training.objective.backward(torch.arange(len(samples)), moment)
        return torch.cat([stack.grad.double().flatten() for block in blocks.values() for stack in block.logits])

    exact, half = gradients(torch.float32), gradients(torch.float16)
    # The softmax of a group, which the others go through, is steep in differences that float16 rounds.
    assert torch.cosine_similarity(exact, half, dim=0) > (0.99 if straight_through == "swap" else 0.98)
