"""Losses against their formulas, gradients against autograd through the plain formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from permllm.models.families import (
    _LLAMA,
    FAMILIES,
    Family,
    GroupTable,
    after_layers,
    decoder_layers,
)
from permllm.models.head import Head, tokens_at_a_time
from permllm.training import losses
from permllm.training.losses import cosine_loss, head_divergence
from tests.conftest import tiny_model

CPU = torch.device("cpu")


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 3, 5, dtype=torch.float64, generator=generator) for _ in range(2))  # type: ignore[return-value]


def test_the_heads_weight_is_rounded_once() -> None:
    head = Head(tiny_model("llama"))
    rounded = head.weight_in(torch.bfloat16)
    assert torch.equal(rounded, head.weight.to(torch.bfloat16))
    assert head.weight_in(torch.bfloat16) is rounded
    assert head.weight_in(torch.float32).data_ptr() == head.weight.data_ptr()


def test_cosine_loss_against_its_formula() -> None:
    a, b = pair()
    total = sum(
        1 - float(a[i, j] @ b[i, j] / (a[i, j].norm() * b[i, j].norm()))
        for i in range(2)
        for j in range(3)
    )
    assert float(cosine_loss(a, b)) == pytest.approx(total / 6, rel=1e-12)
    assert float(cosine_loss(a, a)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("compiled", [False, True])
def test_head_divergence_and_its_gradient_against_the_plain_formula(
    compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "chunk_of", lambda *_: 4)  # 14 tokens: three chunks and a rest
    model = tiny_model("llama", dtype=torch.float64)
    hidden = model.config.hidden_size
    generator = torch.Generator().manual_seed(1)
    output = torch.randn(2, 7, hidden, dtype=torch.float64, generator=generator).requires_grad_()
    target = torch.randn(2, 7, hidden, dtype=torch.float64, generator=generator)
    reference = output.detach().clone().requires_grad_()
    # As the model itself computes logits, norm and head included.
    p = model.lm_head(model.model.norm(target)).softmax(-1)
    q = model.lm_head(model.model.norm(reference)).softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    expected.backward()
    form = losses._compiled_divergence if compiled else losses._divergence
    found = head_divergence(Head(model), output, target, form)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    torch.testing.assert_close(output.grad, reference.grad, rtol=1e-8, atol=1e-12)
    assert float(head_divergence(Head(model), target, target, form)) == pytest.approx(
        0.0, abs=1e-12
    )


def test_large_logits_stay_finite_in_a_compiled_divergence() -> None:
    generator = torch.Generator().manual_seed(2)
    sparse, dense = (3e3 * torch.randn(3, 96, generator=generator).bfloat16() for _ in range(2))
    p, q = dense.double().log_softmax(-1), sparse.double().log_softmax(-1)
    for form in (losses._compiled_divergence, losses._divergence):
        total, gradient = form(sparse, dense, True)
        assert float(total) == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)
        assert gradient is not None
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.double(), q.exp() - p.exp(), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "tokens", "compiled"),
    [(None, 9, False), (None, 11, True), (True, 9, True), (False, 11, False)],
)
def test_the_divergence_is_compiled_where_that_is_made_up_for(
    asked: bool | None, tokens: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    seen: list[object] = []
    monkeypatch.setattr(losses, "_COMPILE_FROM", 10 * model.config.vocab_size)
    monkeypatch.setattr(losses, "head_divergence", lambda *given: seen.append(given[-1]))
    losses.loss_named("kl", model, tokens, asked)(torch.zeros(1), torch.zeros(1))
    assert (seen != [losses._divergence]) == compiled


@pytest.mark.parametrize("vocabulary", [49_152, 151_936, 262_144])
def test_a_large_vocabulary_has_the_logits_of_fewer_tokens_at_a_time(vocabulary: int) -> None:
    assert tokens_at_a_time(vocabulary, 5000) == {262_144: 256}.get(
        vocabulary, 5000
    )  # as it always was
    assert tokens_at_a_time(vocabulary, 128) == 128
    assert tokens_at_a_time(10**9, 128) == 1


@pytest.mark.parametrize(("vocabulary", "tokens"), [(32_000, 1024), (152_064, 220), (262_144, 128)])
def test_a_gpu_takes_the_logits_of_as_many_tokens_as_its_memory_allows(
    vocabulary: int, tokens: int
) -> None:
    assert losses.chunk_of(torch.device("cuda"), vocabulary) == tokens
    assert losses.chunk_of(torch.device("cpu"), vocabulary) == 128


# The others cap their logits (Gemma 2) or scale them (Granite).
PLAIN_HEADS = sorted(FAMILIES.keys() - {"gemma2", "granite"})


@pytest.mark.parametrize("family", PLAIN_HEADS)
def test_what_follows_the_layers_gives_the_logits_of_the_model(family: str) -> None:
    model = tiny_model(family)
    tokens = torch.randint(0, 259, (2, 9), generator=torch.Generator().manual_seed(0))
    seen = []
    handle = decoder_layers(model)[-1].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        handle.remove()
        found = model.get_output_embeddings()(after_layers(model, seen[0]))
    torch.testing.assert_close(found, expected)


_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 259,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PHI = Family(
    "model.layers",
    (GroupTable("mlp.fc1", ("mlp.fc1",), "mlp"),),
    ("model.final_layernorm",),
    (),
    (),
    (),
)
# Families that the project does not prune, for what their heads do beside the product.
HEADS: dict[str, tuple[Family, dict[str, Any]]] = {
    "gemma2": (_LLAMA, {"final_logit_softcapping": 3.0}),
    "cohere": (_LLAMA, {"logit_scale": 0.0625}),
    "granite": (_LLAMA, {"logits_scaling": 1.001}),
    "phi": (_PHI, {}),
}


def model_of(model_type: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    family, own = HEADS.get(model_type, (_LLAMA, {}))
    monkeypatch.setitem(FAMILIES, model_type, family)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(_SIZES | own | settings))
    model = (
        AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval().requires_grad_(False)
    )
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.3)
    return model


@pytest.mark.parametrize("model_type", sorted(HEADS))
def test_the_divergence_goes_through_whatever_the_models_own_head_does(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "chunk_of", lambda *_: 4)
    model = model_of(model_type, {}, monkeypatch)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 259, (2, 9), generator=generator)
    seen: list[torch.Tensor] = []
    handle = decoder_layers(model)[-1].register_forward_hook(
        lambda _, __, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    p = model(input_ids=tokens).logits.log_softmax(-1)
    handle.remove()
    target = seen[0]
    output = (
        target + torch.randn(target.shape, dtype=torch.float64, generator=generator)
    ).requires_grad_()
    reference = output.detach().clone().requires_grad_()
    # The model from its tokens to its logits, its last layer answering with the other output.
    handle = decoder_layers(model)[-1].register_forward_hook(
        lambda _, __, given: (reference, *given[1:]) if isinstance(given, tuple) else reference
    )
    q = model(input_ids=tokens).logits.log_softmax(-1)
    handle.remove()
    expected = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True) / tokens.numel()
    expected.backward()

    head = Head(model)
    assert not head.plain
    found = head_divergence(head, output, target)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    torch.testing.assert_close(output.grad, reference.grad, rtol=1e-8, atol=1e-12)
    with torch.no_grad():
        assert float(head_divergence(head, output, target)) == pytest.approx(
            float(expected.detach()), rel=1e-10
        )
        torch.testing.assert_close(
            model(input_ids=tokens).logits.log_softmax(-1), p
        )  # the model is as it was


@pytest.mark.parametrize("family", PLAIN_HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_that_are_a_product_are_found_out_without_a_random_number(
    family: str, dtype: torch.dtype
) -> None:
    model = tiny_model(family, dtype=dtype)
    before = torch.get_rng_state()
    assert Head(model).plain
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("model_type", "neutral"), [("gemma2", None), ("cohere", 1.0), ("granite", 1.0)]
)
def test_a_setting_that_does_nothing_leaves_a_head_plain(
    model_type: str, neutral: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (setting,) = HEADS[model_type][1]
    assert Head(model_of(model_type, {setting: neutral}, monkeypatch)).plain
