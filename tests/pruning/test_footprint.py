"""Planned memory of a run beside the memory that it takes."""

from __future__ import annotations

import json
import logging
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


def test_auto_takes_the_first_placement_that_fits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    of = planned("model=qwen2.5-7b", device="cuda")
    for on_device, on_host, chosen, said in (
        (40, 64, "device", ""),
        (14, 64, "host", "model.placement=host, as device needs"),
        (14, 12, "disk", "host needs"),
        (2, 2, "disk", "no model.placement fits"),
    ):
        caplog.clear()
        monkeypatch.setattr(places, "free_memory", lambda _, size=on_device: size * 1e9)
        monkeypatch.setattr(places, "available_host_memory", lambda size=on_host: size * 1e9)
        assert placement_for(of) == chosen
        assert said in caplog.text
        assert bool(caplog.text) == bool(said)


def test_auto_leaves_what_needs_the_device_there_and_a_random_model_out_of_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places, "available_host_memory", lambda: 0)
    for words, expected in ((("reconstruction=distill",), "device"), ((), "host")):
        assert placement_for(planned("model=tiny", *words)) == expected


def planned(*words: str, device: str = "cpu") -> Footprint:
    """Return the plan of a job."""
    asked = config(*words, "logger=none")
    return Footprint(asked, meta_model(asked.model), methods_of(asked), torch.device(device))


def test_processes_share_the_activations_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def learns(size: int) -> int:
        return (
            planned("model=llama-2-7b", f"permutation.batch_size={size}", device="cuda")
            .needs("device")
            .stages["learn"]
        )

    alone, one = learns(8), learns(1)
    monkeypatch.setattr(parallel, "world_size", lambda: 8)
    assert learns(8) == one < alone


def test_layers_on_the_host_have_the_states_of_a_text_wait_there() -> None:
    made = planned("model=tiny", "permutation=none", "evaluation.perplexity.limit=1000")
    states = 1000 * made.config.evaluation.perplexity.seqlen * made.model.config.hidden_size * 4
    assert made.needs("host").host >= states > made.needs("device").host


WIDE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 3}
WIDE |= {"num_attention_heads": 8, "num_key_value_heads": 8}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wide") / "model"
    overrides = [f"model.architecture.{key}={value}" for key, value in WIDE.items()]
    assert (
        run_python(
            "scripts/random_checkpoint.py", str(folder), "model=tiny", *overrides, cwd=ROOT
        ).returncode
        == 0
    )
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
def test_the_plan_says_what_is_taken(
    tmp_path: Path, wide: Path, placement: str, method: list[str]
) -> None:
    words = [
        "model=local",
        f"model.path={wide}",
        "model.dtype=float32",
        f"model.placement={placement}",
        "calibration=builtin",
    ]
    words += [
        "calibration.samples=4",
        "calibration.seqlen=64",
        "evaluation.perplexity.limit=1",
        "logger=none",
        *method,
    ]
    words += [
        "evaluation.perplexity.dataset=builtin",
        "evaluation.perplexity.seqlen=64",
        "evaluation.tasks=[]",
    ]
    done = run_command(*words, cwd=tmp_path, fresh=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("runs/*/metrics.json")
    metrics = json.loads(file.read_text())
    planned, peak = metrics["planned_memory_bytes"], metrics["peak_memory_bytes"]
    assert planned == pytest.approx(peak, rel=0.15)
    assert f"{peak / 1e9:.2f} GB at the peak ({planned / 1e9:.2f} GB were planned)" in done.stdout
    if method == [
        "permutation=none"
    ]:  # the command says what the record does, but for what Python took until then
        plan = run_command(*words, "plan=true", "force=true", cwd=tmp_path, fresh=True)
        assert plan.returncode == 0, plan.stderr
        (row,) = [line for line in plan.stdout.splitlines() if line.startswith("│ peak")]
        assert float(
            row.split("│")[2 + ("device", "host", "disk").index(placement)]
        ) == pytest.approx(planned / 1e9, rel=0.05)
