"""Tests of the pruner: its formula, and the masks that a job chooses by it."""

from __future__ import annotations

import pytest
import torch
from mypackage.pruner import Peak, PeakPruner
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import permllm
from permllm.sparsity.saliency import saliency
from permllm.sparsity.statistics import InputStatistics

EXPONENT = 0.5  # as in conf/pruner/peak.yaml


def random(*shape: int) -> Tensor:
    """Return standard normal numbers, the same ones each time, float32."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def formula(weight: Tensor, inputs: Tensor) -> Tensor:
    """Return the saliency `|W| max|x|^0.5`, float64 `(C_out, C_in)`.

    Args:
        weight: `(C_out, C_in)`.
        inputs: `(tokens, C_in)`.
    """
    peaks = inputs.double().abs().max(dim=0).values
    return weight.double().abs() * peaks**EXPONENT


def tiny_model() -> PreTrainedModel:
    """Return a random LLaMA of two layers, with 32 and 64 channels."""
    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 50}
    settings |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).eval()


def test_the_saliency_is_the_formula() -> None:
    """Compare it after activations that arrived in two parts."""
    weight, inputs = random(6, 8), random(50, 8)
    statistics = InputStatistics(8, "cpu", (Peak,))
    statistics.update(inputs[:30])
    statistics.update(inputs[30:])
    found = saliency(weight, PeakPruner(EXPONENT).factors(weight, statistics))
    torch.testing.assert_close(found.double(), formula(weight, inputs), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (4, 8)])
def test_a_job_keeps_the_most_salient_n_of_every_m_weights(kept: int, of: int) -> None:
    """Compare the masks of a linear of the first layer, whose inputs pruning does not change."""
    model = tiny_model()
    tokens = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(0))
    linear = model.model.layers[0].self_attn.q_proj
    dense = linear.weight.detach().clone()
    read = []
    hook = linear.register_forward_pre_hook(lambda _, arguments: read.append(arguments[0]))
    with torch.no_grad():
        model(tokens)
    hook.remove()

    _, masks, report = permllm.prune(
        model,
        None,
        texts=tokens,
        searchpath=["pkg://mypackage.conf"],
        pruner="peak",
        permutation="none",
        sparsity=f"{kept}:{of}",
        calibration__samples=len(tokens),
        compute_dtype="float32",
    )

    assert report["sparsity"]["violations"] == 0
    for mask in masks.values():
        assert (mask.view(len(mask), -1, of).sum(-1) == kept).all()
    scores = formula(dense, torch.cat([*read]).flatten(0, 1)).view(len(dense), -1, of)
    best = torch.zeros_like(scores, dtype=torch.bool)
    best.scatter_(-1, scores.topk(kept, dim=-1).indices, value=True)
    mask = masks["model.layers.0.self_attn.q_proj"]
    assert torch.equal(mask, best.view_as(mask))
    assert torch.equal(linear.weight, dense * mask)
