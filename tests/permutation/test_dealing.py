"""Dealing groups to blocks between rounds: the masks stay, and what is said to share a block does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.calibration.saliency import saliency
from permllm.errors import ConfigError
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
    exchange_gain,
    random_deal,
)
from permllm.permutation.shared import SharedOrder, shared_orders
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
    sequence = by_affinity(affinity, 4)
    assert sorted(sequence.tolist()) == list(range(10))
    assert [len(set(block_of[part].tolist())) for part in sequence.split(4)] == [1, 1, 1]


@pytest.mark.parametrize("constraint", ["free", "foldable"])
def test_the_gradient_of_an_exchange_is_what_it_changes(constraint: Any) -> None:
    """Against the derivative of the loss by the mask's entries, for a channel that joins another group."""
    model = tiny_model("llama", dtype=torch.float64)
    learning = problem(model, Wanda())
    settings = lcp(constraint=constraint, loss="mse", block_size=dealing.WIDEST)
    shared = shared_orders(learning.groups, constraint)
    orders = {order.name: torch.arange(order.channels) for order in shared}
    window = Window(0, 0, 0, len(decoder_layers(model)), None, learning.target)
    samples = torch.arange(len(learning.tokens))
    with settings.masked(learning, shared, window) as linears:
        exchanges = Exchanges(shared, shared, window, orders, linears, learning)
        training = Training(settings, learning, window, [exchanges], "lcp", "")
        training.gradients([samples], Moment(0, 1, 0, 1))
        found = exchanges.changes(shared[-1], PATTERN)[0][0]

    path = shared[-1].groups[0].members[0]
    scores = {name: learning.saliency_of(name) for group in learning.groups for name in group.members}
    dense = linear_at(model, path).weight.data.clone()
    for name, score in scores.items():
        linear = linear_at(model, name)
        linear.weight.data = torch.where(nm_mask(score, PATTERN), linear.weight.data, 0.0)
    linear_at(model, path).weight.requires_grad_(True)
    inputs = layer_inputs(model, learning.tokens)
    hidden = inputs.hidden
    for layer, kwargs in zip(decoder_layers(model), inputs.kwargs, strict=True):
        hidden = run_layer(layer, hidden, kwargs)
    mean_square_loss(hidden, learning.target).backward()
    gradient = linear_at(model, path).weight.grad
    assert gradient is not None
    of_mask, score = gradient * dense, scores[path]
    for channel, other in ((1, 2), (9, 0)):
        expected = 0.0
        for gone in range(4):  # the member whose place is taken is one of four
            stay = [4 * other + place for place in range(4) if place != gone]
            for row in range(len(score)):
                second = sorted(stay, key=lambda c: -float(score[row, c]))[1]
                if score[row, channel] > score[row, second]:
                    expected += float(of_mask[row, channel] - of_mask[row, second]) / 4
        assert float(found[channel, other]) == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("deal", ["random", "contested", "exchanges"])
def test_rounds_learn_with_any_deal(deal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dealt: list[dict[str, Tensor]] = []
    real = method.LCP._dealt
    monkeypatch.setattr(method.LCP, "_dealt", lambda *given: dealt.append(real(*given)) or dealt[-1])
    learning = problem(tiny_model("llama"), Wanda())
    orders = lcp(deal=deal, rounds=2, block_size=8, epochs=1, constraint="foldable").orders(learning)
    assert len(dealt) == 1
    assert all(sorted(order.tolist()) == list(range(len(order))) for order in orders.values())


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"permutation\.deal='cards'"):
        lcp(deal="cards")
