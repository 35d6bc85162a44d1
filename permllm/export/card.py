"""The model card of an exported model, from its run record."""

from __future__ import annotations

import math
import re
from typing import Any

import yaml

from permllm.export.gathered import writer
from permllm.runs.measures import patterns_text, result_rows

_FORMS = {
    "simulate": "The channels are in the dense model's order. The weights are N:M in the order of the run, not as they are "
    "stored.",
    "folded": "The permutations are folded into the neighbouring weights: stock transformers loads this model, it computes "
    "what the pruned model computes, and every pruned linear is N:M as it is stored.",
    "gathered": "Every pruned linear is N:M as it is stored. The activations are gathered into its order where no "
    "neighbouring weight can give them in it.",
}

# What Markdown, and HTML inside of it, may take for markup.
_MARKUP = re.compile(r"[\\`*_{}\[\]<>()#!|~&$]")


def _text(words: object) -> str:
    """Words of others as one line of plain text."""
    return _MARKUP.sub(r"\\\g<0>", " ".join(str(words).split()))


def _code(words: object) -> str:
    """Words of others as one line of code, in more backticks than it holds one after the other."""
    line = " ".join(str(words).split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    return f"{fence}{line}{fence}" if len(fence) == 1 else f"{fence} {line} {fence}"


def model_notice(config: dict[str, Any]) -> str | None:
    """What the terms of the dense model ask of every copy, and that its weights were changed; None where it has none.

    Args:
        config: of the run, resolved.
    """
    notice = config["model"].get("notice")
    if notice is None:
        return None
    return f"{notice}. The weights of {config['model']['name']} were changed: they were pruned to {config['sparsity']}."


def model_card(
    config: dict[str, Any],
    metrics: dict[str, Any],
    environment: dict[str, Any],
    summary: dict[str, Any],
) -> str:
    """Markdown with the metadata block that the hub reads.

    Args:
        config: of the run, resolved.
        metrics: of the run.
        environment: of the run.
        summary: of the export.
    """
    model = config["model"]
    base = {"base_model": " ".join(model["hub_name"].split())} if model["source"] == "hub" else {}
    licence = {"license": model["licence"]} if model.get("licence") else {}
    tags = {"tags": ["sparse", summary["sparsity"], "permllm"]}
    metadata = (
        {"library_name": "transformers", "pipeline_tag": "text-generation"} | licence | base | tags
    )
    method = f"{config['pruner']['name']}, channel permutation: {config['permutation']['name']}"
    if config["permutation"].get("constraint", "free") != "free":
        method += f" ({config['permutation']['constraint']})"
    if config.get("mask", {}).get("name", "pruner") != "pruner":
        method += f", masks: {config['mask']['name']}"
    if config["reconstruction"]["name"] != "none":
        method += f", weights: {config['reconstruction']['name']}"
    name = _text(model["name"])
    lines = ["---", yaml.safe_dump(metadata, sort_keys=False, width=math.inf).rstrip(), "---", ""]
    lines += [f"# {name}, {summary['sparsity']} sparse", ""]
    lines += [f"This is {name}, pruned to {summary['sparsity']} with PermLLM: {_text(method)}.", ""]
    notice = model_notice(config)
    lines += [f"{_text(notice)} The terms: {_text(model['terms'])}", ""] if notice else []
    if summary.get("patterns"):
        lines += [
            f"Not every linear of its decoder layers is so: {_text(patterns_text(metrics['sparsity']))}.",
            "",
        ]
    lines += [_FORMS[summary["form"]], ""]
    if summary["gathers"]:
        lines += [
            f"Written by {writer()}. To load it, make a checkout of the project importable (`pip install -e .` in it) and "
            "import `permllm.export` first:",
            "",
            "```python",
            "import permllm.export",
            "from transformers import AutoModelForCausalLM",
            "",
            'model = AutoModelForCausalLM.from_pretrained("DIR")',
            "```",
            "",
        ]
    rows = [f"| {' | '.join(map(_text, row))} |" for row in result_rows(metrics)]
    lines += ["| measure | dense | sparse |", "| --- | --- | --- |", *rows, ""]
    lines += [
        f"Weights: {summary['bytes'] / 1e6:.1f} MB ({summary['dtype']}).",
        "",
        f"- command: {_code(environment.get('command', 'not recorded'))}",
        f"- seed: {_text(config['seed'])}",
        f"- run: {_code(metrics['name'] + '-' + metrics['config_hash'])}",
    ]
    versions = ", ".join(
        _text(f"{name} {version}") for name, version in environment.get("versions", {}).items()
    )
    lines += [f"- versions: {versions}"] if versions else []
    return "\n".join(lines) + "\n"
