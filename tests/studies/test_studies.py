"""Studies: the measures against formulas of their own, the search by swaps, and the command line."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import TypedDict

from permllm.calibration.saliency import SaliencyFactors
from permllm.config import read_config
from permllm.errors import ConfigError
from permllm.pruning import Wanda
from permllm.record.schema import LayerRuntimes, LCPSteps, validated
from permllm.sparsity import NMPattern
from permllm.studies.base import run_study
from permllm.studies.export_memory import ExportMemory
from permllm.studies.lcp_step import DensePermutedLinear, LCPStep
from permllm.studies.saliency_and_error import Layer, SaliencyAndError, swaps
from tests.conftest import run_command
from tests.test_config import composed

PATTERN = NMPattern(2, 4)


def layer_and_inputs() -> tuple[Layer, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 32, generator=generator, dtype=torch.float64) * torch.rand(32, generator=generator).double()
    weight = torch.randn(24, 32, generator=generator, dtype=torch.float64)
    saliency = weight.abs() * x.square().mean(0).sqrt()
    return Layer(weight, saliency, x.t() @ x, PATTERN), x


def pruned_by_hand(layer: Layer, perm: Tensor) -> Tensor:
    """Row by row and group by group, with sorting."""
    weight = torch.zeros_like(layer.weight)
    for row in range(len(weight)):
        for start in range(0, len(perm), 4):
            members = perm[start : start + 4].tolist()
            for channel in sorted(members, key=lambda channel: -float(layer.saliency[row, channel]))[:2]:
                weight[row, channel] = layer.weight[row, channel]
    return weight


def test_both_measures_are_those_of_the_activations() -> None:
    layer, x = layer_and_inputs()
    perm = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    pruned = pruned_by_hand(layer, perm)
    expected = (x @ (layer.weight - pruned).t()).square().sum() / (x @ layer.weight.t()).square().sum()
    assert layer.error(perm) == pytest.approx(float(expected), rel=1e-12)
    kept = (layer.saliency * (pruned != 0)).sum() / layer.saliency.sum()
    assert layer.retained(perm) == pytest.approx(float(kept), rel=1e-12)


@pytest.mark.parametrize("by_error", [True, False])
def test_swaps_only_ever_improve_what_they_are_for(by_error: bool) -> None:
    layer, _ = layer_and_inputs()
    start = torch.arange(32)
    found = swaps(layer, start, 400, 20, by_error, torch.Generator().manual_seed(0))
    assert len(found) == 20
    assert all(sorted(perm.tolist()) == list(range(32)) for perm in found)
    if by_error:
        values = [layer.error(perm) for perm in [start, *found]]
    else:
        values = [-layer.retained(perm) for perm in [start, *found]]
    # Each gain was told from a few columns; measured whole, the values must fall as they were said to.
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values))
    assert values[-1] < values[0] - 0.005
    # Of any number of tries, the last order is what all of them have led to.
    last = swaps(layer, start, 50, 3, by_error, torch.Generator().manual_seed(0))
    (whole,) = swaps(layer, start, 50, 1, by_error, torch.Generator().manual_seed(0))
    assert len(last) == 3
    assert torch.equal(last[-1], whole)


def test_figure_1_is_a_job_with_a_record_and_a_picture(tmp_path: Path) -> None:
    command = ["experiment=figure1", "model=tiny", "budget=cpu", "study.random=5", "study.swaps=40", "study.trace=4"]
    result = run_command(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "| heuristic |" in result.stdout
    (directory,) = (tmp_path / "runs").iterdir()
    metrics = json.loads((directory / "metrics.json").read_text())
    points = metrics["study"]["points"]
    assert len(points) == 2 + 5 + 5 + 4 + 4 + 4
    assert {point["order"] for point in points} >= {"none", "random", "heuristic", "lowering error"}
    by_name = {point["order"]: point for point in points}
    assert by_name["heuristic"]["retained_saliency"] > by_name["none"]["retained_saliency"]
    assert (directory / "figure.png").read_bytes()[:4] == b"\x89PNG"
    again = run_command(*command, cwd=tmp_path)
    assert "is finished already" in again.stderr
    unknown = run_command(*command, "study.group=elsewhere", cwd=tmp_path)
    assert unknown.returncode == 1
    assert "study.group='elsewhere' is not valid; valid are self_attn.qkv_proj" in unknown.stderr


def test_table_3_needs_no_weights(tmp_path: Path) -> None:
    small = ["study.tokens=16", "study.repeats=2", "model=opt-125m"]
    result = run_command("experiment=table3", *small, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (directory,) = (tmp_path / "runs").iterdir()
    study = json.loads((directory / "metrics.json").read_text())["study"]
    assert [row["row"] for row in study["products"]] == ["qkvo_proj", "up_gate_proj", "down_proj"]
    assert study["products"][0]["shapes"] == [[768, 768]] * 4
    assert [row["channels"] for row in study["permutations"]] == [768, 3072]
    assert all(row["dense"] > 0 for row in study["products"])


def test_a_step_of_lcp_is_a_job_beside_plain_training_and_dense_matrices(tmp_path: Path) -> None:
    small = ["study.tokens=[128]", "study.block_sizes=[16]", "study.repeats=1", "study.heuristic_channels=64"]
    result = run_command("study=lcp_step", "model=tiny", "compute_dtype=float32", *small, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    (directory,) = (tmp_path / "runs").iterdir()
    study = validated("study", json.loads((directory / "metrics.json").read_text())["study"], LCPSteps)
    (row,) = study["rows"]
    assert (row["shape"], row["tokens"], row["block_size"], row["compute_dtype"]) == ("tiny", 128, 16, "float32")
    assert row["lcp_over_plain"] == row["lcp_s"] / row["plain_s"]
    # The loop over groups is a formula of its own.
    assert study["heuristic"]["relative_difference"] < 1e-5
    assert "| tiny | 128 | 16 | float32 |" in result.stdout


def test_dense_matrices_prune_as_the_order_says() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(16, 8, bias=False, dtype=torch.float64).requires_grad_(False)
    norms = torch.rand(1, 16, generator=generator).double() + 0.5
    order = torch.randperm(16, generator=generator)
    matrix = torch.zeros(16, 16, dtype=torch.float64)
    matrix[order, torch.arange(16)] = 1
    dense = DensePermutedLinear(linear, SaliencyFactors(1, norms))
    dense.matrices = (matrix, matrix)
    x = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    mask = torch.zeros_like(linear.weight)
    for output in range(8):
        for start in range(0, 16, 4):
            members = order[start : start + 4].tolist()
            kept = sorted(members, key=lambda channel: -float(linear.weight[output, channel].abs() * norms[0, channel]))[:2]
            mask[output, kept] = 1
    torch.testing.assert_close(dense(x), x @ (linear.weight * mask).t(), rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_an_export_does_not_hold_the_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 8}
    words = [f"model.architecture.{key}={value}" for key, value in (sizes | {"vocab_size": 2048}).items()]
    # All in one file: not even a shard is held.
    study = ["study=export_memory", "study.layers=6", "study.shard_gb=1.0"]
    config = read_config(composed("model=tiny", *study, *words, f"run_dir={tmp_path}/run"))
    metrics, _ = run_study(config, ExportMemory(layers=6, shard_gb=1.0), Wanda())
    for row in metrics["study"]["rows"]:
        assert row["dense_checkpoint_bytes"] > 150e6
        # A copy of the model would double this; the places of a packed one are an eighth of its values.
        assert row["peak_growth_bytes"] < row["dense_checkpoint_bytes"] / 2
    with pytest.raises(ConfigError, match=r"study\.layers=0"):
        ExportMemory(layers=0)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"study\.swaps=0"):
        SaliencyAndError(swaps=0)
    with pytest.raises(ConfigError, match=r"study\.tokens=130 is not a multiple of 128"):
        LCPStep(tokens=[130])
    with pytest.raises(ConfigError, match=r"study\.block_sizes=2: expected a whole number of at least 4"):
        LCPStep(block_sizes=[2])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"form": None}, r"form: it must be a TypedDict, and is None$"),
        ({"form": TypedDict("Wrong", {"found": torch.Tensor})}, r"form: Unable to generate pydantic-core schema"),
        ({"lines": None}, r"needs a method `lines`$"),
    ],
)
def test_a_study_that_lacks_what_it_will_be_asked_for_is_refused_before_it_measures(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    def measure(*_: Any) -> None:
        pytest.fail("measured")

    whole = {"form": LayerRuntimes, "measure": measure, "lines": str, "draw": str}
    study: Any = SimpleNamespace(**whole | changed)
    config = read_config(composed("model=tiny", "study=layer_runtime", f"runs_dir={tmp_path}"))
    with pytest.raises(ConfigError, match=message):
        run_study(config, study, Wanda())
    assert not any(tmp_path.iterdir())
