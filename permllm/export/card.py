"""Model card and licence notice of a checkpoint."""

import html
from typing import Any

from huggingface_hub import ModelCardData

from permllm.export.serve import COMMAND, READERS, SETTINGS
from permllm.report.metrics import result_rows, sparsity_text
from permllm.runtime.version import __version__
from permllm.settings.config import METHOD_GROUPS

_TRIED = "Small random models of PermLLM's families were tried with transformers 4.57.6 and 5.24.0."
_FORMS = {
    "simulate": "Its channels are in the dense model's order, so its stored weights are not N:M. "
    + _TRIED,
    "folded": "Its permutations are folded into the neighbouring weights. Its stored weights are "
    f"N:M, and transformers loads it like any other model. {_TRIED}",
    "gathered": "Its stored weights are N:M. It gathers activations where a permutation cannot be "
    "folded into neighbouring weights, so transformers loads it only after `import permllm.export` "
    "from a checkout of PermLLM. Tried with transformers 5.24.0.",
}


def model_notice(config: dict[str, Any]) -> str | None:
    """Return the notice that the dense model's terms demand for copies; None: they demand none."""
    model = config["model"]
    if model.get("notice") is None:
        return None
    changed = f"The weights of {model['name']} were changed: they were pruned to"
    return f"{model['notice']}. {changed} {config['sparsity']}."


def model_card(config: dict[str, Any], metrics: dict[str, Any], summary: dict[str, Any]) -> str:
    """Return the model card: Markdown with the metadata that the hub reads.

    The settings and metrics are those of the run, and the summary that of the export.
    """
    model = config["model"]
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=model.get("licence"),
        base_model=model.get("base_model") or model.get("hub_name"),
        tags=["sparse", summary["sparsity"], "permllm"],
    )
    methods = [f"{group} {config[group]['name']}" for group in METHOD_GROUPS if group in config]
    size = f"{summary['bytes'] / 1e6:.1f} MB"
    paragraphs = [
        f"# {model['name']}, {summary['sparsity']} sparse",
        f"Pruned with PermLLM {__version__} (arXiv 2510.10136): {', '.join(methods)}.",
        _FORMS[summary["form"]],
    ]
    if notice := model_notice(config):
        paragraphs.append(f"{notice} The terms: {model['terms']}")
    paragraphs.append(f"Weights: {size}, {summary['dtype']}.")
    if summary.get("patterns"):
        paragraphs.append(f"Pattern of its linears: {sparsity_text(metrics['sparsity'])}.")
    if served := summary.get("served"):
        paragraphs += [
            f"vLLM runs {served['sparse']} of its {served['all']} linears, as vLLM joins them, on "
            "FP8 kernels for 2:4, and the others on dense kernels, in FP8 where their size fits. "
            "On an H100 or H200 (compute capability 9; torchao 0.18 has no kernel for a B200), in "
            "this folder:",
            f"    {COMMAND}",
            f"{READERS} read the file `{SETTINGS}`. PermLLM has not run this on a GPU.",
        ]
    rows = [("metric", "dense", "sparse"), ("---", "---", "---"), *result_rows(metrics)]
    cells = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    paragraphs.append("\n".join(f"| {' | '.join(row)} |" for row in cells))
    paragraphs.append(f"Run: {metrics['name']}-{metrics['config_hash']}, seed {config['seed']}.")
    # Names may come from the record of a stranger.
    text = html.escape("\n\n".join(paragraphs), quote=False)
    return f"---\n{metadata.to_yaml()}\n---\n\n{text}\n"
