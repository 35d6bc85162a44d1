"""What a family is, and that running layers one by one is what the model itself does."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from permllm.errors import ConfigError
from permllm.models.families import (
    FAMILIES,
    channel_groups,
    decoder_layers,
    family_named,
    linear_at,
)
from permllm.models.layers import LayerStream, layer_inputs, run_layer
from tests.conftest import tiny_model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_groups_cover_every_linear_of_the_decoder_once(family: str) -> None:
    model = tiny_model(family)
    groups = channel_groups(model)
    members = [path for group in groups for path in group.members]
    linears = [
        f"{FAMILIES[family].layers}.{name}"
        for name, module in decoder_layers(model).named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    assert sorted(members) == sorted(linears)
    assert {group.channels for group in groups} == {32, 64}


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_members_of_a_group_read_the_same_tensor(family: str) -> None:
    model = tiny_model(family)
    seen: dict[str, torch.Tensor] = {}
    for group in channel_groups(model):
        for path in group.members:
            linear_at(model, path).register_forward_pre_hook(
                lambda _, args, path=path: seen.update({path: args[0]})
            )
    model(input_ids=torch.randint(0, 259, (2, 9)))
    for group in channel_groups(model):
        for path in group.members:
            assert torch.equal(seen[path], seen[group.members[0]])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_layer_by_layer_equals_the_model_with_several_sequences(family: str) -> None:
    model = tiny_model(family)
    tokens = torch.randint(0, 259, (5, 11), generator=torch.Generator().manual_seed(0))
    hidden_states = model(
        input_ids=tokens, output_hidden_states=True, use_cache=False
    ).hidden_states
    inputs = layer_inputs(model, tokens)
    torch.testing.assert_close(inputs.hidden, hidden_states[0])
    hidden = inputs.hidden
    for index, layer in enumerate(decoder_layers(model)):
        hidden = run_layer(layer, hidden, inputs.kwargs[index])
        assert hidden.shape == (5, 11, 32)
        if index == 0:
            torch.testing.assert_close(hidden, hidden_states[1])
    stream = LayerStream(model, tokens, batch_size=2)  # the last batch is smaller
    for index in range(2):
        stream.advance(index)
    torch.testing.assert_close(stream.states(), hidden)


def test_a_stream_holds_the_states_of_its_samples_once_in_the_format_of_the_layers() -> None:
    model = tiny_model("llama")
    stream = LayerStream(model, torch.zeros(5, 11, dtype=torch.long), batch_size=2)
    states = stream.states()
    stream.advance(0)
    assert stream.states() is states
    layer = decoder_layers(model)[1]
    handle = layer.register_forward_hook(
        lambda _, __, output: output.double()
    )  # as a model may widen what it adds up
    expected = torch.cat([output.clone() for output in stream.forward(1)])
    stream.advance(1)
    handle.remove()
    assert stream.states().dtype == torch.float64
    assert torch.equal(stream.states(), expected)


def test_an_unknown_type_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(
        ConfigError,
        match="'gpt2' is not known; known are: gemma3_text, llama, mistral, opt, qwen2, qwen3",
    ):
        family_named("gpt2")


def test_llama_weights_in_the_qwen2_class_give_the_same_logits() -> None:
    llama = tiny_model("llama", dtype=torch.float64)
    settings = {
        key: getattr(llama.config, key)
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
        )
    }
    qwen = (
        Qwen2ForCausalLM(Qwen2Config(vocab_size=259, tie_word_embeddings=False, **settings))
        .double()
        .eval()
    )
    missing, unexpected = qwen.load_state_dict(llama.state_dict(), strict=False)
    assert not unexpected
    assert all(name.endswith("bias") for name in missing)
    for name, parameter in qwen.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    tokens = torch.randint(0, 259, (2, 9))
    torch.testing.assert_close(qwen(input_ids=tokens).logits, llama(input_ids=tokens).logits)


def test_meta_models_have_groups_without_weights() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_model("llama").config)
    assert len(channel_groups(model)) == 8


def test_heads_are_those_that_a_model_has_whatever_its_config_says_beside() -> None:
    groups = channel_groups(tiny_model("opt", num_key_value_heads=2))  # which OPT does not read
    assert {group.heads for group in groups if group.table.by_head} == {(4, 1)}
