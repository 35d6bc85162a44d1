"""Exported models: what stock transformers computes with them, what is stored, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedModel,
)

import permllm
from permllm.config import ModelConfig, NMPattern
from permllm.errors import ConfigError, DataError
from permllm.export.checkpoint import Request, export_run
from permllm.export.rebuild import apply_record
from permllm.models.families import channel_groups, decoder_layers, linear_at
from permllm.models.load import folder_identity
from permllm.models.selection import differing_patterns, pruned_groups
from permllm.permutation.foldable import expanded, shared_orders
from permllm.runs.files import file_sha256, write_json, write_text
from permllm.runs.tensors import save_masks, save_tensors, violations
from permllm.sparsity.nm import permuted_nm_mask
from tests.conftest import FAMILY_SETTINGS, tiny_config
from tests.permutation.test_foldable import random_order

VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {} for family in FAMILY_SETTINGS},
    "llama-mha": {"num_key_value_heads": 4},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "qwen3-tied": {"tie_word_embeddings": True},
    "opt-projected": {"word_embed_proj_dim": 16},
    "opt-post-norm": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "opt-tied": {"tie_word_embeddings": True},
}


def variant_model(name: str, dtype: torch.dtype = torch.float32, **extra: Any) -> PreTrainedModel:
    settings = tiny_config(name.split("-", maxsplit=1)[0]) | VARIANTS[name] | extra
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(settings.pop("model_type"), **settings), dtype=dtype
    )
    for parameter in model.parameters():
        nn.init.normal_(
            parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3
        )  # norms that are not all the same
    return model.eval().requires_grad_(False)


def make_run(
    folder: Path,
    model: PreTrainedModel,
    constraint: str,
    pattern: NMPattern | None = None,
    dtype: str = "float32",
    keep_dense: tuple[str, ...] = (),
    sparsity_of: dict[str, str] | None = None,
) -> Path:
    """A run directory with random orders under a constraint, and magnitude masks; the dense model beside it."""
    pattern = pattern or NMPattern(2, 4)
    model.save_pretrained(folder / "dense")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder / "dense")
    groups = pruned_groups(channel_groups(model), pattern, keep_dense, sparsity_of or {})
    shared = shared_orders(groups, constraint)  # type: ignore[arg-type]
    orders = expanded(
        shared, {order.name: random_order(order, seed) for seed, order in enumerate(shared)}
    )
    masks = {
        path: permuted_nm_mask(
            linear_at(model, path).weight.float().abs(),
            orders[group.name],
            group.pattern or pattern,
        )
        for group in groups
        for path in group.members
    }
    settings = {
        "name": "local",
        "source": "local",
        "path": str(folder / "dense"),
        "dtype": dtype,
        "device": "cpu",
    }
    config = ModelConfig(**settings)  # type: ignore[arg-type]
    identity = folder_identity(config, folder / "dense")
    run = folder / "run"
    write_text(
        run / "config.yaml",
        json.dumps(
            {
                "name": "x",
                "model": settings | {"hub_name": None},
                "seed": 0,
                "sparsity": str(pattern),
                "pruner": {"name": "x"},
                "permutation": {"name": "x"},
                "mask": {"name": "pruner"},
                "reconstruction": {"name": "none"},
            }
        ),
    )
    sparsity = {
        "pattern": str(pattern),
        "fraction": 1 - pattern.n / pattern.m,
        "of_model": 0.5,
        "violations": 0,
    }
    if keep_dense or sparsity_of:
        sparsity["patterns"] = differing_patterns(channel_groups(model), groups)
    sparsity |= {"weights_changed": False, "weights_kept": False}
    save_tensors(run / "permutations.safetensors", orders)
    save_masks(run / "masks.safetensors", masks)
    digests = {file.name: file_sha256(file) for file in run.glob("*.safetensors")}
    finished = {
        "schema_version": 3,
        "status": "finished",
        "name": "x",
        "config_hash": "0",
        "seconds": {},
    }
    write_json(
        run / "metrics.json",
        finished | {"model": identity, "sparsity": sparsity, "sha256": digests},
    )
    return run


def logits(model: PreTrainedModel, seed: int = 1) -> Tensor:
    tokens = torch.randint(259, (2, 13), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(input_ids=tokens).logits


def load(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def reference(model: PreTrainedModel, run: Path) -> PreTrainedModel:
    """The pruned model in the original order, by multiplying the masks."""
    apply_record(model, json.loads((run / "metrics.json").read_text())["model"], run)
    return model


def relative(first: Tensor, second: Tensor) -> float:
    return float((first - second).norm() / second.norm())


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_folded_models_are_stock_and_compute_the_same(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, variant_model(name), "foldable")
    export_run(run, Request("folded"), tmp_path / "out")
    pruned = reference(variant_model(name), run)
    folded = load(tmp_path / "out")
    assert type(folded) is type(pruned)
    assert type(folded).__module__.startswith("transformers.")
    assert relative(logits(folded), logits(pruned)) < 1e-4
    groups = channel_groups(folded)
    for group in groups:
        for path in group.members:
            weight = linear_at(folded, path).weight
            assert violations(weight, torch.arange(group.channels), NMPattern(2, 4)) == 0, path
            assert float((weight == 0).float().mean()) == 0.5
            assert not (weight.signbit() & (weight == 0)).any()
    assert not any(
        torch.equal(linear_at(folded, p).weight, linear_at(pruned, p).weight)
        for g in groups
        for p in g.members
    )

    # In float64 the stock norms compute in float32; with norms in float64 nothing but rounding is
    # left.
    double = {"dtype": torch.float64}
    folded64, pruned64 = (
        load(tmp_path / "out", **double),
        reference(load(tmp_path / "dense", **double), run),
    )
    assert relative(logits(folded64), logits(pruned64)) < 1e-6
    monkeypatch.setattr(nn.Module, "__call__", _norms_in_float64(nn.Module.__call__))
    assert relative(logits(folded64), logits(pruned64)) < 1e-10


def _norms_in_float64(call: Any) -> Any:
    def patched(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if type(module).__name__.endswith("RMSNorm"):
            x, gemma = args[0], type(module).__name__.startswith("Gemma")
            weight, epsilon = (
                (1 + module.weight, module.eps)
                if gemma
                else (module.weight, module.variance_epsilon)
            )
            return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
        return call(module, *args, **kwargs)

    return patched


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_gathered_models_keep_any_order(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, variant_model(name), "free")
    summary = export_run(run, Request("gathered"), tmp_path / "out")
    pruned = reference(variant_model(name), run)
    gathered = load(tmp_path / "out")
    assert relative(logits(gathered), logits(pruned)) < 1e-5
    # Two readers of the residual stream and the attention output of each layer; the MLP's inner
    # order folds.
    assert summary["gathers"] == 3 * len(decoder_layers(pruned))
    for group in channel_groups(gathered):
        for path in group.members:
            assert (
                violations(
                    linear_at(gathered, path).weight, torch.arange(group.channels), NMPattern(2, 4)
                )
                == 0
            )
    gathered.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again")), logits(gathered))
    generated = gathered.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(
        generated, pruned.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    )


@pytest.mark.parametrize("constraint", ["free", "foldable"])
def test_simulate_keeps_the_original_order(constraint: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, variant_model("qwen2"), constraint)
    export_run(run, Request("simulate"), tmp_path / "out")
    simulated, pruned = load(tmp_path / "out"), reference(variant_model("qwen2"), run)
    assert all(
        torch.equal(value, pruned.state_dict()[name])
        for name, value in simulated.state_dict().items()
    )


@pytest.mark.parametrize("seed", range(6))
def test_folding_holds_for_random_shapes(seed: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(seed)

    def one_of(*options: int) -> int:
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    n, m = [(2, 4), (4, 8), (1, 4), (2, 6), (3, 8)][seed % 5]
    key_value = one_of(1, 2, 3)
    shape = {
        "num_key_value_heads": key_value,
        "num_attention_heads": key_value * one_of(1, 2, 4),
        "head_dim": 2 * m * one_of(1, 2),
        "hidden_size": 24 * one_of(1, 2, 3),
        "intermediate_size": 24 * one_of(2, 3, 5),
        "num_hidden_layers": one_of(1, 3),
    }
    name = ["qwen3", "mistral", "qwen3-tied"][seed % 3]
    pattern = NMPattern(n, m)
    run = make_run(tmp_path, variant_model(name, **shape), "foldable", pattern)
    export_run(run, Request("folded", "float64"), tmp_path / "out")
    folded, pruned = (
        load(tmp_path / "out", dtype=torch.float64),
        reference(variant_model(name, **shape), run).double(),
    )
    assert relative(logits(folded), logits(pruned)) < 1e-6
    for group in channel_groups(folded):
        for path in group.members:
            assert (
                violations(linear_at(folded, path).weight, torch.arange(group.channels), pattern)
                == 0
            )


def test_changed_weights_are_exported(tmp_path: Path) -> None:
    model = variant_model("llama")
    run = make_run(tmp_path, model, "foldable")
    generator = torch.Generator().manual_seed(5)
    weights = {
        path: torch.randn(linear_at(model, path).weight.shape, generator=generator)
        for group in channel_groups(model)
        for path in group.members
    }
    save_tensors(run / "weights/00000.safetensors", weights)
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["sparsity"] |= {"weights_changed": True, "weights_kept": True}
    metrics["sha256"]["weights/00000.safetensors"] = file_sha256(run / "weights/00000.safetensors")
    write_json(run / "metrics.json", metrics)
    export_run(run, Request("folded"), tmp_path / "out")
    assert (
        relative(logits(load(tmp_path / "out")), logits(reference(variant_model("llama"), run)))
        < 1e-4
    )


def test_shards_are_split_as_transformers_does_and_load(tmp_path: Path) -> None:
    run = make_run(tmp_path, variant_model("llama"), "foldable")
    export_run(run, Request("folded", shard_gb=2e-5), tmp_path / "out")
    files = sorted(file.name for file in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert (
        relative(logits(load(tmp_path / "out")), logits(reference(variant_model("llama"), run)))
        < 1e-4
    )


def test_a_checkpoint_in_another_layout_is_loaded_as_a_whole(tmp_path: Path) -> None:
    run = make_run(tmp_path, variant_model("opt"), "foldable")
    state = load_file(tmp_path / "dense" / "model.safetensors")
    renamed = {
        name.removeprefix("model."): value for name, value in state.items()
    }  # as OPT's files on the hub have them
    save_file(renamed, tmp_path / "dense" / "model.safetensors", {"format": "pt"})
    config = ModelConfig("local", "local", path=str(tmp_path / "dense"), device="cpu")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["model"] = folder_identity(config, tmp_path / "dense")
    write_json(run / "metrics.json", metrics)
    export_run(run, Request("folded"), tmp_path / "out")
    assert (
        relative(logits(load(tmp_path / "out")), logits(reference(variant_model("opt"), run)))
        < 1e-4
    )


def test_what_lies_beside_the_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path, variant_model("llama"), "free")
    summary = export_run(run, Request("gathered"), tmp_path / "out")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert summary["bytes"] < size < summary["bytes"] + 20_000  # the rest is the header
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "README.md",
        "model.safetensors",
    } <= names
    assert (
        AutoTokenizer.from_pretrained(tmp_path / "out")("abc").input_ids
        == ByT5Tokenizer(extra_ids=0)("abc").input_ids
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2:4" in card
    for written in (card, (tmp_path / "out" / "config.json").read_text()):
        assert permllm.__version__ in written
        # Whoever had the name on a package index would have the machines of everyone who follows
        # the advice.
        assert "install permllm" not in written
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.metadata()["format"] == "pt"
    assert not list(tmp_path.glob(".out*"))


def test_an_export_carries_the_licence_and_the_notice_of_its_model(tmp_path: Path) -> None:
    run = make_run(tmp_path, variant_model("gemma3_text"), "free")
    config = json.loads((run / "config.yaml").read_text())
    config["model"] |= {
        "licence": "gemma",
        "terms": "https://example.org/terms",
        "notice": "X is under the Terms of X",
    }
    config["mask"] = {"name": "refined"}  # which learns nothing
    write_text(run / "config.yaml", json.dumps(config))
    export_run(run, Request("gathered"), tmp_path / "out")
    said = "X is under the Terms of X. The weights of local were changed: they were pruned to 2:4."
    assert (tmp_path / "out" / "NOTICE").read_text() == f"{said}\n"
    head, card = (
        (tmp_path / "out" / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    )
    assert yaml.safe_load(head)["license"] == "gemma"
    assert f"{said} The terms: https://example.org/terms" in card
    assert ", masks: refined" in card


WITHOUT_PERMLLM = """
import sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM
for folder in sys.argv[1:]:
    for cls in (AutoModelForCausalLM, LlamaForCausalLM):
        try:
            cls.from_pretrained(folder)
            print("LOADED")
        except Exception as error:
            print("REFUSED" if "import permllm.export" in str(error) else repr(error))
assert "permllm" not in sys.modules
"""


def test_without_permllm_ours_say_what_to_import_and_a_folded_model_needs_nothing(
    tmp_path: Path,
) -> None:
    forms = ("gathered", "folded")
    for form in forms:
        run = make_run(
            tmp_path / form, variant_model("llama"), "free" if form == "gathered" else "foldable"
        )
        export_run(run, Request(form), run.parent / "out")
    result = _python(WITHOUT_PERMLLM, *(tmp_path / form / "out" for form in forms))
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["REFUSED"] * 2 + ["LOADED"] * 2, result.stdout


def _python(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_bad_requests(tmp_path: Path) -> None:
    run = make_run(tmp_path, variant_model("llama"), "foldable")
    for request, text in [
        (Request("flat"), "export.form='flat'"),
        (Request("folded", dtype="int8"), "export.dtype='int8'"),
        (Request("folded", shard_gb=0), "export.shard_gb=0"),
    ]:
        with pytest.raises(ConfigError, match=text):
            export_run(run, request, tmp_path / "out")
    with pytest.raises(ConfigError, match="is there already"):
        export_run(run, Request("folded"), tmp_path / "dense")
    with pytest.raises(ConfigError, match="is not a run directory"):
        export_run(tmp_path / "dense", Request("folded"), tmp_path / "out")
    variant_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "dense")
    with pytest.raises(DataError, match="was pruned from"):
        export_run(run, Request("folded"), tmp_path / "out")


def test_values_that_do_not_fit_are_named(tmp_path: Path) -> None:
    model = variant_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = 1e30
    run = make_run(tmp_path, model, "foldable")
    with pytest.raises(
        DataError, match=r"model.layers.1.mlp.up_proj.weight does not fit into float16"
    ):
        export_run(run, Request("folded", dtype="float16"), tmp_path / "out")


def test_truncated_files_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, variant_model("llama"), "free")
    export_run(run, Request("gathered"), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="cannot load"):
        load(tmp_path / "out")


def take_as_pruned(run: Path, dense: Path) -> None:
    """Have a run be one of a folder as it is now."""
    metrics = json.loads((run / "metrics.json").read_text())
    identity = folder_identity(ModelConfig(name="local", source="local", path=str(dense)), dense)
    write_json(run / "metrics.json", metrics | {"model": identity})


def test_a_head_that_differs_from_the_embedding_that_it_is_tied_to_is_exported(
    tmp_path: Path,
) -> None:
    run = make_run(tmp_path, variant_model("llama"), "foldable")
    state = load_file(tmp_path / "dense" / "model.safetensors")
    assert "lm_head.weight" in state
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    (tmp_path / "dense" / "config.json").write_text(
        json.dumps(config | {"tie_word_embeddings": True})
    )
    take_as_pruned(run, tmp_path / "dense")
    export_run(run, Request("folded"), tmp_path / "out")
    assert (
        relative(logits(load(tmp_path / "out")), logits(reference(load(tmp_path / "dense"), run)))
        < 1e-5
    )
