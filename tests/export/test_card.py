"""Model cards: the metadata as the hub's client reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from permllm.export.card import model_card
from tests.settings.test_config import config

GEMMA = ("google/gemma-3-270m", "gemma")
BASES = {
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
    "gemma3-270m model.accept_terms=true": GEMMA,
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", None),
    "hub model.hub_name=some/model model.licence=mit": ("some/model", "mit"),
    "local model.path=.": (None, None),
}


@pytest.mark.parametrize("model", BASES)
def test_the_hub_reads_the_base_model_and_the_licence(model: str, tmp_path: Path) -> None:
    resolved = config(*f"model={model}".split()).resolved
    metrics: dict[str, Any] = {"name": "x", "config_hash": "0"}
    summary = {"form": "folded", "sparsity": "2:4", "bytes": 0, "dtype": "bfloat16"}
    (tmp_path / "README.md").write_text(model_card(resolved, metrics, summary), encoding="utf-8")
    card = ModelCard.load(tmp_path / "README.md")
    base_model, licence = BASES[model]
    assert (card.data.base_model, card.data.license) == (base_model, licence)
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["sparse", "2:4", "permllm"]


def test_names_of_a_stranger_are_no_markup() -> None:
    resolved = config("model=tiny-random").resolved
    resolved["model"]["name"] = "<img src=x>"
    metrics: dict[str, Any] = {"name": "x", "config_hash": "0"}
    text = {"value": 2.0, "window": 64, "tokens": 63}
    metrics["perplexity"] = {"dense": {"a|b": text}, "sparse": {"a|b": text}}
    summary = {"form": "folded", "sparsity": "2:4", "bytes": 0, "dtype": "bfloat16"}
    body = model_card(resolved, metrics, summary).split("---\n")[2]
    assert "<" not in body
    assert r"| a\|b perplexity" in body
