"""Dealing groups to blocks between rounds: the masks stay, and what is said to share a block does."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from permllm.calibration.saliency import saliency
from permllm.errors import ConfigError, TrainingError
from permllm.learning.problem import LearningProblem
from permllm.learning.training import Moment, Training, Window
from permllm.models.decoder import layer_inputs, run_layer
from permllm.models.families import decoder_layers, linear_at
from permllm.models.losses import mean_square_loss
from permllm.permutation.lcp import dealing, method
from permllm.permutation.lcp.dealing import (
    Exchanges,
    by_affinity,
    contest,
    contested_deal,
    exchange_deal,
    exchange_gain,
    random_deal,
)
from permllm.permutation.shared import RESIDUAL, SharedOrder, shared_orders
from permllm.pruning.wanda import Wanda
from permllm.sparsity import NMPattern, nm_mask
from tests.conftest import tiny_model
from tests.pruning.test_pipeline import PATTERN, lcp, problem


def groups_of(order: Tensor, m: int = 4) -> set[tuple[int, ...]]:
    return {tuple(group) for group in order.view(-1, m).tolist()}


@pytest.mark.parametrize("segment", [32, 16])
def test_dealing_moves_whole_groups_inside_of_their_segments(segment: int) -> None:
    generator = torch.Generator().manual_seed(0)
    order = torch.cat([first + torch.randperm(segment, generator=generator) for first in range(0, 32, segment)])
    dealt = random_deal(SharedOrder("x", 32, segment, 1, ()), order, PATTERN, generator)
    assert not torch.equal(order, dealt)
    assert groups_of(dealt) == groups_of(order)
    assert torch.equal(dealt // segment, order // segment)


def test_the_most_contested_groups_share_a_block() -> None:
    # By row: the second largest of four, and the third, which is left out.
    scores = torch.tensor([[9.0, 8, 4, 0, 5, 0, 0, 0], [7.0, 4, 4, 1, 2, 2, 1, 0]])
    assert contest(scores, 4, PATTERN).tolist() == [4 / 8 + 4 / 4, 0 + 1 / 2]
    # Of groups of a smaller M, the mean of those in one of the largest.
    assert contest(scores, 8, PATTERN).tolist() == [(1.5 + 0.5) / 2]
    assert contest(scores, 4, NMPattern(3, 4)).tolist() == [0 + 1 / 4, 0.0]
    model = tiny_model("llama")
    learning = problem(model, Wanda())
    order = shared_orders(learning.groups, "free")[0]
    present = torch.arange(order.channels)
    dealt = contested_deal(order, present, PATTERN, learning.saliency_of)
    rows = torch.cat([saliency(linear_at(model, path).weight, learning.factors[path]) for path in order.groups[0].members])
    ranked = rows[:, dealt].unflatten(1, (-1, 4)).sort(dim=2).values
    found = (ranked[..., 1] / ranked[..., 2]).sum(0)
    assert (found.diff() >= -1e-4).all()
    assert groups_of(dealt) == groups_of(present)


def test_what_an_exchange_gains_is_the_best_of_all_pairs() -> None:
    changes = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = exchange_gain(changes)
    for a in range(3):
        for b in range(3):
            pairs = [
                changes[c, a] - changes[c, b] + changes[d, b] - changes[d, a]
                for c in range(4 * a, 4 * a + 4)
                for d in range(4 * b, 4 * b + 4)
            ]
            assert float(found[a, b]) == pytest.approx(max(0.0, *map(float, pairs)))


def test_blocks_are_of_groups_that_belong_together() -> None:
    generator = torch.Generator().manual_seed(0)
    shuffled = torch.randperm(10, generator=generator)
    block_of = torch.empty(10, dtype=torch.int64)
    block_of[shuffled] = torch.arange(10) // 4  # two blocks of four, and what is left
    noise = torch.rand(10, 10, generator=generator)
    affinity = (block_of[:, None] == block_of).float() * 5 + (noise + noise.t()) * 0.1
    given = affinity.double()
    sequence = by_affinity(given, 4)
    assert torch.equal(given, affinity.double())
    assert sorted(sequence.tolist()) == list(range(10))
    assert [len(set(block_of[part].tolist())) for part in sequence.split(4)] == [1, 1, 1]


def test_spans_are_of_whole_blocks() -> None:
    assert [dealing.span_size(block_size) for block_size in (48, 64, 600, 2048)] == [1008, 1024, 1200, 4096]


def test_groups_are_dealt_by_the_exchanges_in_their_span() -> None:
    """Two spans of 16 positions, blocks of two groups: in each span the groups 0 and 2 want to exchange, and 1 and 3."""
    order = SharedOrder("x", 32, 32, 1, ())
    present = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    changes = torch.zeros(2, 16, 4)
    for first, second in ((0, 2), (2, 0), (1, 3), (3, 1)):
        changes[:, 4 * first + 1, second] = -1.0 - first
    dealt = exchange_deal(order, present, PATTERN, [changes], 8)
    assert groups_of(dealt) == groups_of(present)
    blocks = [groups_of(block) for block in dealt.split(8)]
    groups = present.view(8, 4)
    expected = [groups_of(groups[[first, first + 2]].flatten()) for first in (0, 1, 4, 5)]
    assert sorted(map(sorted, blocks)) == sorted(map(sorted, expected))
    assert torch.equal(dealt[:16].sort().values, present[:16].sort().values)


def of_masks(model: nn.Module, learning: LearningProblem, batches: list[Tensor]) -> dict[str, Tensor]:
    """The derivative of the loss by every entry of every mask, kept or not, in the model's own order; a sum over batches."""
    scores = {path: learning.saliency_of(path) for group in learning.groups for path in group.members}
    patterns = {path: learning.pattern_of(group) for group in learning.groups for path in group.members}
    dense = {path: linear_at(model, path).weight.data.clone() for path in scores}
    for path, score in scores.items():
        weight = linear_at(model, path).weight
        weight.data = torch.where(nm_mask(score, patterns[path]), weight.data, 0.0)
        weight.requires_grad_(True)
    for batch in batches:
        inputs = layer_inputs(model, learning.tokens[batch])
        hidden = inputs.hidden
        for layer, kwargs in zip(decoder_layers(model), inputs.kwargs, strict=True):
            hidden = run_layer(layer, hidden, kwargs)
        mean_square_loss(hidden, learning.target[batch]).backward()
    found: dict[str, Tensor] = {}
    for path, values in dense.items():
        gradient = linear_at(model, path).weight.grad
        assert gradient is not None
        found[path] = gradient * values
    return found


def joining(score: Tensor, derivative: Tensor, pattern: NMPattern, channel: int, group: int) -> float:
    """What a channel changes that takes the place of a random member of a group, row by row."""
    found = 0.0
    for gone in range(pattern.m):
        stay = [pattern.m * group + place for place in range(pattern.m) if place != gone]
        for values, of_row in zip(score.tolist(), derivative.tolist(), strict=True):
            displaced = sorted(stay, key=values.__getitem__)[-pattern.n]
            if values[channel] > values[displaced]:
                found += (of_row[channel] - of_row[displaced]) / pattern.m
    return found


@pytest.mark.parametrize(
    ("constraint", "name", "several"),
    [
        ("free", "model.layers.1.mlp.down_proj", False),
        ("foldable", RESIDUAL, False),
        ("foldable", RESIDUAL, True),
        ("foldable", "model.layers.0.self_attn.o_proj", False),
    ],
)
def test_the_gradient_of_an_exchange_is_what_it_changes(
    constraint: Any, name: str, several: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the derivative of the loss by the mask's entries: of one group, of all that share an order, of heads."""
    monkeypatch.setattr(dealing, "_WIDE", 16)
    model = tiny_model("llama", dtype=torch.float64)
    learning = problem(model, Wanda())
    if several:  # groups of 8 in the order that others with groups of 4 share
        name_of_first = learning.groups[0].table.name
        learning.groups = [
            replace(group, pattern=NMPattern(4, 8)) if group.table.name == name_of_first else group
            for group in learning.groups
        ]
    shared = shared_orders(learning.groups, constraint)
    (order,) = (one for one in shared if one.name == name)
    settings = lcp(constraint=constraint, loss="mse", block_size=dealing.span_size(8))
    orders = {one.name: torch.arange(one.channels) for one in shared}
    window = Window(0, 0, 0, len(decoder_layers(model)), None, learning.target)
    batches = list(torch.arange(len(learning.tokens)).split(4))
    with settings.masked(learning, shared, window) as linears:
        exchanges = Exchanges(settings, shared, shared, window, orders, linears, learning)
        training = Training(settings, learning, window, [exchanges], "lcp", "")
        training.gradients(batches, Moment(0, 1, 0, 1))
        stack = exchanges.changes(order, PATTERN)[0]
    size, m = stack.shape[1], order.m(PATTERN)
    assert size == min(16, order.segment)
    assert m == (8 if several else 4)
    saliencies = {path: learning.saliency_of(path) for group in order.groups for path in group.members}
    derivative = of_masks(model, learning, batches)
    last = len(stack) - 1
    for span, channel, other in ((0, 1, size // m - 1), (last, size - 1, 0)):
        expected = 0.0
        for group in order.groups:
            its = learning.pattern_of(group)
            for path in group.members:
                for copy in range(order.repeats):  # the copies of a segment lie one after the other in a group
                    segment, inside = divmod(span * size, order.segment)
                    first = (segment * order.repeats + copy) * order.segment + inside
                    parts = range((first + other * m) // its.m, (first + other * m + m) // its.m)
                    score, entries = saliencies[path], derivative[path]
                    found = [joining(score, entries, its, first + channel, part) for part in parts]
                    expected += sum(found) / len(found)
        assert float(stack[span, channel, other]) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("deal", ["random", "contested", "exchanges"])
@pytest.mark.parametrize("stage", ["all", 1])
def test_rounds_learn_with_any_deal(deal: Any, stage: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dealt: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
    real = method.LCP._dealt

    def watched(self: Any, problem: Any, shared: Any, window: Any, orders: Any) -> Any:
        dealt.append((dict(orders), real(self, problem, shared, window, orders)))
        return dealt[-1][1]

    monkeypatch.setattr(method.LCP, "_dealt", watched)
    monkeypatch.setattr(dealing, "_WIDE", 16)
    settings = {"deal": deal, "rounds": 2, "block_size": 8, "epochs": 1, "layers_per_stage": stage}
    orders = lcp(**settings).orders(problem(tiny_model("llama"), Wanda()))
    assert len(dealt) == (1 if stage == "all" else 2)
    for before, after in dealt:
        assert any(not torch.equal(before[name], order) for name, order in after.items())
        assert all(groups_of(before[name]) == groups_of(order) for name, order in after.items())

    def stop(values: dict[str, Any]) -> None:
        if values["round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lcp(**settings).orders(problem(tiny_model("llama"), Wanda(), directory=tmp_path, on_pass=stop))
    continued = lcp(**settings).orders(problem(tiny_model("llama"), Wanda(), directory=tmp_path))
    assert all(torch.equal(order, continued[name]) for name, order in orders.items())


def test_a_loss_that_is_not_finite_is_said_before_anything_is_dealt() -> None:
    learning = problem(tiny_model("llama"), Wanda())
    passes: list[Any] = []

    def broken(values: Any) -> None:
        passes.append(values)
        learning.target.fill_(math.inf)

    learning.on_pass = broken
    with pytest.raises(TrainingError, match="the loss is not finite"):
        lcp(deal="exchanges", rounds=2, block_size=8, epochs=1, select_from=1).orders(learning)
    assert len(passes) == 1


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"permutation\.deal='cards'"):
        lcp(deal="cards")
    with pytest.raises(ConfigError, match=r"permutation\.deal=exchanges needs permutation\.rounds=2"):
        lcp(deal="exchanges")
