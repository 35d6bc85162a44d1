"""Perplexity of a checkpoint in a process that has transformers and nothing of this project, beside that of its run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import AutoTokenizer

from permllm.config import PerplexityConfig
from permllm.data.registry import perplexity_texts
from permllm.errors import ConfigError, DataError
from permllm.evaluation.perplexity import perplexity_windows
from permllm.runs.files import CONFIG, METRICS, read_json, read_yaml

_CHILD = """
import json, math, sys
sys.modules["permllm"] = None  # whoever imports it fails
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[3])).eval()
windows = load_file(sys.argv[2])["windows"]
total, count = 0.0, 0
with torch.no_grad():
    for window in windows.split(4 if model.config.vocab_size <= 160_000 else 1):
        logits = model(input_ids=window).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none")
        total, count = total + float(losses.double().sum()), count + losses.numel()
print(json.dumps({"class": type(model).__module__ + "." + type(model).__name__, "value": math.exp(total / count)}))
"""


def stock_perplexity(checkpoint: Path, run: Path) -> dict[str, Any]:
    """Perplexity of a checkpoint on the windows of a run's evaluation, of several texts the first, on the CPU.

    Args:
        checkpoint: that stock transformers loads.
        run: directory of the finished run that it was exported from, with a perplexity.

    Returns:
        `run`, `text`, `window` (tokens), `dtype`, `class`, `perplexity_of_the_run`,
        `perplexity_stock`, `relative_difference`.

    Raises:
        ConfigError: the run has no perplexity on a text of this package. DataError: a file is not
            as it should be, or transformers cannot load the checkpoint by itself.
    """
    config = read_yaml(run / CONFIG)
    model, metrics = config["model"], read_json(run / METRICS)
    settings = PerplexityConfig(**config["evaluation"]["perplexity"])
    dataset = ", ".join(map(str, settings.names))
    if "perplexity" not in metrics or "." in dataset:  # a record names no module that is then run
        raise ConfigError(
            f"--stock {run}: it has no perplexity on a text of this package ({dataset or 'none'})"
        )
    text = perplexity_texts(settings)[0]
    windows = perplexity_windows(
        AutoTokenizer.from_pretrained(checkpoint), text, settings, model.get("bos", False)
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "windows.safetensors"
        save_file({"windows": windows.contiguous()}, file)
        command = [
            sys.executable,
            "-c",
            _CHILD,
            str(checkpoint.resolve()),
            str(file),
            model["dtype"],
        ]
        # Elsewhere, so that what is imported is installed and not beside the caller.
        answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    if answer.returncode:
        lines = (answer.stderr.strip() or "no word").splitlines()
        # A form that needs this package says so, before what transformers advises.
        reason = next(
            (line for line in reversed(lines) if "permllm" in line and "File " not in line),
            lines[-1],
        )
        raise DataError(f"{checkpoint} cannot be loaded by stock transformers: {reason.strip()}")
    found = json.loads(answer.stdout.splitlines()[-1])
    of_run = metrics["perplexity"]["sparse"][text.name]["value"]
    return {
        "run": f"{metrics['name']}-{metrics['config_hash']}",
        "text": text.name,
        "window": int(windows.shape[1]),
        "dtype": model["dtype"],
        "class": found["class"],
        "perplexity_of_the_run": of_run,
        "perplexity_stock": found["value"],
        "relative_difference": abs(found["value"] - of_run) / of_run,
    }
