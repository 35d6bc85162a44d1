"""Every family, pruner and permutation through calibration, learning and pruning; the record rebuilds the result."""

from __future__ import annotations

import copy
import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm.config import NMPattern, RunConfig, read_config
from permllm.mask.base import Mask
from permllm.models.families import FAMILIES, channel_groups, linear_at
from permllm.models.load import LoadedModel
from permllm.permutation.base import Identity
from permllm.permutation.heuristic import Heuristic
from permllm.permutation.lcp.lcp import LCP
from permllm.permutation.lcp.temperature import Linear
from permllm.pruning.layerwise import Found, PrunedModel, prune
from permllm.pruning.magnitude import Magnitude
from permllm.pruning.methods import Job, Methods
from permllm.pruning.reconstruction import NoReconstruction
from permllm.pruning.ria import RIA
from permllm.pruning.sparsegpt import SparseGPT
from permllm.pruning.wanda import Wanda
from permllm.runs.directory import Record
from permllm.runs.loggers import NO_LOGGER
from permllm.sparsity.calibrate import Pruner, calibrate_dense
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.saliency import saliency
from permllm.training.problem import LearningProblem
from tests.conftest import tiny_model
from tests.test_config import composed

PRUNERS: dict[str, Any] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "ria": RIA,
    "sparsegpt": SparseGPT,
}
PATTERN = NMPattern(2, 4)


def tokens(samples: int = 6, length: int = 12) -> Tensor:
    return torch.randint(0, 259, (samples, length), generator=torch.Generator().manual_seed(0))


def lcp(**settings: Any) -> LCP:
    defaults: dict[str, Any] = {"block_size": 24, "epochs": 2, "batch_size": 4, "loss": "cosine"}
    return LCP(**defaults | {"temperature": Linear(), **settings})


def problem(
    model: torch.nn.Module, pruner: Pruner, pattern: NMPattern = PATTERN, **extra: Any
) -> LearningProblem:
    groups = channel_groups(model)
    dense = calibrate_dense(model, groups, tokens(), pruner, batch_size=4)
    return LearningProblem(
        model, groups, tokens(), dense.factors, dense.target, pattern, seed=0, **extra
    )


@functools.cache
def _settings() -> RunConfig:
    return read_config(composed("model=tiny", "calibration.samples=6", "calibration.batch_size=4"))


def pruned(
    model: Any, pruner: Pruner, found: Found = Found(), permutation: Any = Identity(), **more: Any
) -> PrunedModel:
    """Prune a model; `more` are `groups`, `windows`, `pattern`, `seed`, `reconstruction`, `products` and `record`."""
    config = dataclasses.replace(
        _settings(), sparsity=str(more.get("pattern", PATTERN)), seed=more.get("seed", 0)
    )
    reconstruction = more.get("reconstruction") or NoReconstruction()
    methods = Methods(pruner, permutation, Mask(), reconstruction)
    groups, products = (
        more.get("groups") or channel_groups(model),
        more.get("products") or model.dtype,
    )
    loaded: Any = LoadedModel(model, None, "")  # type: ignore[arg-type]
    job = Job(config, methods, more.get("record") or Record(), NO_LOGGER, loaded, groups, products)
    return prune(job, more.get("windows", tokens()), found)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("pruner_name", sorted(PRUNERS))
@pytest.mark.parametrize("permutation", ["none", "heuristic", "lcp"])
@pytest.mark.parametrize("statistics", ["dense", "sequential"])
def test_every_combination_is_weight_times_mask_and_n_m_in_permuted_order(
    family: str, pruner_name: str, permutation: str, statistics: str
) -> None:
    model = tiny_model(family)
    dense_model = copy.deepcopy(model)
    pruner = PRUNERS[pruner_name]()
    groups = channel_groups(model)
    learning = problem(model, pruner)
    method: Any = {"none": Identity(), "heuristic": Heuristic(), "lcp": lcp()}[permutation]
    factors = learning.factors if statistics == "dense" else None
    orders = method.orders(learning) if statistics == "dense" or permutation == "lcp" else None
    result = pruned(model, pruner, Found(factors, orders), method)
    assert result.violations == 0
    for group in groups:
        perm = result.orders[group.name]
        assert sorted(perm.tolist()) == list(range(group.channels))
        for path in group.members:
            weight, mask = linear_at(model, path).weight, result.masks[path]
            kept = (weight[:, perm] != 0).unflatten(1, (-1, 4)).sum(-1)
            assert kept.max() <= 2
            assert not torch.signbit(weight[~mask]).any()
            assert not weight[~mask].any()
            if pruner_name != "sparsegpt":
                assert torch.equal(
                    weight, torch.where(mask, linear_at(dense_model, path).weight, 0.0)
                )
    # Nothing outside the pruned linears has moved.
    changed = {f"{path}.weight" for group in groups for path in group.members}
    for (name, parameter), (_, before) in zip(
        model.named_parameters(), dense_model.named_parameters(), strict=True
    ):
        assert name in changed or torch.equal(parameter, before)
    assert all(0 < value <= 1 for value in result.retained.values())
    assert all(value > 0 for value in result.output_error.values())


def test_output_error_is_the_relative_squared_error_on_the_dense_inputs() -> None:
    model = tiny_model("opt")  # with biases
    dense_model = copy.deepcopy(model)
    groups = channel_groups(model)
    captured: dict[str, Tensor] = {}
    for group in groups:
        for path in group.members:
            linear_at(dense_model, path).register_forward_pre_hook(
                lambda _, args, path=path: captured.update({path: args[0]})
            )
    dense_model(input_ids=tokens())
    result = pruned(model, Wanda(), permutation=Heuristic())
    for group in groups:
        error = norm = 0.0
        for path in group.members:
            x = captured[path].flatten(0, -2).double()
            dense, sparse = (
                linear_at(dense_model, path).weight.double(),
                linear_at(model, path).weight.double(),
            )
            error += float((x @ (dense - sparse).T).square().sum())
            norm += float((x @ dense.T).square().sum())
        assert result.output_error[group.name] == pytest.approx(error / norm, rel=1e-4)


def test_sequential_statistics_come_from_the_pruned_layers_before() -> None:
    model = tiny_model("llama")
    groups = channel_groups(model)
    dense_factors = calibrate_dense(model, groups, tokens(), Wanda(), 4).factors
    result = pruned(model, Wanda())
    second = [group for group in groups if group.layer == 1]
    path = second[0].members[0]
    fresh = tiny_model("llama")
    # The same model with its first layer pruned, everything recomputed by hand.
    for group in groups:
        if group.layer == 0:
            for member in group.members:
                linear_at(fresh, member).weight.data *= result.masks[member]
    by_hand = calibrate_dense(fresh, groups, tokens(), Wanda(), 4).factors[path]
    assert not torch.allclose(by_hand.column, dense_factors[path].column)
    weight = linear_at(fresh, path).weight
    assert torch.equal(
        result.masks[path], permuted_nm_mask(saliency(weight, by_hand), torch.arange(32), PATTERN)
    )


def test_streams_multiply_in_the_format_that_is_asked_for_and_updates_do_not() -> None:
    model = tiny_model("llama")
    rounded = problem(model, SparseGPT()).factors
    results = {}
    for dtype in (None, torch.bfloat16):
        dense = calibrate_dense(model, channel_groups(model), tokens(), SparseGPT(), 4, dtype)
        assert (
            pruned(
                copy.deepcopy(model), SparseGPT(), Found(dense.factors), products=dtype
            ).violations
            == 0
        )
        results[dtype] = dense.factors
        last = "model.layers.1.mlp.down_proj"
        torch.testing.assert_close(
            dense.factors[last].column, rounded[last].column, rtol=0.2, atol=0
        )
    assert not torch.equal(results[None][last].column, results[torch.bfloat16][last].column)
    assert torch.equal(results[None][last].column, rounded[last].column)
