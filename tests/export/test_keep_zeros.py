"""Zeros of a pruned model after fine-tuning: by optimizers, transformers' Trainer and LoRA."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

import permllm
from permllm.errors import ConfigError
from permllm.export.write import export_run
from permllm.models.families import channel_groups, linear_at
from permllm.settings.config import ExportConfig
from permllm.sparsity.nm import violations
from tests.conftest import ROOT, tiny_model
from tests.export.pruned import TWO_OF_FOUR, load, logits, make_run, variant_model
from tests.problems import tokens


@pytest.fixture(params=["folded", "gathered"])
def pruned(request: pytest.FixtureRequest, tmp_path: Path) -> PreTrainedModel:
    """Return the model of a checkpoint, in the folder `my-model`."""
    constraint = {"folded": "foldable", "gathered": "free"}[request.param]
    run = make_run(tmp_path, variant_model("llama"), constraint)
    export_run(run, ExportConfig(request.param), tmp_path / "my-model")
    return load(tmp_path / "my-model")


def weights(model: PreTrainedModel) -> list[Tensor]:
    paths = [path for group in channel_groups(model) for path in group.members]
    return [linear_at(model, path).weight.detach().clone() for path in paths]


def check_tuned(model: PreTrainedModel, before: list[Tensor]) -> None:
    """Check that every linear has the same zeros as before, and other values."""
    for weight, old in zip(weights(model), before, strict=True):
        assert violations(weight, None, TWO_OF_FOUR) == 0
        assert torch.equal(weight == 0, old == 0)
        assert not torch.equal(weight, old)


def train(model: Any, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(20):
        optimizer.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()


def test_copies_keep_zeros(pruned: PreTrainedModel) -> None:
    before = weights(pruned)
    permllm.keep_zeros(pruned)
    train(pruned, torch.optim.AdamW(pruned.parameters(), lr=1e-2))
    for model in (pruned, copy.deepcopy(pruned)):  # a copy of a copy too
        trained = copy.deepcopy(model)
        train(trained, torch.optim.AdamW(trained.parameters(), lr=1e-2))
        check_tuned(trained, before)


@pytest.mark.parametrize(
    ("name", "options"),
    [("SGD", {"momentum": 0.9, "nesterov": True}), ("Adam", {}), ("Adafactor", {})],
)
def test_an_optimizer_keeps_zeros(
    name: str, options: dict[str, Any], pruned: PreTrainedModel
) -> None:
    before = weights(pruned)
    pruned.requires_grad_(False)
    permllm.keep_zeros(pruned)
    pruned.requires_grad_(True)
    optimizer = getattr(torch.optim, name)
    train(pruned, optimizer(pruned.parameters(), lr=1e-2, weight_decay=0.1, **options))
    check_tuned(pruned, before)


def test_the_trainer_of_the_page_keeps_zeros(
    pruned: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    (lines,) = re.findall(r"```python\n(from transformers import Trainer.*?)```", page, re.DOTALL)
    exec(lines, {"windows": [{"input_ids": row, "labels": row} for row in tokens()]})
    check_tuned(load(tmp_path / "tuned"), weights(pruned))


def test_an_interrupted_trainer_goes_on_where_it_stopped(
    pruned: PreTrainedModel, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"save_steps": 2, "learning_rate": 1e-2, "report_to": "none"}
    data = [{"input_ids": row, "labels": row} for row in tokens()]

    def tuned(steps: int, resume: bool) -> Tensor:
        model = permllm.load(tmp_path / "my-model")
        arguments = TrainingArguments(str(tmp_path / "logs"), max_steps=steps, **settings)
        Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=resume)
        return logits(model)

    whole = tuned(4, False)
    shutil.rmtree(tmp_path / "logs" / "checkpoint-4")
    torch.testing.assert_close(tuned(4, True), whole)


def test_a_merged_lora_computes_the_same_with_the_same_zeros(pruned: PreTrainedModel) -> None:
    peft = pytest.importorskip("peft")
    pruned.double()  # merged weights are rounded again, which float32 shows
    before = weights(pruned)
    settings = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
    model = peft.get_peft_model(pruned, settings)
    permllm.keep_zeros(model)
    train(model.train(), torch.optim.AdamW(model.parameters(), lr=1e-2))
    tuned = logits(model.eval())
    for merge in (model.merge_adapter, model.unmerge_adapter):
        merge()
        torch.testing.assert_close(logits(model), tuned)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), tuned)
    check_tuned(merged, before)


def test_an_adapter_of_the_trainer_can_be_loaded(pruned: PreTrainedModel, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(pruned, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    permllm.keep_zeros(model)
    settings: dict[str, Any] = {"max_steps": 2, "learning_rate": 1e-2, "report_to": "none"}
    data = [{"input_ids": row, "labels": row} for row in tokens()]
    arguments = TrainingArguments(str(tmp_path / "logs"), **settings)
    Trainer(model, arguments, train_dataset=data).train()
    adapter = tmp_path / "logs" / "checkpoint-2"
    tuned = peft.PeftModel.from_pretrained(permllm.load(tmp_path / "my-model"), adapter)
    permllm.keep_zeros(tuned)
    torch.testing.assert_close(logits(tuned), logits(model.eval()))


def test_models_whose_zeros_cannot_be_kept_are_refused(pruned: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="model"):
        permllm.keep_zeros(tiny_model("llama"))
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(use_dora=True, target_modules="all-linear")
    with pytest.raises(ConfigError, match="adapter"):
        permllm.keep_zeros(peft.get_peft_model(pruned, settings))
