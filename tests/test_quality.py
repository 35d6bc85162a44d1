"""Quality on a model that was trained: the learned permutation, then the heuristic, then none."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer, PreTrainedModel

import permllm
from permllm.data.texts import TEXTS
from permllm.data.windows import encode

WINDOW = 64
STEPS = 200
SEEDS = (1, 2)


@pytest.fixture(scope="module")
def text() -> Tensor:
    """Return the built-in text, a token for each byte."""
    return encode(ByT5Tokenizer(extra_ids=0), TEXTS["builtin"].evaluation(), special=False)


def trained(text: Tensor, seed: int) -> PreTrainedModel:
    """Return a small Llama that has learned the text: random weights lose nothing by pruning."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=259,
        tie_word_embeddings=True,
    )
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    windows = text.unfold(0, WINDOW, 1)
    for _ in range(STEPS):
        batch = windows[torch.randint(len(windows), (16,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def lost_nats(model: PreTrainedModel, windows: Tensor, permutation: str, **settings: Any) -> float:
    """Return how much 2:4 by Wanda adds to the nats of a token."""
    pruned = deepcopy(model)
    settings |= {"permutation": permutation, "compute_dtype": "float32"}
    permllm.prune(pruned, None, texts=windows, **settings)
    before = permllm.perplexity(model, None, windows)
    return math.log(permllm.perplexity(pruned, None, windows) / before)


def test_a_learned_permutation_beats_the_heuristic_which_beats_none(text: Tensor) -> None:
    windows = text[: len(text) // WINDOW * WINDOW].view(-1, WINDOW)
    models = [trained(text, seed) for seed in SEEDS]
    none = sum(lost_nats(model, windows, "none") for model in models)
    heuristic = sum(lost_nats(model, windows, "heuristic") for model in models)
    learning = {"block_size": 32, "permutation__epochs": 2}
    learned = sum(lost_nats(model, windows, "lcp", **learning) for model in models)
    assert learned < 0.9 * heuristic, (none, heuristic, learned)
    assert heuristic < 0.95 * none, (none, heuristic, learned)
