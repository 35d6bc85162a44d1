"""Every pruner and permutation where linears stay dense and channel groups have patterns of their own, small and large."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from permllm.config import NMPattern
from permllm.models.families import ChannelGroup, channel_groups, decoder_layers, linear_at
from permllm.models.layers import LayerStream
from permllm.models.selection import pruned_groups
from permllm.permutation.base import Identity
from permllm.permutation.foldable import foldable
from permllm.permutation.heuristic import Heuristic
from permllm.pruning.distill import Distill
from permllm.pruning.layerwise import Found, PrunedModel
from permllm.pruning.sparsegpt import OBS
from permllm.sparsity.calibrate import Pruner, calibrate_dense
from permllm.training.losses import cosine_loss
from permllm.training.problem import LearningProblem
from tests.conftest import tiny_model
from tests.pruning.test_layerwise import PRUNERS, lcp, pruned, tokens

PATTERN = NMPattern(6, 8)
# In the second layer one member alone is pruned of what reads the residual stream, and in the first
# one group.
KEEP_DENSE = ("layers.0.self_attn", "v_proj", "layers.1.mlp.up_proj", "k_proj")
SPARSITY_OF = {
    "layers.0.mlp.down_proj": "8:16",
    "layers.1.mlp.down_proj": "2:8",
    "q_proj": "2:4",
    "o_proj": "1:4",
}
OWN = {
    "0.mlp.down_proj": (8, 16),
    "1.mlp.down_proj": (2, 8),
    "1.self_attn.q_proj": (2, 4),
    "1.self_attn.o_proj": (1, 4),
}


def mixed(model: nn.Module) -> list[ChannelGroup]:
    return pruned_groups(channel_groups(model), PATTERN, KEEP_DENSE, SPARSITY_OF)


def learning_problem(model: nn.Module, pruner: Pruner, **extra: Any) -> LearningProblem:
    dense = calibrate_dense(model, channel_groups(model), tokens(), pruner, batch_size=4)
    return LearningProblem(
        model, mixed(model), tokens(), dense.factors, dense.target, PATTERN, seed=0, **extra
    )


def check(model: nn.Module, found: PrunedModel, moves: bool) -> None:
    before = dict(tiny_model("llama").named_parameters())
    assert found.violations == 0
    assert len(found.masks) == 7
    pruned = set()
    for name, parameter in model.named_parameters():
        path = name.removesuffix(".weight")
        if path not in found.masks:
            assert torch.equal(parameter, before[name])
            continue
        pruned.add(path)
        n, m = OWN.get(path.removeprefix("model.layers."), (6, 8))
        (group,) = (group for group in mixed(model) if path in group.members)
        kept = found.masks[path][:, found.orders[group.name]].view(len(parameter), -1, m).sum(2)
        assert bool((kept == n).all())
        assert not bool(parameter[~found.masks[path]].any())
        if not moves:
            assert torch.equal(parameter, torch.where(found.masks[path], before[name], 0.0))
    assert pruned == found.masks.keys()


@pytest.mark.parametrize("pruner_name", sorted(PRUNERS))
@pytest.mark.parametrize("permutation", ["none", "heuristic"])
def test_each_linear_has_its_own_pattern_and_the_others_stay_as_they_were(
    pruner_name: str, permutation: str
) -> None:
    model = tiny_model("llama")
    pruner = PRUNERS[pruner_name]()
    method: Any = Identity() if permutation == "none" else Heuristic()
    check(
        model,
        pruned(model, pruner, permutation=method, groups=mixed(model), pattern=PATTERN),
        pruner_name == "sparsegpt",
    )


@pytest.mark.parametrize("constraint", ["free", "foldable"])
@pytest.mark.parametrize("straight_through", ["swap", "hard", "soft"])
def test_what_is_learned_is_measured_as_it_is_then_pruned(
    constraint: Any, straight_through: Any
) -> None:
    model = tiny_model("llama")
    losses: list[float] = []
    settings = {"block_size": 16, "epochs": 3, "select_from": 3, "learning_rate": 0.05}
    method = lcp(constraint=constraint, straight_through=straight_through, **settings)
    learning = learning_problem(
        model, PRUNERS["wanda"](), on_epoch=lambda values: losses.append(values["measured_loss"])
    )
    orders = method.orders(learning)
    assert orders.keys() == {group.name for group in learning.groups}
    result = pruned(
        model,
        PRUNERS["wanda"](),
        Found(learning.factors, orders),
        groups=learning.groups,
        pattern=PATTERN,
    )
    check(model, result, False)
    stream = LayerStream(model, tokens(), 4)
    for index in range(len(decoder_layers(model))):
        stream.advance(index)
    assert float(cosine_loss(stream.states(), learning.target)) == pytest.approx(
        min(losses), rel=1e-4
    )
    if constraint == "foldable":
        assert (
            len(foldable(learning.groups, orders)) == 4
        )  # the residual stream, two MLPs, one attention


def test_a_stage_of_layers_that_stay_dense_is_passed_by() -> None:
    model = tiny_model("llama")
    groups = pruned_groups(channel_groups(model), PATTERN, ["0"], {})
    dense = calibrate_dense(model, channel_groups(model), tokens(), PRUNERS["wanda"](), 4)
    told: list[Any] = []
    learning = LearningProblem(
        model, groups, tokens(), dense.factors, dense.target, PATTERN, seed=0, on_epoch=told.append
    )
    orders = lcp(layers_per_stage=1, epochs=1).orders(learning)
    assert orders.keys() == {group.name for group in groups}
    assert [(values["first_layer"], values["last_layer"]) for values in told] == [(1, 1)]


@pytest.mark.parametrize("reconstruction", [OBS(), Distill(epochs=1)])
def test_reconstruction_leaves_dense_linears_alone(reconstruction: Any) -> None:
    model = tiny_model("llama")
    groups = pruned_groups(
        channel_groups(model), PATTERN, ["0", "layers.1.self_attn"], {"down_proj": "8:16"}
    )
    more = {
        "permutation": Heuristic(),
        "groups": groups,
        "pattern": PATTERN,
        "reconstruction": reconstruction,
    }
    result = pruned(model, PRUNERS["wanda"](), **more)
    before = dict(tiny_model("llama").named_parameters())
    for path, mask in result.masks.items():
        assert not torch.equal(
            linear_at(model, path).weight, torch.where(mask, before[f"{path}.weight"], 0.0)
        )
        assert not bool(linear_at(model, path).weight[~mask].any())
    for path, parameter in model.named_parameters():
        assert path.removesuffix(".weight") in result.masks or torch.equal(parameter, before[path])
