"""Families: folding by tables, groups by one traced forward, layers one by one."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer, PreTrainedModel

import permllm
from permllm.errors import ConfigError
from permllm.export.fold import stored_order
from permllm.export.verify import verify
from permllm.models.families import FAMILIES, channel_groups, decoder_layers, family_of, linear_at
from permllm.models.layers import LayerStream, layer_inputs, run_layer
from permllm.permutation.foldable import expanded, shared_permutations
from tests.conftest import tiny_model

# Decoders without a table, with what differs from LLaMA: biases in fused heads, layers that give
# tuples, attention and MLP that read one tensor, an input of each layer that depends on the tokens.
OTHERS: dict[str, dict[str, Any]] = {
    "gpt_neox": {"intermediate_size": 64},
    "mpt": {},
    "cohere": {"intermediate_size": 64, "num_key_value_heads": 2},
    "granitemoehybrid": {
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
        "num_key_value_heads": 2,
        "layer_types": ["attention", "attention"],
        "mamba_n_heads": 2,
    },
    "gemma4_text": {
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 259,
    },
}
TOKENS = torch.randint(0, 250, (2, 16), generator=torch.Generator().manual_seed(0))


def built(model_type: str, **more: Any) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 259}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes | OTHERS.get(model_type, {}) | more)
    return randomised(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Random norms and biases too: ones and zeros would hide a permutation."""
    for parameter in model.parameters():
        mean = 1.0 if parameter.dim() == 1 else 0.0
        torch.nn.init.normal_(parameter, mean, 0.2)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        *((family, {}) for family in sorted(FAMILIES)),
        ("llama", {"num_key_value_heads": 1, "attention_bias": True, "tie_word_embeddings": True}),
        ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
        ("opt", {"num_key_value_heads": 2}),  # which OPT does not read
    ],
    ids=str,
)
def test_a_table_folds_any_foldable_permutation(family: str, more: dict[str, Any]) -> None:
    model = randomised(tiny_model(family, dtype=torch.float64, **more))
    dense = model(input_ids=TOKENS).logits
    groups = channel_groups(model)
    assert all(group.table.folds for group in groups)
    shared, generator = shared_permutations(groups, "foldable"), torch.Generator().manual_seed(1)
    orders = {}
    for one in shared:
        starts = range(0, one.channels, one.segment)
        parts = [torch.randperm(one.segment, generator=generator) + start for start in starts]
        orders[one.name] = torch.cat(parts)
    stored = stored_order("folded", model, groups, expanded(shared, orders))
    for name, parameter in model.named_parameters():
        parameter.data = stored.apply(name, parameter.data)
    folded = model(input_ids=TOKENS).logits
    torch.testing.assert_close(folded, dense, rtol=1e-5, atol=1e-5 * float(dense.abs().max()))
    columns = {f"{path}.weight" for group in groups for path in group.members}
    assert columns <= stored.columns.keys()
    last = groups[-1]  # which the next lines undo
    linear = linear_at(model, last.members[0])
    linear.weight.data = linear.weight[:, torch.randperm(last.channels, generator=generator)]
    assert not torch.allclose(model(input_ids=TOKENS).logits, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("model_type", [*sorted(FAMILIES), *OTHERS])
def test_groups_hold_every_linear_once_with_those_that_read_its_input(model_type: str) -> None:
    model = built(model_type) if model_type in OTHERS else tiny_model(model_type)
    seen: dict[str, Tensor] = {}
    for name, module in decoder_layers(model).named_modules(prefix=family_of(model).layers):
        if isinstance(module, torch.nn.Linear):
            hook = partial(lambda name, _, args: seen.update({name: args[0]}), name)
            module.register_forward_pre_hook(hook)
    model(input_ids=TOKENS)
    groups = channel_groups(model)
    assert sorted(path for group in groups for path in group.members) == sorted(seen)
    first = [group for group in groups if group.layer == 0]
    inputs = [seen[group.members[0]] for group in first]
    for group, values in zip(first, inputs, strict=True):
        assert all(seen[path].data_ptr() == values.data_ptr() for path in group.members)
    assert len({values.data_ptr() for values in inputs}) == len(first)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    assert channel_groups(skeleton) == groups


@pytest.mark.parametrize("model_type", [*sorted(FAMILIES), *OTHERS])
def test_layers_one_by_one_give_what_the_model_gives(model_type: str) -> None:
    model = built(model_type) if model_type in OTHERS else tiny_model(model_type)
    tokens = TOKENS[:, :11].repeat(3, 1)[:5]
    given = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    hidden, kwargs = layer_inputs(model, tokens)
    torch.testing.assert_close(hidden, given[0])
    hidden = run_layer(decoder_layers(model)[0], hidden, kwargs[0])
    torch.testing.assert_close(hidden, given[1])
    hidden = run_layer(decoder_layers(model)[1], hidden, kwargs[1])
    stream = LayerStream(model, tokens, batch_size=2)  # the last batch is smaller
    states = stream.states()
    for index in range(2):
        stream.advance(index)
    assert stream.states() is states  # which exist once
    torch.testing.assert_close(states, hidden)


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_decoders_are_pruned_gathered_and_not_folded(model_type: str, tmp_path: Path) -> None:
    model, tokenizer = built(model_type), ByT5Tokenizer(extra_ids=0)
    few: dict[str, Any] = {"texts": TOKENS, "block_size": 8, "permutation__epochs": 1}
    with pytest.raises(ConfigError, match="constraint=foldable"):
        permllm.prune(model, tokenizer, permutation__constraint="foldable", **few)
    found = permllm.prune(model, tokenizer, **few)
    with pytest.raises(ConfigError, match="fold"):
        permllm.save(model, tmp_path / "never", form="folded")
    assert permllm.save(model, tmp_path / "out")["form"] == "gathered"
    report = verify(tmp_path / "out")
    assert report["passed"], report["problems"]
    assert len(report["layers"]) == len(found.masks)
    opened = permllm.load(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        logits = [one(TOKENS).logits for one in (opened, model)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert family_of(opened) == family_of(model)
    again = built(model_type)
    permllm.prune(again, tokenizer, texts=TOKENS, permutation="none")
    permllm.save(again, tmp_path / "simulated")
    opened = permllm.load(tmp_path / "simulated", dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(opened(TOKENS).logits, again(TOKENS).logits)


@pytest.mark.parametrize(
    ("model_type", "more", "reason"),
    [
        ("mixtral", {"num_key_value_heads": 4}, "mlp.gate.weight belongs to no linear"),
        ("mamba", {"state_size": 4}, "belongs to no linear"),
        ("gpt2", {}, "got 0"),
        ("falcon", {}, "is changed in place"),
        ("bert", {"intermediate_size": 64}, "attends to later tokens"),
        ("bart", {"d_model": 32}, "encoder_attn attends to later tokens"),
    ],
)
def test_what_is_no_decoder_of_attention_and_linears_is_refused(
    model_type: str, more: dict[str, Any], reason: str
) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 259}
    config = AutoConfig.for_model(model_type, **sizes | more)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=reason):
        channel_groups(model)
