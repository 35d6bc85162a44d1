"""The model card of an exported model, from its run record."""

from __future__ import annotations

from typing import Any

from permllm.export.transformers_classes import writer
from permllm.results.table import result_rows

_FORMS = {
    "simulate": "The channels are in the dense model's order. The weights are N:M in the order of the run, not as they are "
    "stored.",
    "folded": "The channel orders are folded into the neighbouring weights: stock transformers loads this model, it computes "
    "what the pruned model computes, and every pruned linear is N:M as it is stored.",
    "gathered": "Every pruned linear is N:M as it is stored. The activations are gathered into its order where no "
    "neighbouring weight can give them in it.",
}


def model_card(config: dict[str, Any], metrics: dict[str, Any], environment: dict[str, Any], summary: dict[str, Any]) -> str:
    """Markdown with the metadata block that the hub reads.

    Args:
        config: of the run, resolved.
        metrics: of the run.
        environment: of the run.
        summary: of the export.
    """
    model = config["model"]
    base = model["hub_name"] if model["source"] == "hub" else None
    method = f"{config['pruner']['name']}, channel order: {config['permutation']['name']}"
    if config["permutation"].get("constraint", "free") != "free":
        method += f" ({config['permutation']['constraint']})"
    if config["reconstruction"]["name"] != "none":
        method += f", weights: {config['reconstruction']['name']}"
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    lines += [f"base_model: {base}"] if base else []
    lines += ["tags:", "- sparse", f"- '{summary['sparsity']}'", "- permllm", "---", ""]
    lines += [f"# {model['name']}, {summary['sparsity']} sparse", ""]
    lines += [f"{model['name']} pruned to {summary['sparsity']} with PermLLM: {method}.", "", _FORMS[summary["form"]], ""]
    if summary["format"] == "packed" or summary["gathers"]:
        lines += [
            f"Written by {writer()}. To load it, make a checkout of the project importable (`pip install -e .` in it) and "
            "import `permllm` first:",
            "",
            "```python",
            "import permllm",
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("DIR")',
            "```",
            "",
        ]
    rows = [f"| {name} | {dense} | {sparse} |" for name, dense, sparse in result_rows(metrics)]
    lines += ["| measure | dense | sparse |", "| --- | --- | --- |", *rows, ""]
    share = summary["pruned_layers_bytes"] / summary["pruned_layers_dense_bytes"]
    lines += [
        f"Weights: {summary['bytes'] / 1e6:.1f} MB ({summary['dtype']}, {summary['format']}); "
        f"the pruned layers take {share:.2%} of their dense size.",
        "",
        f"- command: `{environment.get('command', 'not recorded')}`",
        f"- seed: {config['seed']}",
        f"- run: `{metrics['name']}-{metrics['config_hash']}`",
    ]
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    lines += [f"- versions: {versions}"] if versions else []
    return "\n".join(lines) + "\n"
