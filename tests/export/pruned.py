"""Run directories with random permutations and magnitude masks, and what their models compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer, PreTrainedModel

from permllm.export.apply import apply_record
from permllm.models.families import channel_groups, linear_at
from permllm.models.load import folder_identity
from permllm.models.selection import pruned_groups, recorded_patterns
from permllm.permutation.foldable import expanded, shared_permutations
from permllm.runtime.files import file_sha256
from permllm.settings.config import ModelConfig, NMPattern
from permllm.sparsity.nm import permuted_nm_mask
from permllm.store.files import read_json, write_json, write_text
from permllm.store.tensors import save_masks, save_tensors
from tests.conftest import FAMILY_SETTINGS, tiny_config
from tests.permutation.test_foldable import random_order

VARIANTS: dict[str, dict[str, Any]] = {
    **{family: {} for family in FAMILY_SETTINGS},
    "llama-mha": {"num_key_value_heads": 4},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "qwen3-tied": {"tie_word_embeddings": True},
    "opt-projected": {"word_embed_proj_dim": 16},
    "opt-post-norm": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "opt-tied": {"tie_word_embeddings": True},
}
TWO_OF_FOUR = NMPattern(2, 4)


def variant_model(name: str, dtype: torch.dtype = torch.float32, **extra: Any) -> PreTrainedModel:
    """Return a random model whose norms and biases are not all the same."""
    settings = tiny_config(name.split("-", maxsplit=1)[0]) | VARIANTS[name] | extra
    torch.manual_seed(0)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    return model.eval().requires_grad_(False)


def make_run(
    folder: Path,
    model: PreTrainedModel,
    constraint: str,
    pattern: NMPattern = TWO_OF_FOUR,
    keep_dense: tuple[str, ...] = (),
) -> Path:
    """Write a run directory, and the dense model beside it."""
    dense, run, path = folder / "dense", folder / "run", str(folder / "dense")
    model.save_pretrained(dense)
    ByT5Tokenizer(extra_ids=0).save_pretrained(dense)
    everything = channel_groups(model)
    groups = pruned_groups(everything, keep_dense)
    shared = shared_permutations(groups, constraint)  # type: ignore[arg-type]
    found = {order.name: random_order(order, seed) for seed, order in enumerate(shared)}
    orders, masks = expanded(shared, found), {}
    for group in groups:
        for member in group.members:
            saliency = linear_at(model, member).weight.float().abs()
            masks[member] = permuted_nm_mask(saliency, orders[group.name], pattern)
    dtype = str(model.dtype).removeprefix("torch.")
    settings = {"name": "local", "source": "local", "path": path, "dtype": dtype, "device": "cpu"}
    config: dict[str, Any] = {"name": "x", "model": settings, "seed": 0, "sparsity": str(pattern)}
    config |= {name: {"name": name} for name in ("pruner", "permutation", "mask", "reconstruction")}
    write_text(run / "config.yaml", yaml.safe_dump(config))
    sparsity: dict[str, Any] = {"pattern": str(pattern), "of_model": 0.5, "violations": 0}
    sparsity["weights_changed"] = False
    if keep_dense:
        sparsity["patterns"] = recorded_patterns(everything, groups)
    save_tensors(run / "permutations.safetensors", orders)
    save_masks(run / "masks.safetensors", masks)
    metrics = {"status": "finished", "name": "x", "config_hash": "0", "seconds": {}}
    digests = {file.name: file_sha256(file) for file in run.glob("*.safetensors")}
    write_json(run / "metrics.json", metrics | {"sparsity": sparsity, "sha256": digests})
    take_as_pruned(run, dense)
    return run


def take_as_pruned(run: Path, dense: Path) -> None:
    """Record in a run the present identity of its dense folder."""
    dtype = yaml.safe_load((run / "config.yaml").read_text())["model"]["dtype"]
    settings = ModelConfig(name="local", source="local", path=str(dense), dtype=dtype)
    change_metrics(run, model=folder_identity(settings, dense))


def change_metrics(run: Path, **values: Any) -> None:
    """Change what a run says of itself."""
    write_json(run / "metrics.json", read_json(run / "metrics.json") | values)


def logits(model: PreTrainedModel) -> Tensor:
    """Return a model's logits on random tokens."""
    tokens = torch.randint(259, (2, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=tokens).logits


def load(folder: Path, **options: Any) -> PreTrainedModel:
    """Load a checkpoint as transformers does."""
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def reference(model: PreTrainedModel, run: Path) -> PreTrainedModel:
    """Return the pruned model in the original order, by multiplying the masks."""
    apply_record(model, read_json(run / "metrics.json")["model"], run)
    return model


def relative(first: Tensor, second: Tensor) -> float:
    """Return the norm of a difference over that of the second."""
    return float((first - second).norm() / second.norm())
