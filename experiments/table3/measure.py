"""Run time of a layer's products, dense and 2:4, and of a channel permutation (PermLLM, table 3).

    python experiments/table3/measure.py model=llama-2-7b

The measurement needs the model's sizes, not its weights.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.measuring import check_whole, clock, main
from permllm.models.families import channel_groups, linear_at
from permllm.models.load import meta_model
from permllm.settings.config import NMPattern, RunConfig
from permllm.sparsity.nm import nm_mask

_PATTERN = NMPattern(2, 4)
# The paper's rows, with the indices of their channel groups in a layer: attention input (0) and
# output (1), MLP input (2) and output (3).
_ROWS = {"qkvo_proj": (0, 1), "up_gate_proj": (2,), "down_proj": (3,)}
# Shorter measurements would be distorted by the clock, the first launch and the last wait.
_LEAST_SECONDS = 0.02


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement, `measure.NAME=VALUE`.

    Attributes:
        tokens: number of rows of the activations.
        repeats: number of measurements, whose median is reported; variants take turns.
    """

    tokens: int = 2048
    repeats: int = 9

    def __post_init__(self) -> None:
        check_whole("measure.tokens", self.tokens, 1)
        check_whole("measure.repeats", self.repeats, 1)


@torch.no_grad()
def measure(config: RunConfig, own: Settings, device: torch.device) -> dict[str, Any]:
    """Measure milliseconds with random weights and activations of the model's shapes and dtype."""
    model = meta_model(config.model)
    dtype = getattr(torch, config.model.dtype)
    groups = [group for group in channel_groups(model) if group.layer == 0]
    sparse = sparse_tensor_cores(device) and dtype.itemsize == 2
    rows = []
    for name, places in _ROWS.items():
        shapes = [
            tuple(linear_at(model, path).weight.shape)
            for place in places
            for path in groups[place].members
        ]
        works: dict[str, Callable[[], Any]] = {}
        weights = [torch.randn(shape, device=device).to(dtype) for shape in shapes]
        xs = {
            channels: torch.randn(own.tokens, channels, device=device).to(dtype)
            for channels in {shape[1] for shape in shapes}
        }
        works["dense"] = partial(_products, weights, xs)
        if sparse:
            works["2:4"] = partial(_products, [_semi_structured(weight) for weight in weights], xs)
        found = _interleaved(works, own.repeats, device)
        rows.append(
            {"row": name, "shapes": [list(shape) for shape in shapes]} | _milliseconds(found)
        )
    return {
        "what": f"milliseconds at {own.tokens} tokens, median of {own.repeats}",
        "model": config.model.name,
        "dtype": config.model.dtype,
        "tokens": own.tokens,
        "sparse_tensor_cores": sparse,
        "products": rows,
        "permutations": [
            _permutation(count, dtype, own, device)
            for count in sorted({group.channels for group in groups})
        ],
    }


def sparse_tensor_cores(device: torch.device) -> bool:
    """Tell if a device has sparse tensor cores: an NVIDIA GPU of compute capability 8.0 or more."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _permutation(
    channels: int, dtype: torch.dtype, own: Settings, device: torch.device
) -> dict[str, Any]:
    x = torch.randn(own.tokens, channels, device=device).to(dtype)
    order = torch.randperm(channels).to(device)
    matrix = torch.zeros(channels, channels, device=device, dtype=dtype)
    matrix[order, torch.arange(channels, device=device)] = 1
    works: dict[str, Callable[[], Any]] = {
        "gather": partial(x.index_select, -1, order.to(torch.int32)),
        "matrix": partial(torch.matmul, x, matrix),
    }
    return {"channels": channels} | _milliseconds(_interleaved(works, own.repeats, device))


def lines(results: dict[str, Any]) -> list[str]:
    """Return the rows of the paper's table."""
    lines = [
        f"{results['model']}, {results['dtype']}, {results['what']}"
        + (
            ""
            if results["sparse_tensor_cores"]
            else "; no sparse tensor cores here, so no 2:4 products"
        ),
        "",
        "| | dense | 2:4 | speedup |",
        "| --- | --- | --- | --- |",
    ]
    for row in results["products"]:
        sparse = row.get("2:4")
        cells = (f"{sparse:.3f}", f"{row['dense'] / sparse:.3f}") if sparse else ("", "")
        lines.append(f"| {row['row']} | {row['dense']:.3f} | {cells[0]} | {cells[1]} |")
    for row in results["permutations"]:
        lines.append(
            f"| channel permutation of {row['channels']}, gather | | {row['gather']:.3f} | |"
        )
        lines.append(f"| the same, product with a permutation matrix | | {row['matrix']:.3f} | |")
    return lines


def draw(results: dict[str, Any], axes: Any) -> None:
    """Draw a bar for each measurement, on a logarithmic axis."""
    bars = [(row["row"], row["dense"], "tab:gray") for row in results["products"]]
    bars += [
        (f"{row['row']}, 2:4", row["2:4"], "tab:blue")
        for row in results["products"]
        if "2:4" in row
    ]
    for row in results["permutations"]:
        bars.append((f"gather of {row['channels']}", row["gather"], "tab:orange"))
        bars.append((f"matrix of {row['channels']}", row["matrix"], "tab:red"))
    drawn = axes.barh(
        [name for name, _, _ in bars],
        [value for _, value, _ in bars],
        color=[color for _, _, color in bars],
    )
    axes.bar_label(drawn, fmt="{:.3g}", padding=3)
    axes.margins(x=0.1)
    axes.invert_yaxis()
    axes.set_xscale("log")
    # The formats of logarithmic axes are mathematical text, which pictures leave as it is.
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.set_xlabel(f"milliseconds at {results['tokens']} tokens")


def _products(weights: list[Tensor], xs: dict[int, Tensor]) -> list[Tensor]:
    return [nn.functional.linear(xs[weight.shape[1]], weight) for weight in weights]


def _semi_structured(weight: Tensor) -> Tensor:
    return to_sparse_semi_structured(weight * nm_mask(weight.abs().float(), _PATTERN))


def _interleaved(
    works: dict[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Measure works in turns, and return the seconds of a call for each work and turn.

    A measurement takes as many calls, at most 1000, as need `_LEAST_SECONDS`. Two turns before do
    not count: the first compiles and allocates, the second finds the number of calls.
    """
    for work in works.values():
        work()
    calls = {}
    for name, work in works.items():
        once = max(clock(work, device), 1e-9)
        calls[name] = math.ceil(min(max(_LEAST_SECONDS / once, 1), 1000))
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(clock(work, device, calls[name]))
    return times


def _milliseconds(found: dict[str, list[float]]) -> dict[str, float]:
    return {name: 1e3 * statistics.median(seconds) for name, seconds in found.items()}


if __name__ == "__main__":
    sys.exit(main(__file__, Settings, measure, lines, draw))
