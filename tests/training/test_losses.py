"""Losses against their formulas, gradients against autograd through the plain formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from permllm.models.families import FAMILIES, Family, GroupTable, after_layers, decoder_layers
from permllm.models.head import Head
from permllm.training import losses
from permllm.training.losses import cosine_loss, loss_named
from tests.conftest import tiny_model
from tests.problems import random, tokens


def last_states(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output of the last decoder layer in the model's own forward, and its logits."""
    seen: list[Any] = []
    handle = decoder_layers(model)[-1].register_forward_hook(lambda *args: seen.append(args[2]))
    logits = model(input_ids=ids).logits
    handle.remove()
    return (seen[0][0] if isinstance(seen[0], tuple) else seen[0]), logits


def test_cosine_loss_against_its_formula() -> None:
    a, b = random(6, 5), random(6, 5, seed=1)
    total = sum(1 - float(u @ v / (u.norm() * v.norm())) for u, v in zip(a, b, strict=True))
    assert float(cosine_loss(a, b)) == pytest.approx(total / 6, rel=1e-12)
    assert float(cosine_loss(a, a)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("compile_", [False, True])
def test_head_divergence_and_its_gradient_against_the_plain_formula(
    compile_: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "chunk_of", lambda *_: 4)  # 14 tokens: three chunks and a rest
    model = tiny_model("llama", dtype=torch.float64)
    target = random(2, 7, model.config.hidden_size, seed=2)
    output = random(2, 7, model.config.hidden_size).requires_grad_()
    reference = output.detach().clone().requires_grad_()
    # As the model itself computes logits, norm and head included.
    p = model.lm_head(model.model.norm(target)).softmax(-1)
    q = model.lm_head(model.model.norm(reference)).softmax(-1)
    expected = (p * (p / q).log()).sum(-1).mean()
    expected.backward()
    loss = loss_named("kl", model, 14, compile_)
    found = loss(output, target, tokens(2, 7))
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    torch.testing.assert_close(output.grad, reference.grad, rtol=1e-8, atol=1e-12)
    assert float(loss(target, target, tokens(2, 7))) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("form", ["plain", "compiled", "own"])
def test_a_share_of_the_next_tokens_and_its_gradient_against_the_plain_formula(
    form: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "chunk_of", lambda *_: 4)
    monkeypatch.setattr(Head, "plain", form != "own")
    model = tiny_model("llama", dtype=torch.float64)
    windows = tokens(samples=2, length=7)
    target = random(2, 7, model.config.hidden_size, seed=2)
    output = random(2, 7, model.config.hidden_size).requires_grad_()
    reference = output.detach().clone().requires_grad_()
    p = model.lm_head(model.model.norm(target)).softmax(-1)
    q = model.lm_head(model.model.norm(reference)).softmax(-1)
    text = nn.functional.one_hot(windows[:, 1:], q.shape[-1])
    divergence = (p * (p / q).log()).sum() / 14
    expected = (1 - share) * divergence - share * (text * q[:, :-1].log()).sum() / 14
    expected.backward()
    loss = loss_named("kl", model, 14, form == "compiled", share)
    found = loss(output, target, windows)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    torch.testing.assert_close(output.grad, reference.grad, rtol=1e-8, atol=1e-12)
    with torch.no_grad():
        assert float(loss(output, target, windows)) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("compile_", [False, True])
def test_large_logits_in_half_precision_stay_finite(compile_: bool) -> None:
    model: Any = tiny_model("llama", dtype=torch.bfloat16, vocab_size=32)
    model.model.norm, model.lm_head.weight.data = nn.Identity(), torch.eye(32).bfloat16()
    sparse, dense = (3e3 * random(1, 4, 32, seed=seed).bfloat16() for seed in (0, 1))
    found = loss_named("kl", model, 4, compile_)(sparse.requires_grad_(), dense, tokens(1, 4))
    found.backward()
    p, q = dense.double().log_softmax(-1), sparse.detach().double().log_softmax(-1)
    assert float(found.detach()) == pytest.approx(float((p.exp() * (p - q)).sum() / 4), rel=1e-5)
    assert sparse.grad is not None
    gradient = 4 * sparse.grad.double()  # exact
    torch.testing.assert_close(gradient, q.exp() - p.exp(), rtol=2**-8, atol=1e-5)


# The others cap their logits (Gemma 2) or scale them (Granite).
PLAIN_HEADS = sorted(FAMILIES.keys() - {"gemma2", "granite"})


@pytest.mark.parametrize("family", PLAIN_HEADS)
def test_what_follows_the_layers_gives_the_logits_of_the_model(family: str) -> None:
    model = tiny_model(family)
    with torch.no_grad():
        states, expected = last_states(model, tokens())
        found = model.get_output_embeddings()(after_layers(model, states))
    torch.testing.assert_close(found, expected)
    other = tiny_model(family, dtype=torch.bfloat16)
    before = torch.get_rng_state()
    assert Head(model).plain
    assert Head(other).plain
    assert torch.equal(torch.get_rng_state(), before)  # found out without a random number


_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 259}
_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
_SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_FC1 = GroupTable("mlp.fc1", ("mlp.fc1",), "mlp")
_PHI = Family("model.layers", (_FC1,), ("model.final_layernorm",), (), (), ())
# Families that the project does not prune, for what their heads do beside the product.
HEADS: dict[str, tuple[Family, dict[str, Any]]] = {
    "gemma2": (FAMILIES["llama"], {"final_logit_softcapping": 3.0}),
    "cohere": (FAMILIES["llama"], {"logit_scale": 0.0625}),
    "granite": (FAMILIES["llama"], {"logits_scaling": 1.001}),
    "phi": (_PHI, {}),
}


def model_of(model_type: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    family, own = HEADS[model_type]
    monkeypatch.setitem(FAMILIES, model_type, family)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(_SIZES | own | settings))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for name, parameter in model.requires_grad_(False).named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.weight") else 0.0, std=0.3)
    return model


@pytest.mark.parametrize("model_type", sorted(HEADS))
def test_the_divergence_goes_through_whatever_the_models_own_head_does(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "chunk_of", lambda *_: 4)
    model = model_of(model_type, {}, monkeypatch)
    ids = tokens(2, 9)
    target, logits = last_states(model, ids)
    p = logits.log_softmax(-1)
    output = (target + random(*target.shape)).requires_grad_()
    reference = output.detach().clone().requires_grad_()
    # The model from its tokens to its logits, its last layer answering with the other output.
    handle = decoder_layers(model)[-1].register_forward_hook(
        lambda _, __, given: (reference, *given[1:]) if isinstance(given, tuple) else reference
    )
    q = model(input_ids=ids).logits.log_softmax(-1)
    handle.remove()
    expected = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True) / ids.numel()
    expected.backward()

    assert not Head(model).plain
    loss = loss_named("kl", model, ids.numel(), compile_=True)
    found = loss(output, target, ids)
    found.backward()
    torch.testing.assert_close(output.grad, reference.grad, rtol=1e-8, atol=1e-12)
    with torch.no_grad():
        again = loss(output, target, ids)
        torch.testing.assert_close(model(input_ids=ids).logits, logits)  # as it was
    for value in (found, again):
        assert float(value.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)


@pytest.mark.parametrize(
    ("model_type", "neutral"), [("gemma2", None), ("cohere", 1.0), ("granite", 1.0)]
)
def test_a_setting_that_does_nothing_leaves_a_head_plain(
    model_type: str, neutral: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (setting,) = HEADS[model_type][1]
    assert Head(model_of(model_type, {setting: neutral}, monkeypatch)).plain
