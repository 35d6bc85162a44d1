"""Losses against their formulas, gradients against autograd through the plain formula."""

from __future__ import annotations

import pytest
import torch

from permllm.models.families import FAMILIES, after_layers, decoder_layers
from permllm.permutation import losses
from permllm.permutation.losses import cosine_loss, head_divergence, mean_square_loss
from tests.conftest import tiny_model


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 3, 5, dtype=torch.float64, generator=generator) for _ in range(2))  # type: ignore[return-value]


def test_cosine_loss_against_its_formula() -> None:
    a, b = pair()
    total = sum(1 - float(a[i, j] @ b[i, j] / (a[i, j].norm() * b[i, j].norm())) for i in range(2) for j in range(3))
    assert float(cosine_loss(a, b)) == pytest.approx(total / 6, rel=1e-12)
    assert float(cosine_loss(a, a)) == pytest.approx(0.0, abs=1e-12)


def test_mean_square_loss_against_its_formula() -> None:
    a, b = pair()
    total = sum(float(((a[i, j] - b[i, j]) ** 2).sum() / (b[i, j] ** 2).sum()) for i in range(2) for j in range(3))
    assert float(mean_square_loss(a, b)) == pytest.approx(total / 6, rel=1e-12)


def test_head_divergence_and_its_gradient_against_the_plain_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_CHUNK", 4)  # 14 tokens: three chunks and a rest
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
    found = head_divergence(model, output, target)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-10)
    torch.testing.assert_close(output.grad, reference.grad, rtol=1e-8, atol=1e-12)
    assert float(head_divergence(model, target, target)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("family", sorted(FAMILIES))
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
