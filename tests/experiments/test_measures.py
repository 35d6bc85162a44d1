"""The measure.py of experiments: their formulas, the search by swaps, what the commands keep."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.figure1.measure import Layer, swaps
from experiments.lcp_speed.measure import DensePermutedLinear
from experiments.measuring import add_record
from permllm.settings.config import NMPattern
from permllm.sparsity.saliency import SaliencyFactors
from permllm.store.files import read_lines
from tests.conftest import run_python
from tests.kept import EXPERIMENTS

PATTERN = NMPattern(2, 4)


def layer_and_inputs() -> tuple[Layer, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 32, generator=generator, dtype=torch.float64)
    x = x * torch.rand(32, generator=generator).double()
    weight = torch.randn(24, 32, generator=generator, dtype=torch.float64)
    saliency = weight.abs() * x.square().mean(0).sqrt()
    return Layer(weight, saliency, x.t() @ x, PATTERN), x


def pruned_by_hand(weight: Tensor, saliency: Tensor, perm: Tensor) -> Tensor:
    """Row by row and group by group, with sorting."""
    pruned = torch.zeros_like(weight)
    for row in range(len(weight)):
        for start in range(0, len(perm), 4):
            members = perm[start : start + 4].tolist()
            for channel in sorted(members, key=lambda channel: -float(saliency[row, channel]))[:2]:
                pruned[row, channel] = weight[row, channel]
    return pruned


def test_both_measures_are_those_of_the_activations() -> None:
    layer, x = layer_and_inputs()
    perm = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    pruned = pruned_by_hand(layer.weight, layer.saliency, perm)
    lost, dense = x @ (layer.weight - pruned).t(), x @ layer.weight.t()
    expected = float(lost.square().sum() / dense.square().sum())
    assert layer.error(perm) == pytest.approx(expected, rel=1e-12)
    kept = (layer.saliency * (pruned != 0)).sum() / layer.saliency.sum()
    assert layer.retained(perm) == pytest.approx(float(kept), rel=1e-12)


@pytest.mark.parametrize("by_error", [True, False])
def test_swaps_only_ever_improve_what_they_are_for(by_error: bool) -> None:
    layer, _ = layer_and_inputs()
    start = torch.arange(32)
    found = swaps(layer, start, 400, 20, by_error, torch.Generator().manual_seed(0))
    assert len(found) == 20
    assert all(sorted(perm.tolist()) == list(range(32)) for perm in found)
    values = [layer.error(perm) if by_error else -layer.retained(perm) for perm in [start, *found]]
    # Each gain was computed from a few columns; the whole values must fall as well.
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(values))
    assert values[-1] < values[0] - 0.005
    # Of any number of tries, the last order is what all of them have led to.
    seeds = (torch.Generator().manual_seed(0) for _ in range(2))
    last, whole = (swaps(layer, start, 50, kept, by_error, next(seeds)) for kept in (3, 1))
    assert torch.equal(last[-1], whole[0])


def measured(experiment: str, folder: Path, *words: str) -> tuple[dict[str, Any], str]:
    """What the command finds, as it keeps it, and what it prints."""
    file = folder / "records.jsonl"
    result = run_python(str(EXPERIMENTS / experiment / "measure.py"), *words, "--to", str(file))
    assert result.returncode == 0, result.stderr
    (line,) = read_lines(file)
    assert "config" in line
    assert line["environment"]["command"].endswith("--to records.jsonl")
    assert (folder / f"{line['run']}.png").read_bytes()[:4] == b"\x89PNG"
    return line["metrics"]["study"], result.stdout


def test_figure_1_keeps_a_record_and_a_picture(tmp_path: Path) -> None:
    few = ("measure.random=5", "measure.swaps=40", "measure.trace=4")
    found, shown = measured("figure1", tmp_path, "model=tiny-random", *few)
    assert "| heuristic |" in shown
    assert len(found["points"]) == 2 + 5 + 5 + 4 + 4 + 4
    by_name = {point["order"]: point for point in found["points"]}
    assert by_name["heuristic"]["retained_saliency"] > by_name["none"]["retained_saliency"]


def test_table_3_needs_no_weights(tmp_path: Path) -> None:
    few = ("measure.tokens=16", "measure.repeats=2")
    found, _ = measured("table3", tmp_path, *few, "model=opt-125m")
    assert [row["row"] for row in found["products"]] == ["qkvo_proj", "up_gate_proj", "down_proj"]
    assert found["products"][0]["shapes"] == [[768, 768]] * 4
    assert [row["channels"] for row in found["permutations"]] == [768, 3072]
    assert all(row["dense"] > 0 for row in found["products"])


def test_a_step_of_lcp_is_timed_beside_plain_training_and_dense_matrices(tmp_path: Path) -> None:
    small = ["measure.tokens=[128]", "measure.block_sizes=[16]", "measure.repeats=1"]
    found, shown = measured(
        "lcp_speed", tmp_path, "model=tiny-random", "compute_dtype=float32", *small
    )
    (row,) = found["rows"]
    asked = (row["shape"], row["tokens"], row["block_size"], row["compute_dtype"])
    assert asked == ("tiny-random", 128, 16, "float32")
    assert row["lcp_over_plain"] == row["lcp_s"] / row["plain_s"]
    assert "| tiny-random | 128 | 16 | float32 |" in shown


def test_a_record_is_added_to_others(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    for name, seconds in (("b", 1), ("a", 2), ("b", 3)):
        add_record(file, {"run": name, "config": {}, "metrics": {"seconds": seconds}})
    kept = [(line["run"], line["metrics"]["seconds"]) for line in read_lines(file)]
    assert kept == [("a", 2), ("b", 3)]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("measure.tokens=[130]", "measure.tokens=130 is not a multiple of 128"),
        ("measure.block_sizes=[2]", "measure.block_sizes=2: expected a whole number of at least 4"),
        ("measure.tries=1", "Key 'tries' not in 'Settings'"),
    ],
)
def test_what_cannot_be_measured_is_one_line(word: str, message: str) -> None:
    result = run_python(str(EXPERIMENTS / "lcp_speed" / "measure.py"), word)
    (error,) = result.stderr.splitlines()
    assert error.startswith(f"error: {message}")


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
    pruned = pruned_by_hand(linear.weight, linear.weight.abs() * norms, order)
    torch.testing.assert_close(dense(x), x @ pruned.t(), rtol=1e-12, atol=1e-12)
