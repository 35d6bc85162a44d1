"""Sensitive linears: divergences by hand, shares, and jobs that keep the chosen linears dense."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from permllm.allocation.sensitive import Sensitive
from permllm.cli import call
from permllm.errors import ConfigError, TrainingError
from permllm.export.apply import apply_record
from permllm.job import run
from permllm.models.families import ChannelGroup, channel_groups, linear_at
from permllm.models.load import load_model
from permllm.models.selection import DENSE
from permllm.permutation.heuristic import Heuristic
from permllm.pruner.wanda import Wanda
from permllm.settings.config import NMPattern
from permllm.sparsity.nm import violations
from permllm.store.files import read_json
from permllm.store.tensors import load_masks
from permllm.training.problem import LearningProblem
from tests.conftest import tiny_model
from tests.problems import PATTERN, Interrupt, problem, tokens
from tests.settings.test_config import config

# Hashes of runs with a uniform allocation, which is no part of the identity.
HASHES = {
    "model=tiny-random": "bbc33da91d48",
    "model=smollm2-135m protocol=offline method=permllm-ria": "a6092ab909df",
    "model=gemma3-270m model.accept_terms=true method=masks-folded keep_dense=[0]": "987feff4b812",
}


def divergence_by_hand(learning: LearningProblem, group: ChannelGroup, windows: Tensor) -> float:
    """Return the divergence from the logits of the whole model, in float64."""
    dense = copy.deepcopy(learning.model).double()
    pruned = copy.deepcopy(dense)
    for path in group.members:
        weight = linear_at(pruned, path).weight
        norm = learning.factors[path].column[0].double()
        quadruples = (weight.abs() * norm).unflatten(1, (-1, 4))
        kept = torch.zeros_like(quadruples).scatter(2, quadruples.topk(2).indices, 1.0)
        weight.data *= kept.flatten(1)
    logs = [model(windows).logits.log_softmax(-1) for model in (dense, pruned)]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "opt", "gemma3_text"])
def test_the_sensitivity_is_the_divergence_of_the_model_with_one_pruned_group(family: str) -> None:
    learning = problem(tiny_model(family), Wanda())
    before = copy.deepcopy(learning.model.state_dict())
    found = Sensitive(share=0.1, windows=5).sensitivity(learning)
    assert list(found) == [group.name for group in learning.groups]
    for group in learning.groups:
        expected = divergence_by_hand(learning, group, tokens()[:5])
        assert found[group.name] == pytest.approx(expected, rel=1e-3)
    after = learning.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_the_most_sensitive_weights_stay_dense_up_to_the_share(share: float) -> None:
    learning = problem(tiny_model("llama"))
    every = channel_groups(learning.model)
    learning.groups = [group for group in every if group.name != every[3].name]  # one is kept
    sensitivity = {group.name: float(place) for place, group in enumerate(learning.groups, 1)}
    allocation = Sensitive(share=share, windows=16)
    found = allocation.dense_linears(learning, every, sensitivity)
    total = sum(group.weights for group in every)
    chosen = [group for group in learning.groups if group.members[0] in found]
    assert found == {path for group in chosen for path in group.members}
    dense = {every[3].name, *(group.name for group in chosen)}
    taken = sum(group.weights for group in every if group.name in dense)
    if share > every[3].weights / total:
        assert taken <= share * total
    else:
        assert dense == {every[3].name}
    # No pruned group fits that is more sensitive than one that stays dense.
    by_weight = {group: sensitivity[group.name] / group.weights for group in learning.groups}
    values = [by_weight[group] for group in chosen]
    for group, value in by_weight.items():
        if group.name not in dense and chosen and value > min(values):
            larger = sum(other.weights for other in by_weight if by_weight[other] > value)
            assert every[3].weights + larger + group.weights > share * total


def test_a_job_prunes_the_other_linears_alone_and_its_record_rebuilds_it(
    cache: Path, tmp_path: Path
) -> None:
    words = [
        "model=tiny-random",
        "permutation=heuristic",
        "allocation=sensitive",
        "allocation.share=0.4",
    ]
    result = run(config(*words, f"run_dir={tmp_path / 'run'}"))
    assert result is not None
    sparsity = result.metrics["sparsity"]
    dense = sparsity["patterns"].keys()
    assert sorted(dense) == read_json(tmp_path / "run" / "allocation.json")["dense"]
    assert set(sparsity["patterns"].values()) == {DENSE}
    settings = config(*words)
    loaded = load_model(settings.model, settings.seed)
    groups = channel_groups(loaded.model)
    every = {path for group in groups for path in group.members}
    masks = load_masks(tmp_path / "run" / "masks.safetensors")
    assert set(masks) == every - dense
    permuted = load_file(tmp_path / "run" / "permutations.safetensors").keys()
    assert permuted == {group.name for group in groups if group.members[0] not in dense}
    weights = {path: linear_at(loaded.model, path).weight.numel() for path in every}
    share = sum(weights[path] for path in dense) / sum(weights.values())
    assert 0.2 < share <= 0.4
    assert sparsity["of_model"] == pytest.approx((1 - share) / 2)
    assert result.metrics["sensitivity"].keys() == {group.name for group in groups}
    before = {path: linear_at(loaded.model, path).weight.clone() for path in dense}
    apply_record(loaded.model, loaded.identity, tmp_path / "run")
    assert all(torch.equal(linear_at(loaded.model, path).weight, before[path]) for path in dense)


def test_a_stopped_run_continues_with_its_allocation(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = config(
        "model=tiny-random",
        "permutation=heuristic",
        "allocation=sensitive",
        f"run_dir={tmp_path / 'run'}",
    )

    def stop(*args: object) -> None:
        raise Interrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(Heuristic, "permutations", stop)
        with pytest.raises(Interrupt):
            run(job)
    allocation = read_json(tmp_path / "run" / "allocation.json")
    monkeypatch.setattr(Sensitive, "sensitivity", stop)
    result = run(job)
    assert result is not None
    assert result.metrics["sensitivity"] == allocation["sensitivity"]
    assert sorted(result.metrics["sparsity"].get("patterns", {})) == allocation["dense"]


def test_a_folded_checkpoint_has_dense_and_sparse_readers_of_one_stream(
    cache: Path, tmp_path: Path
) -> None:
    words = [
        "model=tiny-random",
        "permutation=lcp",
        "permutation.constraint=foldable",
        "export=folded",
    ]
    words += ["allocation=sensitive", "allocation.share=0.4"]
    result = run(config(*words, f"run_dir={tmp_path / 'run'}"))
    assert result is not None
    settings = config(*words)
    rebuilt = load_model(settings.model, settings.seed)
    apply_record(rebuilt.model, rebuilt.identity, tmp_path / "run")
    folded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    ids = tokens()
    torch.testing.assert_close(folded(ids).logits, rebuilt.model(ids).logits)
    patterns = result.metrics["sparsity"]["patterns"]
    permuted = 0
    for group in channel_groups(folded):
        for path in group.members:
            weight = linear_at(folded, path).weight
            is_dense = path in patterns
            assert bool(violations(weight, None, PATTERN)) == is_dense
            permuted += is_dense and not torch.equal(weight, linear_at(rebuilt.model, path).weight)
    assert permuted
    assert call("verify", [str(tmp_path / "run" / "export")]) == 0


def test_permutations_of_a_file_serve_the_linears_that_are_left(
    cache: Path, tmp_path: Path
) -> None:
    words = ["model=tiny-random", "allocation=sensitive"]
    first = [*words, "allocation.share=0.4", "permutation=heuristic"]
    run(config(*first, f"run_dir={tmp_path / 'first'}"))
    again = [*words, "permutation=from_file", f"permutation.path={tmp_path / 'first'}"]
    run(config(*again, "allocation.share=0.4", f"run_dir={tmp_path / 'again'}"))
    files = [tmp_path / name / "masks.safetensors" for name in ("first", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    with pytest.raises(ConfigError, match=r"permutation\.path"):
        run(config(*again, "allocation.share=0.0", f"run_dir={tmp_path / 'all'}"))


@pytest.mark.parametrize("kept", ["all", "none"])
def test_an_allocation_prunes_some_of_the_linears_of_the_settings(
    kept: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dense_linears(self: Sensitive, problem: Any, every: list[ChannelGroup], _: Any) -> set[str]:
        return {path for group in every for path in group.members if kept == "all"}

    monkeypatch.setattr(Sensitive, "dense_linears", dense_linears)
    words = ["model=tiny-random", "permutation=none", "allocation=sensitive", "keep_dense=[0]"]
    job = config(*words, f"run_dir={tmp_path / 'run'}")
    if kept == "all":
        with pytest.raises(ConfigError, match="allocation=sensitive"):
            run(job)
        return
    result = run(job)
    assert result is not None
    assert all(".0." in path for path in result.metrics["sparsity"]["patterns"])


def test_a_divergence_that_is_not_finite_decides_nothing() -> None:
    learning = problem(tiny_model("llama"), Wanda())
    learning.target[:] = float("nan")
    with pytest.raises(TrainingError, match="not finite"):
        Sensitive(share=0.1, windows=5).sensitivity(learning)


def test_nothing_dense_is_what_a_uniform_allocation_prunes(cache: Path, tmp_path: Path) -> None:
    found = []
    for words in (["allocation=sensitive", "allocation.share=0.0"], ["allocation=uniform"]):
        directory = tmp_path / words[0]
        run(config("model=tiny-random", "permutation=lcp", *words, f"run_dir={directory}"))
        found.append((directory / "masks.safetensors").read_bytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("words", HASHES)
def test_a_uniform_allocation_leaves_the_identity_of_runs(words: str) -> None:
    assert config(*words.split()).hash == HASHES[words]
    assert config(*words.split(), "allocation=sensitive").hash != HASHES[words]


def test_an_allocation_needs_the_dense_model(tmp_path: Path) -> None:
    words = ["model=tiny-random", "permutation=none", "calibration.statistics=sequential"]
    with pytest.raises(ConfigError, match="allocation=sensitive"):
        run(config(*words, "allocation=sensitive", f"run_dir={tmp_path / 'run'}"))


def test_what_a_method_needs_is_checked_again_with_the_linears_that_are_left(
    cache: Path, tmp_path: Path
) -> None:
    """The last layer learns alone, and an allocation keeps all of it dense."""
    words = ["model=tiny-random", "permutation=lcp", "permutation.last_layers=1"]
    words += ["allocation=sensitive", "allocation.share=0.99"]
    with pytest.raises(ConfigError, match="last_layers=1"):
        run(config(*words, f"run_dir={tmp_path / 'run'}"))


def test_the_sensitivity_depends_on_the_pattern() -> None:
    learning = problem(tiny_model("llama"), pattern=NMPattern(4, 8))
    allocation = Sensitive(share=0.1, windows=2)
    found = allocation.sensitivity(learning)
    assert all(value > 0 for value in found.values())
    assert found != allocation.sensitivity(problem(tiny_model("llama"), pattern=PATTERN))
