"""Families that have no table: what a small model of their config shows, and what is done with it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer, PreTrainedModel

import permllm
from permllm import job
from permllm.config import read_config
from permllm.errors import ConfigError
from permllm.export.verify import verify
from permllm.models.discovery import family_by_structure
from permllm.models.discovery.proof import Proof
from permllm.models.discovery.small import logits, small_model
from permllm.models.families import FAMILIES, Family, family_of, linear_at
from tests.conftest import ROOT, tiny_config
from tests.test_config import composed

TEXT = (ROOT / "permllm" / "data" / "builtin.txt").read_text(encoding="utf-8")
# What differs from LLaMA, by family: norms after instead of before, layers without positions,
# scales, fused projections; MPT's layers give tuples, and its config has other names.
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
STRANGERS: dict[str, dict[str, Any]] = {
    "olmo2": {},
    "smollm3": _TOKENS | {"no_rope_layers": [1, 0], "tie_word_embeddings": True},
    "granite": {
        "logits_scaling": 4.0,
        "residual_multiplier": 0.5,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.2,
    },
    "phi3": _TOKENS,
    "gpt_neox": {"hidden_act": "gelu"},
    "mpt": {"num_key_value_heads": None, "intermediate_size": None},
}


def settings_of(model_type: str) -> dict[str, Any]:
    settings = tiny_config("llama") | STRANGERS.get(model_type, {}) | {"model_type": model_type}
    return {key: value for key, value in settings.items() if value is not None}


def config_of(model_type: str) -> Any:
    settings = settings_of(model_type)
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def model_of(model_type: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(model_type), dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.2)
    return model.eval().requires_grad_(False)


def present(family: Family, config: Any) -> Family:
    """A table without the modules that a model of the config lacks."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = {name for name, _ in model.named_modules()}
    return replace(
        family,
        after=tuple(path for path in family.after if path in names),
        projections=tuple(path for path in family.projections if path in names),
    )


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        *((family, {}) for family in sorted(FAMILIES)),
        (
            "llama",
            {
                "num_hidden_layers": 1,
                "num_key_value_heads": 1,
                "attention_bias": True,
                "tie_word_embeddings": True,
            },
        ),
        ("opt", {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    ],
)
def test_the_structure_of_a_known_family_is_its_table(
    model_type: str, extra: dict[str, Any]
) -> None:
    settings = tiny_config(model_type) | extra
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    before = torch.get_rng_state()
    found = family_by_structure(config, model_type)
    assert found == present(FAMILIES[model_type], config)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_proof_refuses_a_table_that_lacks_something() -> None:
    model = small_model(config_of("olmo2"), "olmo2")
    table = family_by_structure(config_of("olmo2"), "olmo2")
    stream, attention, gated, inner = table.groups

    def proof(family: Family) -> Proof:
        return Proof(model, logits(model), family, (2, 2))

    assert proof(table).stream_folds([stream, gated])
    assert all(proof(table).folds(group) for group in (attention, inner))
    assert all(proof(table).gathers(group) for group in table.groups)
    assert not proof(table).folds(replace(inner, producers=inner.producers[:1]))
    assert not proof(table).folds(replace(attention, producers=("self_attn.k_proj",)))
    assert not proof(table).gathers(replace(gated, reader="self_attn"))
    assert not proof(table).stream_folds([stream])
    for lacking in ({"norms": table.norms[:1]}, {"writers": table.writers[1:]}, {"after": ()}):
        assert not proof(replace(table, **lacking)).stream_folds([stream, gated])


def test_fused_projections_are_producers_by_their_rows() -> None:
    groups = {group.name: group for group in family_by_structure(config_of("phi3"), "phi3").groups}
    assert list(groups["mlp.down_proj"].produced()) == [
        ("mlp.gate_up_proj", "first"),
        ("mlp.gate_up_proj", "last"),
    ]
    assert list(groups["self_attn.o_proj"].produced()) == [("self_attn.qkv_proj", "last")]
    assert groups["self_attn.o_proj"].by_head
    assert all(group.folds for group in groups.values())


def test_what_cannot_be_proved_does_not_fold() -> None:
    # Queries, keys and values of a head stand together: the rows of the values are neither the
    # first nor the last.
    groups = family_by_structure(config_of("gpt_neox"), "gpt_neox").groups
    assert {group.name for group in groups if not group.folds} == {"attention.dense"}
    assert not any(group.producers or group.by_head for group in groups if not group.folds)


@pytest.mark.parametrize("model_type", ["granite", "mpt", "olmo2", "phi3", "smollm3"])
@pytest.mark.parametrize(
    ("permutation", "form"),
    [("heuristic", "folded"), ("lcp", "gathered")],
    ids=["heuristic-folded", "lcp-gathered"],
)
def test_pruned_strangers_compute_the_same_in_every_form(
    model_type: str, permutation: str, form: str, tmp_path: Path
) -> None:
    model = model_of(model_type)
    settings: dict[str, Any] = {
        "calibration__samples": 4,
        "calibration__seqlen": 16,
        "block_size": 8,
    }
    settings |= (
        {"permutation__epochs": 1}
        if permutation == "lcp"
        else {"permutation__constraint": "foldable"}
    )
    found = permllm.prune(
        model, ByT5Tokenizer(extra_ids=0), texts=[TEXT], permutation=permutation, **settings
    )
    assert all(not torch.equal(order, torch.arange(len(order))) for order in found.orders.values())
    permllm.save(model, tmp_path / "out", form=form)
    report = verify(tmp_path / "out")
    assert report.passed, report.problems
    assert len(report.layers) == len(found.masks)
    opened = permllm.load(tmp_path / "out", dtype=torch.float32)
    assert hasattr(opened.config, "dense_type") == (form == "gathered")
    tokens = torch.randint(3, 259, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            opened(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4
        )
    for path, mask in found.masks.items():
        assert not torch.equal(
            linear_at(opened, path).weight == 0, ~mask
        )  # the columns are in another order
    assert family_of(opened) == family_of(model)


def test_a_group_that_nothing_absorbs_is_gathered_or_stays_as_it_is(tmp_path: Path) -> None:
    tokens = torch.randint(3, 259, (2, 16), generator=torch.Generator().manual_seed(0))
    few = {"calibration__samples": 4, "calibration__seqlen": 16}
    for permutation, form in (("heuristic", "gathered"), ("none", "folded")):
        model = model_of("gpt_neox")
        permllm.prune(
            model, ByT5Tokenizer(extra_ids=0), texts=[TEXT], permutation=permutation, **few
        )
        if form == "gathered":
            with pytest.raises(
                ConfigError,
                match=r"of gpt_neox\.layers\.0\.attention\.dense does not fold: no neighbouring weights",
            ):
                permllm.save(model, tmp_path / "never", form="folded")
        permllm.save(model, tmp_path / form, form=form)
        with torch.no_grad():
            found = permllm.load(tmp_path / form, dtype=torch.float32)(tokens).logits
            torch.testing.assert_close(found, model(tokens).logits, rtol=1e-4, atol=1e-4)


def architecture(model_type: str, **extra: Any) -> list[str]:
    words = [
        f"++model.architecture.{key}={value}"
        for key, value in (settings_of(model_type) | extra).items()
    ]
    return ["model=tiny", "logger=none", *words]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (architecture("mixtral"), "model type 'mixtral' is a mixture of experts (num_local_experts=8): only decoders"),
        (architecture("mamba"), "model type 'mamba' is a state-space or convolutional model (state_size=16): only"),
        (architecture("t5"), "model type 't5' is not known; known are: gemma3_text, llama, mistral, opt, qwen2, qwen3, and"),
        (architecture("gemma3"), "model type 'gemma3' is more than a language model (Gemma3Config): only decoders"),
        (architecture("gpt2"), "'gpt2' cannot be told: GPT2LMHeadModel has no list of layers with nn.Linear modules in them; "
         "they hold Conv1D"),
        (architecture("falcon"), "'falcon' cannot be told: what a linear gives is changed in place, which nothing can learn"),
        (architecture("bert", is_decoder=False), "'bert' cannot be told: a token's logits depend on the tokens that follow"),
        (
            [*architecture("gpt_neox"), "permutation=heuristic", "permutation.constraint=foldable"],
            "permutation.constraint=foldable: no neighbouring weights absorb an order of gpt_neox.layers.0.attention.dense;",
        ),
    ],
    ids=["experts", "state-space", "encoder-decoder", "pictures", "no linears", "in place", "not causal", "not foldable"],
)  # fmt: skip
def test_what_cannot_be_pruned_is_one_line_before_anything_is_computed(
    overrides: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        job.run(read_config(composed(*overrides, f"run_dir={tmp_path / 'run'}")))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run").glob("permutations.safetensors"))
