"""Settings for vLLM: names beside the weights of the checkpoint, torchao's own words, refusals."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from permllm.cli import call
from permllm.errors import ConfigError
from permllm.evaluation.fp8 import rounded
from permllm.export.serve import (
    COMMAND,
    DENSE_KERNELS,
    KERNELS,
    SETTINGS,
    groups_on_kernels,
    serving,
)
from permllm.export.write import export_run, present_export
from permllm.job import run
from permllm.models.families import channel_groups, linear_at
from permllm.models.load import meta_model
from permllm.settings.config import ExportConfig, NMPattern, read_config
from permllm.sparsity.nm import violations
from permllm.store.files import SUMMARY, read_json
from tests.export.pruned import TWO_OF_FOUR, load, make_run, variant_model
from tests.settings.test_config import composed, config

# Sizes that the kernels take, of joined linears too.
QWEN3 = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64, "num_hidden_layers": 3}
VLLM = ExportConfig("folded", "bfloat16", serve="vllm")
# vLLM's linears, and the linears of transformers' models that each joins.
JOINED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}


def qwen3(
    folder: Path,
    *arguments: Any,
    family: str = "qwen3",
    constraint: str = "foldable",
    zeros: dict[str, int] | None = None,
    **sizes: int,
) -> Path:
    """Write a run of a model in which the rows `zeros` of linears, by path, are zero."""
    model = variant_model(family, torch.bfloat16, **QWEN3 | sizes)
    for path, row in (zeros or {}).items():
        linear_at(model, path).weight[row] = 0
    return make_run(folder, model, constraint, *arguments)


def chosen(settings: dict[str, Any], path: str) -> Any:
    """Return the settings of a module as torchao and vLLM look them up."""
    names = settings["_data"]["fqn_to_config"]
    if path in names:
        return names[path]
    found = [value for name, value in names.items() if re.fullmatch(name.removeprefix("re:"), path)]
    return found[0] if found else None


def served(folder: Path) -> Iterator[tuple[list[str], Tensor]]:
    """Yield the paths that vLLM and torchao may look up for each linear of vLLM, and its weight."""
    state = load_file(folder / "model.safetensors")
    for layer in range(QWEN3["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for joined, parts in JOINED.items():
            weights = [state[f"{prefix}{part}.weight"] for part in parts]
            yield [prefix + name for name in (joined, *parts)], torch.cat(weights)


def test_kernels_multiply_exactly_the_linears_that_are_2_4_as_vllm_joins_them(
    tmp_path: Path,
) -> None:
    dense = ("layers.1.mlp", "layers.2.self_attn.v_proj", "layers.0.mlp.down_proj")
    run = qwen3(tmp_path, TWO_OF_FOUR, dense)
    words = [str(run), "--to", str(tmp_path / "out"), "--dtype", "bfloat16", "--serve", "vllm"]
    assert call("export", words) == 0
    summary = read_json(tmp_path / "out" / SUMMARY)
    settings, multiplied = read_json(tmp_path / "out" / SETTINGS), 0
    for names, weight in served(tmp_path / "out"):
        sparse = violations(weight, None, TWO_OF_FOUR) == 0
        multiplied += sparse
        wanted = KERNELS if sparse else DENSE_KERNELS
        assert [chosen(settings, name) for name in names] == [wanted] * len(names)
    assert summary["served"] == {"sparse": multiplied, "all": 12}
    assert multiplied == 12 - 4
    others = ("self_attn.q_norm", "self_attn.o_proj.weight")  # torchao looks up parameters too
    for name in ("lm_head", "model.norm", *(f"model.layers.0.{name}" for name in others)):
        assert chosen(settings, name) is None
    assert settings["_data"]["fqn_to_config"] == settings["_data"]["module_fqn_to_config"]
    assert SETTINGS in present_export(tmp_path / "out")["sha256"]  # type: ignore[index]
    assert f"\n    {COMMAND}\n" in (tmp_path / "out" / "README.md").read_text()


def test_torchao_reads_the_file_and_writes_the_same(tmp_path: Path) -> None:
    core = pytest.importorskip("torchao.core.config")
    run = qwen3(tmp_path, TWO_OF_FOUR, ("layers.1.mlp",))
    export_run(run, VLLM, tmp_path / "out")
    content = read_json(tmp_path / "out" / SETTINGS)
    config = core.config_from_dict(content)
    assert core.config_to_dict(config) == content
    ((sparse, settings), *dense) = config.fqn_to_config.items()
    assert settings.packing_format.name == "SPARSE_2D_DATA_2D_METADATA"
    assert {settings.weight_dtype, settings.activation_dtype} == {torch.float8_e4m3fn}
    names = [f"model.layers.1.mlp.{name}_proj" for name in ("gate_up", "gate", "up", "down")]
    assert [name for name, _ in dense] == names
    assert {settings.packing_format.name for _, settings in dense} == {"PLAIN"}
    assert re.fullmatch(sparse.removeprefix("re:"), "model.layers.10.self_attn.qkv_proj")


# Sizes of which the kernels take those of two linears in each layer: 160 is no multiple of 64 rows,
# 400 none of 32 channels, and 2 * 400 none of 64 rows.
@pytest.mark.parametrize("sizes", [(160, 384), (192, 400)])
def test_sizes_that_the_kernels_do_not_take_stay_dense(
    sizes: tuple[int, int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = qwen3(tmp_path, hidden_size=sizes[0], intermediate_size=sizes[1])
    with caplog.at_level(logging.WARNING):
        summary = export_run(run, VLLM, tmp_path / "out")
    assert summary["served"] == {"sparse": 6, "all": 12}
    settings = read_json(tmp_path / "out" / SETTINGS)
    for names, weight in served(tmp_path / "out"):
        rows, channels = weight.shape
        assert (chosen(settings, names[0]) == KERNELS) == (rows % 64 == 0 and channels % 32 == 0)
    assert caplog.text.count("6 of 12 linears") == 1
    assert "keep_dense=[" in caplog.text
    export_run(run, VLLM, tmp_path / "again")
    assert caplog.text.count("6 of 12 linears") == 2


def test_a_row_of_zeros_keeps_its_linear_off_the_kernels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A scale is the largest magnitude of a row by 448, so that a row of zeros would be 0 / 0."""
    zeros = {"model.layers.0.self_attn.k_proj": 3, "model.layers.2.mlp.down_proj": 0}
    run = qwen3(tmp_path, zeros=zeros)
    with caplog.at_level(logging.WARNING):
        summary = export_run(run, VLLM, tmp_path / "out")
    left_out = ["model.layers.0.self_attn.qkv_proj", "model.layers.2.mlp.down_proj"]
    settings, dense = read_json(tmp_path / "out" / SETTINGS), []
    for names, weight in served(tmp_path / "out"):
        finite = bool((weight.abs().amax(-1) / 448 > 0).all())
        wanted = KERNELS if finite else None
        assert [chosen(settings, name) for name in names] == [wanted] * len(names)
        dense += [] if finite else names[:1]
    assert dense == left_out
    assert summary["served"] == {"sparse": 10, "all": 12}
    (said,) = [record.getMessage() for record in caplog.records if "zeros" in record.getMessage()]
    assert all(name in said for name in left_out)


@pytest.mark.parametrize(
    ("changed", "request_"),
    [
        ({"family": "smollm3", "num_hidden_layers": 2}, VLLM),
        ({"pattern": NMPattern(4, 8)}, VLLM),
        ({"constraint": "free"}, ExportConfig(dtype="bfloat16", serve="vllm")),
        ({}, ExportConfig("simulate", "bfloat16", serve="vllm")),
        ({}, ExportConfig("folded", "float32", serve="vllm")),
        ({"hidden_size": 80, "intermediate_size": 80}, VLLM),
    ],
)
def test_a_run_that_cannot_be_served_is_refused(
    changed: dict[str, Any], request_: ExportConfig, tmp_path: Path
) -> None:
    pattern = changed.pop("pattern", TWO_OF_FOUR)
    path = qwen3(tmp_path, pattern, **changed)
    with pytest.raises(ConfigError, match=r"^export\.serve=vllm: "):
        export_run(path, request_, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changed",
    [
        "export=none",
        "export=gathered",
        "permutation=heuristic",
        "export.dtype=float32",
        "model.architecture.hidden_size=48",
        "model.architecture.model_type=olmo2",
        "sparsity=4:8",
    ],
)
def test_a_job_that_cannot_be_served_is_refused_before_it_begins(
    changed: str, cache: Path, tmp_path: Path
) -> None:
    words = ["permutation=none", "export=folded", "export.dtype=bfloat16", "export.serve=vllm"]
    settings = composed("model=tiny-random", f"run_dir={tmp_path / 'run'}", *words, changed)
    with pytest.raises(ConfigError, match="export"):
        run(read_config(settings))
    assert not (tmp_path / "run").exists()


REAL = ("llama-2-7b", "mistral-7b", "opt-125m", "qwen3-8b", "smollm2-135m")


@pytest.mark.parametrize("name", REAL)
def test_real_models_have_sizes_that_the_kernels_take(name: str) -> None:
    model = meta_model(config(f"model={name}").model)
    groups = channel_groups(model)
    fitting = groups_on_kernels(model.config.model_type, groups, groups, TWO_OF_FOUR)
    settings, counts = serving(groups, fitting, set())
    assert counts["sparse"] == counts["all"] > 0
    assert list(settings["_data"]["fqn_to_config"].values()) == [KERNELS]


# Two CUDA operators of torchao, as reference kernels for the CPU, with the checks of torchao 0.18.0
# (`rowwise_scaled_linear_sparse_cutlass.cuh`). A byte of metadata has the places of four weights.


def packed(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weights that 2:4 keeps, float8, and their places, uint8 with padded tiles."""
    rows, channels = weight.shape
    assert channels % 8 == 0
    groups = weight.float().view(rows, -1, 4)
    assert int((groups != 0).sum(-1).max()) <= 2
    places = (groups != 0).int().topk(2).indices.sort().values
    codes = (places * torch.tensor([1, 4])).sum(-1).view(rows, -1, 2)
    meta = (codes * torch.tensor([1, 16])).sum(-1).to(torch.uint8)
    padded = nn.functional.pad(meta, (0, -meta.shape[1] % 16, 0, -rows % 64))
    return groups.gather(-1, places).view(rows, -1).to(weight.dtype), padded


def multiplied(
    x: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    meta: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply float8 activations `(tokens, channels)` by packed weights, with sums in float32."""
    rows, half = weight.shape
    assert x.dim() == 2
    assert x_scale.shape == x.shape[:1]
    assert x.shape[1] == 2 * half
    assert x.shape[1] % 32 == rows % 8 == 0
    assert meta.shape == (max(rows, 64), max(half // 4 + -(half // 4) % 16, 16))
    codes = torch.stack([meta[:rows] % 16, meta[:rows] // 16], -1).view(rows, -1)[:, : half // 2]
    places = torch.stack([codes % 4, codes // 4], -1).long()
    dense = torch.zeros(*codes.shape, 4).scatter(-1, places, weight.float().view(*places.shape))
    product = x.float() @ dense.view(rows, -1).T * x_scale[:, None] * scale
    return (product if bias is None else product + bias.float()).to(out_dtype)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torchao run its FP8 kernels for 2:4 on the CPU."""
    workflow = "torchao.quantization.quantize_.workflows.float8"
    of_weights = pytest.importorskip(f"{workflow}.float8_sparse_2x4_2d_data_2d_metadata_tensor")
    quantization = pytest.importorskip("torchao.quantization.quant_api")
    monkeypatch.setattr(of_weights, "is_sm_at_least_90", lambda: True)
    monkeypatch.setattr(quantization, "_check_hardware_support", lambda granularity: None)
    with torch.library._scoped_library("torchao", "IMPL") as library:
        library.impl("to_sparse_semi_structured_cutlass_sm9x_f8", packed, "CPU")
        library.impl("rowwise_scaled_linear_sparse_cutlass_f8f8", multiplied, "CPU")
        yield


@pytest.mark.usefixtures("kernels")
def test_torchao_multiplies_as_the_evaluation_in_fp8_does(tmp_path: Path) -> None:
    """With joined linears, and sizes that only just fit: 192 and 416 are multiples of 64 and 32."""
    from torchao.core.config import config_from_dict
    from torchao.quantization import quantize_

    run = qwen3(tmp_path, TWO_OF_FOUR, ("layers.1.mlp",), hidden_size=192, intermediate_size=416)
    export_run(run, VLLM, tmp_path / "out")
    model, expected = load(tmp_path / "out"), {}
    settings = read_json(tmp_path / "out" / SETTINGS)
    for (path, *_), weight in served(tmp_path / "out"):
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent).add_module(name, nn.Linear(*weight.T.shape, bias=False))
        model.get_submodule(path).weight = nn.Parameter(weight, requires_grad=False)
        states = torch.randn(5, weight.shape[1]).bfloat16()
        states[3] = 0  # a token of zeros
        expected[path] = states, rounded(states) @ rounded(weight).T
    quantize_(model, config_from_dict(settings), filter_fn=None)
    for path, (states, product) in expected.items():
        linear = model.get_submodule(path)
        torch.testing.assert_close(linear(states), product.bfloat16())
        assert linear.weight.dtype == torch.bfloat16
