"""Layers one at a time: streams of hidden states, arguments, and attention in float32 on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from permllm.models.families import FAMILIES, decoder_layers
from permllm.models.layers import (
    LayerStream,
    arguments_depend_on_tokens,
    attention_in_float32,
    layer_inputs,
    run_layer,
)
from permllm.runtime import parallel
from permllm.runtime.precision import products_in
from tests.conftest import tiny_model
from tests.problems import model_with_scales, outputs_of_layers, tokens

CPU = torch.device("cpu")


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


@pytest.mark.parametrize("mask", ["none", "seen", "added"])
def test_attention_that_gradients_go_through_is_not_rounded_on_a_cpu(mask: str) -> None:
    torch.manual_seed(0)
    layer = decoder_layers(tiny_model("llama"))[0]
    module: Any = layer.self_attn
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    q, k, v = (torch.randn(2, heads, 12, 8, requires_grad=True) for heads in (4, 2, 2))
    added = torch.zeros(12, 12).masked_fill(~seen, -torch.inf)
    masks = {"none": None, "seen": seen[None, None], "added": added[None, None].bfloat16()}

    def attend() -> Tensor:
        output, _ = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation](
            module, q, k, v.bfloat16(), masks[mask], is_causal=mask == "none"
        )
        assert isinstance(output, Tensor)
        return output.transpose(1, 2)

    with products_in(torch.bfloat16, CPU):
        with attention_in_float32(layer):
            recorded = attend()
        with torch.no_grad(), attention_in_float32(layer):
            assert attend().dtype == torch.bfloat16
        assert attend().dtype == torch.bfloat16
    wide_k, wide_v = (x.double().repeat_interleave(2, 1) for x in (k, v.bfloat16()))
    scores = q.double() @ wide_k.mT / 8**0.5 + added
    assert recorded.dtype == torch.float32
    torch.testing.assert_close(recorded.double(), scores.softmax(-1) @ wide_v, rtol=1e-5, atol=1e-6)
    # Without `products_in` torch says what it says of two formats.
    with attention_in_float32(layer), pytest.raises(RuntimeError, match="dtype"):
        attend()


def test_a_layer_that_is_recomputed_in_backward_attends_as_it_did() -> None:
    model = tiny_model("llama").requires_grad_(False)
    states, kwargs = layer_inputs(model, torch.randint(0, 50, (2, 12)))
    layer = decoder_layers(model)[0]
    found = []
    for again in (False, True):
        hidden = states.clone().requires_grad_()
        with products_in(torch.bfloat16, CPU):
            if again:
                output = checkpoint(run_layer, layer, hidden, kwargs[0], use_reentrant=False)
            else:
                output = run_layer(layer, hidden, kwargs[0])
            output.float().square().mean().backward()
        assert hidden.grad is not None
        found.append(hidden.grad)
    assert torch.equal(*found)


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


def test_attention_in_float32_leaves_other_models_and_functions_as_they_are() -> None:
    layer, other = (decoder_layers(tiny_model("llama"))[0] for _ in range(2))
    functions = dict(ALL_ATTENTION_FUNCTIONS)
    config: Any = layer.self_attn.config
    with products_in(torch.bfloat16, CPU), attention_in_float32(layer):
        assert dict(ALL_ATTENTION_FUNCTIONS) == functions
        assert other.self_attn.config._attn_implementation == "sdpa"
        assert config._attn_implementation != "sdpa"
    assert config._attn_implementation == "sdpa"


def test_what_is_compiled_before_a_layer_runs_is_not_compiled_again_in_it() -> None:
    backend = CompileCounter()  # type: ignore[no-untyped-call]
    doubled = torch.compile(lambda states: states * 2, backend=backend)

    class Layer(nn.Module):
        def forward(self, hidden: Tensor) -> Any:
            return doubled(hidden)

    hidden = torch.randn(2, 3, 4)
    with products_in(torch.bfloat16, CPU):
        doubled(hidden)
        output = run_layer(Layer(), hidden, {})
    assert torch.equal(output, hidden * 2)
    assert backend.frame_count == 1
