"""Host memory of an export: of a random checkpoint that is written to disk first, in a process of its own.

What is measured is the growth of the exporting process over its memory after the imports: all pages, those of mapped files
too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

from permllm.config import ModelConfig, RunConfig
from permllm.errors import ConfigError, DataError
from permllm.models.families import channel_groups
from permllm.models.loading import folder_identity
from permllm.permutation.shared import expanded, shared_orders
from permllm.record.files import write_record, write_text
from permllm.record.names import CONFIG, MASKS, METRICS, PERMUTATIONS, SCHEMA_VERSION
from permllm.record.run_tensors import write_masks
from permllm.record.schema import ExportMemory as Form
from permllm.record.shards import write_shards
from permllm.record.tensors import write_tensors
from permllm.sparsity import PackedMasks, permuted_nm_mask
from permllm.studies.base import StudyInputs
from permllm.studies.settings import ExportMemorySettings

_FORMATS = ("dense", "packed")
_CHILD = """
import json, sys
from pathlib import Path
import torch
from permllm.export.checkpoint import Request, export_run
from permllm.runtime.memory import peak_host_memory, reset_peak_memory
reset_peak_memory(torch.device("cpu"))
before = peak_host_memory()
folder, format, shard = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
summary = export_run(folder / "run", Request("folded", format, shard_gb=shard), folder / f"folded-{format}")
print(json.dumps(summary | {"peak_growth_bytes": peak_host_memory() - before}))
"""


class ExportMemory(ExportMemorySettings):
    """The study: needs the model's dimensions, not its weights."""

    form: ClassVar[type] = Form

    def measure(self, inputs: StudyInputs) -> dict[str, Any]:
        """Bytes of the checkpoint, of its largest shard and of the growth, for each format of a folded model."""
        rows = []
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            total = _make_run(inputs.config, folder, self.layers, self.shard_gb)
            for format in _FORMATS:
                found = _export(folder, format, self.shard_gb)
                largest = max(file.stat().st_size for file in (folder / f"folded-{format}").glob("*.safetensors"))
                rows.append(found | {"dense_checkpoint_bytes": total, "largest_shard_bytes": largest})
        return {"model": inputs.config.model.name, "layers": self.layers, "rows": rows}

    def lines(self, results: dict[str, Any]) -> list[str]:
        """A row for each format."""
        columns = ("form", "dense model, GB", "largest shard, GB", "peak growth, GB", "seconds")
        lines = [f"{results['model']}, {results['layers']} layers.", ""]
        lines += [f"| {' | '.join(columns)} |", f"| {' | '.join(['---'] * len(columns))} |"]
        for row in results["rows"]:
            sizes = [row[key] / 1e9 for key in ("dense_checkpoint_bytes", "largest_shard_bytes", "peak_growth_bytes")]
            cells = [f"{row['form']}, {row['format']}", *(f"{size:.2f}" for size in sizes), f"{row['seconds']:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
        return lines

    def draw(self, results: dict[str, Any], axes: Any) -> None:
        """Bars of the sizes."""
        rows = results["rows"]
        keys = ("dense_checkpoint_bytes", "largest_shard_bytes", "peak_growth_bytes")
        for place, key in enumerate(keys):
            positions = [index + 0.25 * (place - 1) for index in range(len(rows))]
            axes.bar(positions, [row[key] / 1e9 for row in rows], 0.25, label=key.removesuffix("_bytes").replace("_", " "))
        axes.set_xticks(range(len(rows)), [f"{row['form']}, {row['format']}" for row in rows])
        axes.set_ylabel("GB")
        axes.legend()


def _make_run(config: RunConfig, folder: Path, layers: int, shard_gb: float) -> int:
    """Write the dense checkpoint, shard by shard, and a run with random foldable orders; the bytes of the checkpoint."""
    if not config.model.architecture:
        raise ConfigError(f"study=export_memory: conf/model has no dimensions of {config.model.name}")
    settings: dict[str, Any] = dict(config.model.architecture) | {"num_hidden_layers": layers, "tie_word_embeddings": False}
    shape = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    dense = folder / "dense"
    dense.mkdir()
    shape.dtype = torch.bfloat16
    shape.save_pretrained(dense)
    ByT5Tokenizer(extra_ids=0).save_pretrained(dense)
    groups = channel_groups(skeleton)
    shared = shared_orders(groups, "foldable")
    generator = torch.Generator().manual_seed(config.seed)
    found = {}
    for order in shared:
        starts = range(0, order.channels, order.segment)
        found[order.name] = torch.cat([start + torch.randperm(order.segment, generator=generator) for start in starts])
    orders = expanded(shared, found)
    order_of = {f"{path}.weight": orders[group.name] for group in groups for path in group.members}
    planned = {name: torch.empty_like(value, dtype=torch.bfloat16) for name, value in skeleton.named_parameters()}
    masks = PackedMasks()

    def make(name: str) -> torch.Tensor:
        weight = torch.randn(planned[name].shape, generator=generator).to(torch.bfloat16)
        if name in order_of:
            masks[name.removesuffix(".weight")] = permuted_nm_mask(weight.float().abs(), order_of[name], config.pattern)
        return weight

    write_shards(dense, planned, make, int(shard_gb * 1e9))
    _write_record(config, folder / "run", dense)
    write_tensors(folder / "run" / PERMUTATIONS, orders)
    write_masks(folder / "run" / MASKS, masks)
    return sum(tensor.numel() * tensor.element_size() for tensor in planned.values())


def _write_record(config: RunConfig, run: Path, dense: Path) -> None:
    """The settings and metrics of a finished run of the checkpoint, as far as an export reads them."""
    made = {"name": "random", "source": "local", "hub_name": None, "path": str(dense), "dtype": "bfloat16", "device": "cpu"}
    model: ModelConfig = replace(config.model, **made, revision=None)  # type: ignore[arg-type]
    named, pattern = {"name": "random"}, config.pattern
    groups = {"pruner": named, "permutation": named, "reconstruction": {"name": "none"}}
    write_text(run / CONFIG, json.dumps({"name": "random", "model": made, "seed": 0, "sparsity": str(pattern)} | groups))
    metrics = {"schema_version": SCHEMA_VERSION, "status": "finished", "name": "random", "config_hash": "0", "seconds": {}}
    sparsity = {"pattern": str(pattern), "fraction": pattern.n / pattern.m, "violations": 0}
    write_record(run / METRICS, metrics | {"model": folder_identity(model, dense), "sparsity": sparsity})


def _export(folder: Path, format: str, shard_gb: float) -> dict[str, Any]:
    """Export the run in a folder, in a process of its own; its summary, with `peak_growth_bytes`."""
    command = [sys.executable, "-c", _CHILD, str(folder), format, str(shard_gb)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise DataError(f"the export failed: {(result.stderr.strip() or 'no word').splitlines()[-1]}")
    return dict(json.loads(result.stdout.splitlines()[-1]))
