"""Perplexity of an exported model in a process that has transformers and nothing of ours, beside that of its run.

    python scripts/stock_perplexity.py runs/RUN --checkpoint runs/RUN/export --json stock.json

The windows of tokens are those of the run's evaluation. The other process reads them from a file, loads the checkpoint with
`AutoModelForCausalLM`, and cannot import this project.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import AutoTokenizer

from permllm.config import EvaluationConfig
from permllm.evaluation.perplexity import perplexity_windows
from permllm.record.files import read_json, read_yaml
from permllm.record.schema import FinishedRun, Settings

CHILD = """
import json, math, sys
sys.modules["permllm"] = None  # whoever imports it fails
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[3])).eval()
windows = load_file(sys.argv[2])["windows"]
total, count = 0.0, 0
with torch.no_grad():
    for window in windows.split(4):
        logits = model(input_ids=window).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten(), reduction="none")
        total, count = total + float(losses.double().sum()), count + losses.numel()
print(json.dumps({"class": type(model).__module__ + "." + type(model).__name__, "value": math.exp(total / count)}))
"""


def main() -> None:
    """Print, and write, both perplexities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="default: RUN/export")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    checkpoint = options.checkpoint or options.run / "export"
    config: dict[str, Any] = dict(read_yaml(options.run / "config.yaml", Settings))
    metrics = read_json(options.run / "metrics.json", FinishedRun)
    # The evaluation whose results stand at the top; early records say it in their config alone.
    evaluation = metrics.get("protocol", {}).get("evaluation", config["evaluation"])
    settings = OmegaConf.merge(OmegaConf.structured(EvaluationConfig), evaluation)
    if "." in (settings.perplexity.dataset or ""):  # a record names no module that is then run
        parser.error(f"{options.run}: its text {settings.perplexity.dataset} is not one of permllm.data.texts")
    text = perplexity_windows(AutoTokenizer.from_pretrained(checkpoint), settings.perplexity)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "windows.safetensors"
        save_file({"windows": text.windows.contiguous()}, file)
        command = [sys.executable, "-c", CHILD, str(checkpoint), str(file), config["model"]["dtype"]]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    of_run = metrics["perplexity"]["sparse"][text.name]["value"]
    result = {
        "run": f"{metrics['name']}-{metrics['config_hash']}",
        "text": text.name,
        "window": int(text.windows.shape[1]),
        "class": found["class"],
        "perplexity_of_the_run": of_run,
        "perplexity_stock": found["value"],
        "relative_difference": abs(found["value"] - of_run) / of_run,
    }
    print(json.dumps(result, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
