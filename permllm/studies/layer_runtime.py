"""Run time of a layer's products, dense and 2:4, and of a channel permutation (PermLLM, table 3)."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from permllm.export.bench import sparse_tensor_cores
from permllm.models.families import channel_groups, linear_at
from permllm.models.loading import meta_model
from permllm.record.schema import LayerRuntimes
from permllm.runtime.timing import interleaved
from permllm.sparsity import NMPattern, nm_mask
from permllm.studies.base import StudyInputs
from permllm.studies.settings import LayerRuntimeSettings

_PATTERN = NMPattern(2, 4)
# The paper's rows, by the places of their channel groups in a layer: attention input and output, MLP input and output.
_ROWS = {"qkvo_proj": (0, 1), "up_gate_proj": (2,), "down_proj": (3,)}


class LayerRuntime(LayerRuntimeSettings):
    """The study: needs the model's dimensions, not its weights."""

    form: ClassVar[type] = LayerRuntimes

    @torch.no_grad()
    def measure(self, inputs: StudyInputs) -> dict[str, Any]:
        """Milliseconds of everything, with random weights and activations of the model's shapes and dtype."""
        model = meta_model(inputs.config.model)
        dtype = getattr(torch, inputs.config.model.dtype)
        groups = [group for group in channel_groups(model) if group.layer == 0]
        sparse = sparse_tensor_cores(inputs.device) and dtype.itemsize == 2
        rows = []
        for name, places in _ROWS.items():
            shapes = [tuple(linear_at(model, path).weight.shape) for place in places for path in groups[place].members]
            works: dict[str, Callable[[], Any]] = {}
            weights = [torch.randn(shape, device=inputs.device).to(dtype) for shape in shapes]
            xs = {
                channels: torch.randn(self.tokens, channels, device=inputs.device).to(dtype)
                for channels in {shape[1] for shape in shapes}
            }
            works["dense"] = partial(_products, weights, xs)
            if sparse:
                works["2:4"] = partial(_products, [_semi_structured(weight) for weight in weights], xs)
            found = interleaved(works, self.repeats, inputs.device)
            rows.append({"row": name, "shapes": [list(shape) for shape in shapes]} | _milliseconds(found))
        return {
            "what": f"milliseconds at {self.tokens} tokens, median of {self.repeats}",
            "model": inputs.config.model.name,
            "dtype": inputs.config.model.dtype,
            "tokens": self.tokens,
            "sparse_tensor_cores": sparse,
            "products": rows,
            "permutations": [
                self._permutation(count, dtype, inputs) for count in sorted({group.channels for group in groups})
            ],
        }

    def _permutation(self, channels: int, dtype: torch.dtype, inputs: StudyInputs) -> dict[str, Any]:
        x = torch.randn(self.tokens, channels, device=inputs.device).to(dtype)
        order = torch.randperm(channels).to(inputs.device)
        matrix = torch.zeros(channels, channels, device=inputs.device, dtype=dtype)
        matrix[order, torch.arange(channels, device=inputs.device)] = 1
        works: dict[str, Callable[[], Any]] = {
            "gather": partial(x.index_select, -1, order.to(torch.int32)),
            "matrix": partial(torch.matmul, x, matrix),
        }
        return {"channels": channels} | _milliseconds(interleaved(works, self.repeats, inputs.device))

    def lines(self, results: dict[str, Any]) -> list[str]:
        """The paper's table."""
        lines = [
            f"{results['model']}, {results['dtype']}, {results['what']}"
            + ("" if results["sparse_tensor_cores"] else "; no sparse tensor cores here, so no 2:4 products"),
            "",
            "| | dense | 2:4 | speedup |",
            "| --- | --- | --- | --- |",
        ]
        for row in results["products"]:
            sparse = row.get("2:4")
            cells = (f"{sparse:.3f}", f"{row['dense'] / sparse:.3f}") if sparse else ("", "")
            lines.append(f"| {row['row']} | {row['dense']:.3f} | {cells[0]} | {cells[1]} |")
        for row in results["permutations"]:
            lines.append(f"| channel permutation of {row['channels']}, gather | | {row['gather']:.3f} | |")
            lines.append(f"| the same, product with a permutation matrix | | {row['matrix']:.3f} | |")
        return lines

    def draw(self, results: dict[str, Any], axes: Any) -> None:
        """Bars of everything, logarithmic."""
        bars = [(row["row"], row["dense"], "tab:gray") for row in results["products"]]
        bars += [(f"{row['row']}, 2:4", row["2:4"], "tab:blue") for row in results["products"] if "2:4" in row]
        for row in results["permutations"]:
            bars.append((f"gather of {row['channels']}", row["gather"], "tab:orange"))
            bars.append((f"matrix of {row['channels']}", row["matrix"], "tab:red"))
        axes.barh([name for name, _, _ in bars], [value for _, value, _ in bars], color=[color for _, _, color in bars])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlabel(f"milliseconds at {results['tokens']} tokens")


def _products(weights: list[Tensor], xs: dict[int, Tensor]) -> list[Tensor]:
    return [nn.functional.linear(xs[weight.shape[1]], weight) for weight in weights]


def _semi_structured(weight: Tensor) -> Tensor:
    return to_sparse_semi_structured(weight * nm_mask(weight.abs().float(), _PATTERN))


def _milliseconds(found: dict[str, list[float]]) -> dict[str, float]:
    return {name: 1e3 * statistics.median(seconds) for name, seconds in found.items()}
