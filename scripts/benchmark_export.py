"""Peak host memory of an export, on a random checkpoint of LLaMA-2-7B's layer shapes that is written to disk first.

    python scripts/benchmark_export.py --layers 8 --shard-gb 2 --json memory.json

The dense checkpoint is made shard by shard; the run record holds random foldable orders and masks. What is measured is the
growth of the exporting process over its memory after the imports: all pages, those of mapped files too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

from permllm.config import ModelConfig
from permllm.models.families import channel_groups
from permllm.models.loading import folder_identity
from permllm.permutation.shared import expanded, shared_orders
from permllm.record.environment import hardware, versions
from permllm.record.files import write_json, write_record, write_text
from permllm.record.run_tensors import write_masks
from permllm.record.tensors import write_tensors
from permllm.sparsity import NMPattern, permuted_nm_mask

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
}
PATTERN = NMPattern(2, 4)

CHILD = """
import json, sys
from pathlib import Path
import torch
from permllm.export.checkpoint import Request, export_run
from permllm.runtime.memory import peak_host_memory, reset_peak_memory
reset_peak_memory(torch.device("cpu"))
before = peak_host_memory()
folder, form, format, shard = Path(sys.argv[1]), sys.argv[2], sys.argv[3], float(sys.argv[4])
summary = export_run(folder / "run", Request(form, format, shard_gb=shard), folder / f"{form}-{format}")
print(json.dumps(summary | {"peak_growth_bytes": peak_host_memory() - before}))
"""


def make_run(folder: Path, layers: int, shard_gb: float) -> int:
    """Write the dense checkpoint and the run; the bytes of the checkpoint."""
    config = AutoConfig.for_model("llama", num_hidden_layers=layers, tie_word_embeddings=False, **SHAPE)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    dense = folder / "dense"
    dense.mkdir()
    config.dtype = torch.bfloat16
    config.save_pretrained(dense)
    ByT5Tokenizer(extra_ids=0).save_pretrained(dense)
    groups = channel_groups(skeleton)
    shared = shared_orders(groups, "foldable")
    generator = torch.Generator().manual_seed(0)
    found = {}
    for order in shared:
        starts = range(0, order.channels, order.segment)
        found[order.name] = torch.cat([start + torch.randperm(order.segment, generator=generator) for start in starts])
    orders = expanded(shared, found)
    order_of = {f"{path}.weight": orders[group.name] for group in groups for path in group.members}
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    masks, total, number = {}, 0, 1
    for name, parameter in skeleton.named_parameters():
        shard[name] = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16)
        total += shard[name].numel() * 2
        weight_map[name] = f"model-{number:05d}.safetensors"
        if name in order_of:
            masks[name.removesuffix(".weight")] = permuted_nm_mask(shard[name].float().abs(), order_of[name], PATTERN)
        if sum(tensor.numel() * 2 for tensor in shard.values()) > shard_gb * 1e9:
            save_file(shard, dense / weight_map[name], {"format": "pt"})
            shard, number = {}, number + 1
    if shard:
        save_file(shard, dense / f"model-{number:05d}.safetensors", {"format": "pt"})
    write_json(dense / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    settings = {
        "name": "random",
        "source": "local",
        "path": str(dense),
        "dtype": "bfloat16",
        "device": "cpu",
        "hub_name": None,
    }
    model = ModelConfig(**settings)  # type: ignore[arg-type]
    named = {"name": "random"}
    run = {
        "name": "random",
        "model": settings | {"hub_name": None},
        "seed": 0,
        "sparsity": str(PATTERN),
        "pruner": named,
        "permutation": named,
    }
    write_text(folder / "run" / "config.yaml", json.dumps(run | {"reconstruction": {"name": "none"}}))
    identity = folder_identity(model, dense)
    sparsity = {"pattern": str(PATTERN), "fraction": PATTERN.n / PATTERN.m, "violations": 0}
    metrics = {"schema_version": 1, "status": "finished", "name": "random", "config_hash": "0", "seconds": {}}
    write_record(folder / "run" / "metrics.json", metrics | {"model": identity, "sparsity": sparsity})
    write_tensors(folder / "run" / "permutations.safetensors", orders)
    write_masks(folder / "run" / "masks.safetensors", masks)
    return total


def export(folder: Path, form: str, format: str, shard_gb: float) -> dict[str, Any]:
    """Export the run in a folder, in a process of its own; its summary, with `peak_growth_bytes`."""
    command = [sys.executable, "-c", CHILD, str(folder), form, format, str(shard_gb)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(result.stdout.splitlines()[-1]))


def main() -> None:
    """Make the run, export it in its own process, print and write what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shard-gb", type=float, default=2.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = make_run(folder, options.layers, options.shard_gb)
        for form, format in (("folded", "dense"), ("folded", "packed")):
            found = export(folder, form, format, options.shard_gb)
            largest = max(file.stat().st_size for file in (folder / f"{form}-{format}").glob("*.safetensors"))
            rows.append(found | {"dense_checkpoint_bytes": total, "largest_shard_bytes": largest})
            print(
                f"{form}, {format}: {total / 1e9:.2f} GB dense, largest shard {largest / 1e9:.2f} GB, "
                f"peak growth {found['peak_growth_bytes'] / 1e9:.2f} GB, {found['seconds']:.0f} s"
            )
    if options.json:
        report = {"rows": rows, "layers": options.layers, "hardware": hardware(torch.device("cpu")), "versions": versions()}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
