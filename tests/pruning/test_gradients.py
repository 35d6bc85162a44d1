"""Statistics of gradients, and the saliency made from them, against autograd on the whole model."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer, PreTrainedModel

from permllm import runner
from permllm.calibration.dense import calibrate_dense
from permllm.calibration.gradients import weight_gradients
from permllm.calibration.norm_over import NormOver
from permllm.calibration.saliency import saliency
from permllm.calibration.statistics.base import InputStatistic, InputStatistics
from permllm.calibration.statistics.gradient_square import GradientSquare
from permllm.config import read_config
from permllm.data.calibration import calibration_tokens
from permllm.errors import ConfigError, TrainingError
from permllm.export.verify import verify
from permllm.models import head
from permllm.models.families import channel_groups, linear_at
from permllm.models.loading import load_model
from permllm.permutation.identity import Identity
from permllm.pipeline import prune
from permllm.pruning.gblm import GBLM
from permllm.pruning.wanda import Wanda
from permllm.record.names import EXPORT, MASKS, PERMUTATIONS, WEIGHTS
from permllm.record.run_tensors import read_masks
from permllm.sparsity import permuted_nm_mask
from tests.conftest import tiny_config, tiny_model
from tests.pruning.test_pipeline import PATTERN, tokens
from tests.test_config import composed, config


def paths_of(model: nn.Module) -> list[str]:
    return [path for group in channel_groups(model) for path in group.members]


def by_autograd(model: PreTrainedModel) -> dict[str, Tensor]:
    """Mean square of the gradient of each sample's loss, by transformers' own forward, whole models at once."""
    parameters = {path: linear_at(model, path).weight.requires_grad_() for path in paths_of(model)}
    squares = {path: torch.zeros_like(weight) for path, weight in parameters.items()}
    for sample in tokens():
        loss = nn.functional.cross_entropy(model(input_ids=sample[None]).logits[0, :-1], sample[1:])
        for path, gradient in zip(squares, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            squares[path] += gradient**2 / len(tokens())
    model.requires_grad_(False)
    return squares


def norms(model: PreTrainedModel) -> dict[str, Tensor]:
    """Root mean square over tokens of what each linear reads."""
    found: dict[str, Tensor] = {}
    handles = [
        linear_at(model, path).register_forward_pre_hook(
            lambda _, args, path=path: found.update({path: args[0].flatten(0, -2).square().mean(0).sqrt()})
        )
        for path in paths_of(model)
    ]
    with torch.no_grad():
        model(input_ids=tokens())
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("norm_over", ["tokens", "samples"])
def test_gblm_is_its_formula_entry_by_entry(family: str, norm_over: NormOver) -> None:
    model = tiny_model(family, dtype=torch.float64)  # whose norms transformers makes in float32
    squares, norm = by_autograd(model), norms(model)
    groups = channel_groups(model)
    factors = calibrate_dense(model, groups, tokens(), GBLM(alpha=3.0), 4, norm_over=norm_over).factors
    samples, length = tokens().shape
    scale = 1.0 if norm_over == "samples" else 1 / math.sqrt(length)
    for path, square in squares.items():
        of_released_code = norm[path] * math.sqrt(length) + 3.0 * (samples * square).sqrt()
        expected = linear_at(model, path).weight.abs() * of_released_code * scale
        torch.testing.assert_close(saliency(linear_at(model, path).weight, factors[path]), expected, rtol=1e-6, atol=0)


def test_a_large_vocabulary_has_the_gradients_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("gemma3_text", dtype=torch.float64)
    expected = by_autograd(model)
    monkeypatch.setattr(head, "_VOCABULARY", 8)
    monkeypatch.setattr(head, "_LOGITS", 3 * 259 + 1)
    at_a_time = []
    handle = model.lm_head.register_forward_hook(lambda _, __, output: at_a_time.append(output.shape[-2]))
    found = weight_gradients(model, paths_of(model), (GradientSquare,), tokens())
    handle.remove()
    assert max(at_a_time[-12:]) == 3
    for path, square in expected.items():
        (statistic,) = found[path]
        assert isinstance(statistic, GradientSquare)
        torch.testing.assert_close(statistic.value, square, rtol=1e-5, atol=0)


def test_without_gradients_it_is_wanda() -> None:
    model = tiny_model("llama")
    found, expected = (
        calibrate_dense(model, channel_groups(model), tokens(), pruner, 4).factors for pruner in (GBLM(0), Wanda())
    )
    for path, factors in expected.items():
        weight = linear_at(model, path).weight
        assert torch.equal(saliency(weight, found[path]), saliency(weight, factors))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_under_a_tied_head_has_the_gradients_of_the_whole_model(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = tiny_config("llama") | {"tie_word_embeddings": True}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=dtype).eval().requires_grad_(False)
    found = weight_gradients(model, paths_of(model), (GradientSquare,), tokens())
    for path, square in by_autograd(model.double()).items():
        (statistic,) = found[path]
        assert isinstance(statistic, GradientSquare)
        assert statistic.value.dtype == torch.float32
        error = (statistic.value - square).norm() / square.norm()
        assert error < 0.05


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_it_was(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    model.get_output_embeddings().requires_grad_()
    before = {name: (parameter.clone(), parameter.requires_grad) for name, parameter in model.named_parameters()}
    if fails:
        monkeypatch.setattr(GradientSquare, "update", lambda *_: 1 / 0)
    try:
        weight_gradients(model, paths_of(model), (GradientSquare,), tokens())
    except ZeroDivisionError:
        assert fails
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
        assert not parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]


def test_sequential_statistics_have_the_gradients_of_the_dense_model() -> None:
    model = tiny_model("llama")
    squares = by_autograd(tiny_model("llama"))
    groups = channel_groups(model)
    result = prune(model, groups, tokens(), GBLM(), PATTERN, Identity().order, 4, None)
    fresh = tiny_model("llama")
    for group in groups:
        for path in group.members if group.layer == 0 else ():
            linear_at(fresh, path).weight.data *= result.masks[path]
    samples, length = tokens().shape
    path = next(group for group in groups if group.layer == 1).members[0]
    weight = linear_at(fresh, path).weight
    score = weight.abs() * (norms(fresh)[path] + 100 * (samples / length * squares[path]).sqrt())
    assert torch.equal(result.masks[path], permuted_nm_mask(score, torch.arange(32), PATTERN))


def test_what_has_no_gradient_is_refused_by_name() -> None:
    model = tiny_model("llama")
    with pytest.raises(ConfigError, match=r"calibration\.seqlen=1: "):
        weight_gradients(model, paths_of(model), (GradientSquare,), tokens()[:, :1])
    path = "model.layers.1.mlp.down_proj"
    linear_at(model, path).weight.data[0, 0] = math.inf
    with pytest.raises(TrainingError, match=f"gradient of the calibration loss for {path} is not finite in torch.float32"):
        weight_gradients(model, paths_of(model), (GradientSquare,), tokens())


ORDERS: dict[str, tuple[str, ...]] = {
    "heuristic-foldable": ("permutation=heuristic", "permutation.constraint=foldable", "export=folded"),
    "swap": ("export=gathered",),
    "hard": ("permutation.straight_through=hard", "permutation.loss=cosine", "permutation.normalize_saliency=false"),
    "soft-foldable": ("permutation.straight_through=soft", "permutation.constraint=foldable", "export=folded"),
    "from-file": ("permutation=from_file", "permutation.path={swap}"),
}


def test_masks_are_those_of_the_dense_score_whatever_orders_the_channels(cache: Path, tmp_path: Path) -> None:
    model = load_model(config("model=tiny").model, seed=0).model
    moved = {}
    for name, overrides in ORDERS.items():
        words = ["model=tiny", "pruner=gblm", "logger=none", "block_size=8", "compute_dtype=float32", *overrides]
        if not any(word.startswith("permutation=") for word in words):
            words += ["permutation.epochs=1", "permutation.learning_rate=0.05", "calibration.samples=6"]
        settings = config(*(word.replace("{swap}", f"{tmp_path}/swap") for word in words), f"run_dir={tmp_path}/{name}")
        result = runner.run(settings)
        assert result is not None
        metrics, directory = result
        assert not (directory / WEIGHTS).exists()
        assert metrics["sparsity"]["violations"] == 0
        moved[name] = sum(metrics["moved_channels"].values())
        windows = calibration_tokens(ByT5Tokenizer(extra_ids=0), settings.calibration, seed=0)
        factors = calibrate_dense(model, channel_groups(model), windows, GBLM(), settings.calibration.batch_size).factors
        orders, masks = load_file(directory / PERMUTATIONS), read_masks(directory / MASKS)
        for group in channel_groups(model):
            for path in group.members:
                score = saliency(linear_at(model, path).weight, factors[path])
                assert torch.equal(masks[path], permuted_nm_mask(score, orders[group.name], PATTERN))
        if settings.export.form != "none":
            assert verify(directory / EXPORT).passed
    assert all(moved.values())


def test_the_plan_tells_what_gradients_take(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {}
    for pruner in ("wanda", "gblm"):
        runner.run(read_config(composed("model=qwen2.5-0.5b", "plan=true", f"pruner={pruner}")))
        text = capsys.readouterr().out
        sizes[pruner] = dict(re.findall(r"^  (\S.*?) +([0-9.]+) GB$", text, re.MULTILINE))
        pruned = int(re.findall(r"of which (\d+) are pruned", text)[0])
    assert set(sizes["gblm"]) - set(sizes["wanda"]) == {"gradients"}
    for stage in ("on host, beside it", "learn"):
        more = float(sizes["gblm"][stage]) - float(sizes["wanda"][stage])
        assert more == pytest.approx(4 * pruned / 1e9, abs=0.011)  # two numbers of two digits


class Largest(InputStatistic):
    """A statistic of somebody else's."""

    def __init__(self, channels: int, device: torch.device | str, norm_tokens: int) -> None:
        self.value = torch.zeros(channels, device=device)

    def update(self, rows: Tensor) -> None:
        self.value = torch.maximum(self.value, rows.abs().amax(0))


def test_a_statistic_is_a_class_that_its_pruner_names() -> None:
    statistics = InputStatistics(5, "cpu", (Largest,))
    inputs = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0))
    for batch in inputs.split(2):
        statistics.update(batch)
    assert statistics[Largest].value.tolist() == [float(inputs[..., j].abs().max()) for j in range(5)]
