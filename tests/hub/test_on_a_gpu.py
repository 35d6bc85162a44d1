"""What a user with a GPU types first: a model of the hub, learned, evaluated, exported, on a CUDA device that is simulated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from permllm.export.verify import verify
from tests.conftest import ROOT
from tests.gpu.test_simulated import pytestmark, python
from tests.hub.repositories import MODELS

__all__ = ["pytestmark"]

SMALL = (
    "block_size=16",
    "calibration.samples=8",
    "calibration.seqlen=32",
    "permutation.epochs=1",
    "evaluation.perplexity.seqlen=48",
    "evaluation.zero_shot.tasks=[rte]",
    "evaluation.zero_shot.limit=2",
    "logger=none",
)


def test_a_model_of_the_hub_is_learned_evaluated_and_exported_on_a_gpu(
    environment: Callable[[str], dict[str, str]], tmp_path: Path
) -> None:
    simulator = str(ROOT / "tests" / "gpu" / "simulated.py")
    chosen = ("model=qwen2.5-7b", f"model.hub_name={MODELS['qwen2']}", "model.architecture=null", "permutation=lcp")
    command = (simulator, str(ROOT / "run.py"), *chosen, *SMALL, "export=gathered", "run_dir=run")
    # The simulator sees the main thread alone, and transformers would read weights in others.
    variables = environment("gpu") | {"HF_DEACTIVATE_ASYNC_LOAD": "1"}
    result = python(*command, cwd=tmp_path, **variables)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["model"].startswith(f"hub:{MODELS['qwen2']}:")
    assert metrics["zero_shot"]["sparse"]["rte"]["n"] == 2
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["hardware"]["device"] == "cuda:0"
    assert verify(tmp_path / "run" / "export").passed
