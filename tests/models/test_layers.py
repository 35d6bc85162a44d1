"""Streams of hidden states, where the arguments of the layers depend on the tokens or do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from permllm.models import layers
from permllm.models.families import FAMILIES
from permllm.models.layers import LayerStream, arguments_depend_on_tokens
from permllm.runtime import parallel
from tests.conftest import tiny_model
from tests.problems import model_with_scales, outputs_of_layers, tokens


def test_a_stream_gives_the_states_of_a_model_whose_arguments_depend_on_the_tokens() -> None:
    model = model_with_scales()
    stream = LayerStream(model, tokens(), batch_size=2)
    for index, expected in enumerate(outputs_of_layers(model, tokens())):
        stream.advance(index)
        torch.testing.assert_close(stream.states(), expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_arguments_of_a_known_family_do_not_depend_on_the_tokens(family: str) -> None:
    assert not arguments_depend_on_tokens(tiny_model(family))


def test_arguments_that_depend_on_the_tokens_are_told_wherever_they_stand() -> None:
    assert arguments_depend_on_tokens(model_with_scales())
    assert arguments_depend_on_tokens(model_with_scales(lambda scale: (None, {"scale": scale})))
    assert not arguments_depend_on_tokens(model_with_scales(torch.ones_like))


def test_the_model_embeds_each_batch_once_where_arguments_do_not_depend_on_the_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, embedded = tiny_model("llama"), []
    assert not arguments_depend_on_tokens(model)
    real = layers.layer_inputs

    def counted(model: nn.Module, batch: Tensor) -> Any:
        embedded.append(len(batch))
        return real(model, batch)

    monkeypatch.setattr(layers, "layer_inputs", counted)
    LayerStream(model, tokens(5), batch_size=2).to_the_end("states")
    assert embedded == [2, 2, 1]


@pytest.mark.parametrize("count", [7, 2])
def test_each_window_goes_through_the_layers_in_one_rank(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, states = tiny_model("llama"), torch.zeros(count, 12, 32)
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    seen = []

    def joined(rows: Tensor, indices: Tensor, total: int) -> Tensor:
        assert total == count
        seen.extend(indices.tolist())
        states[indices] = rows
        return states

    monkeypatch.setattr(parallel, "joined", joined)
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        stream = LayerStream(model, tokens(count), batch_size=2)
        stream.to_the_end("states")
        stream.states()
    assert sorted(seen) == list(range(count))
    torch.testing.assert_close(states, outputs_of_layers(model, tokens(count))[-1])
