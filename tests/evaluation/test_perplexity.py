"""Perplexity against its definition, token by token."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from transformers import ByT5Tokenizer

from permllm.data.texts import TEXTS
from permllm.errors import DataError
from permllm.evaluation.perplexity import measure_perplexity, perplexity_windows
from permllm.models import head
from permllm.models.load import LoadedModel
from permllm.settings.config import PerplexityConfig
from tests.conftest import tiny_model

BUILTIN = TEXTS["builtin"]


def test_value_equals_the_definition() -> None:
    model = tiny_model("llama", dtype=torch.float64)
    windows = torch.randint(0, 259, (3, 10), generator=torch.Generator().manual_seed(0))
    losses = []
    for window in windows:
        losses.append(0.0)
        for position in range(1, 10):
            log_p = model(input_ids=window[None, :position]).logits[0, -1].log_softmax(-1)
            losses[-1] -= float(log_p[window[position]])
    result = measure_perplexity(model, windows, batch_tokens=20)
    assert result["value"] == pytest.approx(math.exp(sum(losses) / 27), rel=1e-5)
    assert (result["window"], result["tokens"]) == (10, 27)
    assert result["scores"] == pytest.approx(losses, rel=1e-5)
    alone = measure_perplexity(model, windows, batch_tokens=1)["value"]
    assert alone == pytest.approx(result["value"], rel=1e-6)


def test_a_large_vocabulary_has_logits_of_some_tokens_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("gemma3_text", dtype=torch.float64)
    windows = torch.randint(0, 259, (3, 10), generator=torch.Generator().manual_seed(0))
    log_p = model(input_ids=windows).logits[:, :-1].log_softmax(-1)
    expected = -log_p.gather(-1, windows[:, 1:, None]).sum((1, 2))
    monkeypatch.setattr(head, "LARGE_VOCABULARY", 8)
    monkeypatch.setattr(head, "LOGITS_AT_A_TIME", 3 * 259 + 1)
    at_a_time = []

    def counted(_: object, __: object, output: torch.Tensor) -> None:
        at_a_time.append(output.shape[-2])

    model.lm_head.register_forward_hook(counted)
    result = measure_perplexity(model, windows, batch_tokens=20)
    assert result["scores"] == pytest.approx(expected.tolist(), rel=1e-5)
    assert at_a_time[-9:] == [3, 3, 3] * 3
    assert max(at_a_time) < 10


def test_windows_do_not_overlap_and_the_remainder_is_dropped() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    config = PerplexityConfig("builtin", seqlen=100)
    tokens = tokenizer(BUILTIN.evaluation())["input_ids"]
    loaded = LoadedModel(tiny_model("llama"), tokenizer, "")
    windows = perplexity_windows(loaded, BUILTIN, config, "builtin")
    assert windows.flatten().tolist() == tokens[: len(tokens) // 100 * 100]
    few = replace(config, limit=3)
    assert perplexity_windows(loaded, BUILTIN, few, "builtin").shape == (3, 100)
    with pytest.raises(DataError, match=r"^builtin"):
        perplexity_windows(loaded, BUILTIN, replace(config, seqlen=100_000), "builtin")


def test_a_perplexity_beyond_every_number_is_infinite() -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data.mul_(1e4)
    windows = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    assert measure_perplexity(model, windows, 64)["value"] == math.inf
