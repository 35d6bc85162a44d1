"""What a run is planned to take, and what it takes."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from permllm.models.load import meta_model
from permllm.pruning import placement as places
from permllm.pruning.footprint import Footprint
from permllm.pruning.methods import methods_of
from permllm.pruning.placement import placement_for
from permllm.runtime import parallel
from tests.conftest import ROOT, run_command, run_python
from tests.test_config import config


@pytest.mark.parametrize(
    ("device_gb", "host_gb", "chosen", "said"),
    [
        (40.0, 64.0, "device", ""),
        (14.0, 64.0, "host", "model.placement=host, as device needs"),
        (14.0, 12.0, "disk", "host needs"),
        (2.0, 2.0, "disk", "no model.placement fits"),
    ],
)
def test_auto_takes_the_first_placement_that_fits(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    device_gb: float,
    host_gb: float,
    chosen: str,
    said: str,
) -> None:
    monkeypatch.setattr(places, "free_memory", lambda _: int(device_gb * 1e9))
    monkeypatch.setattr(places, "available_host_memory", lambda: int(host_gb * 1e9))
    with caplog.at_level(logging.INFO):
        assert placement_for(planned("model=qwen2.5-7b", device="cuda")) == chosen
    assert said in caplog.text
    assert bool(caplog.text) == bool(said)


def test_auto_leaves_what_needs_the_device_there_and_a_random_model_out_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "available_host_memory", lambda: 0)
    for words, expected in ((("reconstruction=distill",), "device"), ((), "host")):
        assert placement_for(planned("model=tiny", *words)) == expected


def planned(*words: str, device: str = "cpu") -> Footprint:
    """Return the plan of a job."""
    asked = config(*words, "logger=none")
    return Footprint(asked, meta_model(asked.model), methods_of(asked), torch.device(device))


def test_processes_share_the_activations_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def learns(size: int) -> int:
        return planned("model=llama-2-7b", f"permutation.batch_size={size}", device="cuda").needs("device").stages["learn"]

    alone, one = learns(8), learns(1)
    monkeypatch.setattr(parallel, "world_size", lambda: 8)
    assert learns(8) == one < alone


def test_layers_on_the_host_have_the_states_of_a_text_wait_there() -> None:
    made = planned("model=tiny", "permutation=none", "evaluation.perplexity.limit=1000")
    states = 1000 * made.config.evaluation.perplexity.seqlen * made.model.config.hidden_size * 4
    assert made.needs("host").host >= states > made.needs("device").host


EVALUATES = """
import sys, torch
from permllm.evaluation.perplexity import perplexity
from permllm.runtime.memory import host_memory, peak_host_memory, reset_peak_memory
from permllm.runtime.precision import half_products
from tests.conftest import tiny_model
dtype = getattr(torch, sys.argv[1])
model = tiny_model("llama", dtype=dtype, vocab_size=int(sys.argv[2])).eval()
with half_products(dtype, model.device):
    perplexity(model, torch.zeros(1, 8, dtype=torch.long), 8)
    before = host_memory()
    reset_peak_memory(model.device)
    perplexity(model, torch.zeros(2, 1024, dtype=torch.long), 2048)
print(peak_host_memory() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_plan_knows_the_logits_of_an_evaluation() -> None:
    vocabulary = 40_000
    words = ["model.dtype=bfloat16", f"model.architecture.vocab_size={vocabulary}", "evaluation.perplexity.batch_tokens=2048"]
    stages = planned("model=tiny", "evaluation.perplexity.seqlen=1024", "permutation=none", *words).needs("device").stages
    command = [sys.executable, "-c", EVALUATES, "bfloat16", str(vocabulary)]
    taken = int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert stages["perplexity"] - stages["weights"] == pytest.approx(taken, rel=0.15)


WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "model"
    overrides = [f"model.architecture.{key}={value}" for key, value in WIDE.items()]
    assert run_python("scripts/random_checkpoint.py", str(folder), "model=tiny", *overrides, cwd=ROOT).returncode == 0
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("placement", "method"),
    [
        ("disk", ["permutation=none"]),
        ("disk", ["permutation=lcp", "permutation.init=random", "permutation.epochs=1"]),
        ("device", ["permutation=none", "mask=score", "mask.epochs=1"]),
        ("device", ["permutation=none", "pruner=sparsegpt"]),
    ],
    ids=["none", "lcp", "score", "sparsegpt"],
)
def test_the_plan_says_what_is_taken(tmp_path: Path, wide: Path, placement: str, method: list[str]) -> None:
    words = ["model=local", f"model.path={wide}", "model.dtype=float32", f"model.placement={placement}", "calibration=builtin"]
    words += ["calibration.samples=4", "calibration.seqlen=64", "evaluation.perplexity.limit=1", "logger=none", *method]
    words += ["evaluation.perplexity.dataset=builtin", "evaluation.perplexity.seqlen=64", "evaluation.tasks=[]"]
    done = run_command(*words, cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("runs/*/metrics.json")
    metrics = json.loads(file.read_text())
    planned, peak = metrics["planned_memory_bytes"], metrics["peak_memory_bytes"]
    assert planned == pytest.approx(peak, rel=0.15)
    assert f"{peak / 1e9:.2f} GB at the peak ({planned / 1e9:.2f} GB were planned)" in done.stdout
    if method == ["permutation=none"]:  # the command says what the record does, but for what Python took until then
        plan = run_command(*words, "plan=true", "force=true", cwd=tmp_path, fresh=True)
        assert plan.returncode == 0, plan.stderr
        (row,) = [line for line in plan.stdout.splitlines() if line.startswith("│ peak")]
        assert float(row.split("│")[2 + ("device", "host", "disk").index(placement)]) == pytest.approx(planned / 1e9, rel=0.05)
