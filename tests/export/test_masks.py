"""Masks without weights: the model and the checkpoint that they make, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

import permllm
from permllm.cli import call
from permllm.errors import ConfigError, DataError
from permllm.export.masks import write_masks
from permllm.export.verify import verify
from permllm.export.write import export_run
from permllm.settings.config import ExportConfig
from permllm.store.files import SUMMARY, read_json, write_json, write_text
from tests.export.pruned import (
    TWO_OF_FOUR,
    change_metrics,
    make_run,
    reference,
    variant_model,
)
from tests.models.test_bad_checkpoints import WEIGHTS


@pytest.mark.parametrize("form", ["folded", "gathered"])
def test_masks_make_the_model_of_their_run(form: str, exports: Path, tmp_path: Path) -> None:
    run, masks = exports / f"of-{form}" / "run", tmp_path / "masks"
    assert call("export", [str(run), "--form", "masks", "--to", str(masks)]) == 0
    dense = Path(shutil.copytree(run.parent / "dense", tmp_path / "elsewhere" / "dense"))
    loaded = permllm.load(masks, dense=dense)
    pruned = reference(variant_model("llama"), run).state_dict()
    assert all(torch.equal(value, pruned[name]) for name, value in loaded.state_dict().items())
    model = variant_model("llama").double()
    assert permllm.load(masks, dense=model) is model
    assert all(torch.equal(value.float(), pruned[key]) for key, value in model.state_dict().items())
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager"}
    half = permllm.load(masks, dense=dense, **options).state_dict()
    assert all(torch.equal(half[name], pruned[name].bfloat16()) for name in pruned)
    with pytest.raises(ConfigError, match="dense="):
        export_run(masks, ExportConfig(), tmp_path / "out")
    words = [str(masks), "--to", str(tmp_path / "out"), "--dense", str(dense)]
    assert call("export", words) == 0
    assert read_json(tmp_path / "out" / SUMMARY)["form"] == form
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (exports / form / WEIGHTS).read_bytes()


def test_a_folder_of_masks_has_a_card_and_no_weights(tmp_path: Path) -> None:
    model = variant_model("llama")
    run = make_run(tmp_path, model, "free", TWO_OF_FOUR, ("layers.1.mlp",))
    dense = {"value": 9.5, "window": 8, "tokens": 64}
    change_metrics(run, perplexity={"dense": {"x": dense}, "sparse": {"x": dense | {"value": 12}}})
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["calibration"] = {"data_files": str(tmp_path / "my.txt")}
    write_text(run / "config.yaml", yaml.safe_dump(config))
    summary = write_masks(run, tmp_path / "masks")
    assert summary["settings"]["calibration"] == {"data_files": "my.txt"}
    assert str(tmp_path) not in (tmp_path / "masks" / SUMMARY).read_text()
    names = {file.name for file in (tmp_path / "masks").iterdir()}
    assert names == {"masks.safetensors", "permutations.safetensors", SUMMARY, "README.md"}
    assert read_json(tmp_path / "masks" / SUMMARY) == summary
    card = (tmp_path / "masks" / "README.md").read_text()
    identity = read_json(run / "metrics.json")["model"]
    for words in ("9.5", "12", identity, 'permllm.load("masks")', "3 dense"):
        assert words in card
    for folder in (run, tmp_path / "masks"):
        with pytest.raises(DataError, match=f"permllm export {folder} --to"):
            verify(folder)


@pytest.mark.parametrize("size", [{"num_hidden_layers": 3}, {"intermediate_size": 128}])
def test_masks_of_another_model_leave_a_loaded_one_as_it_is(
    size: dict[str, int], exports: Path, tmp_path: Path
) -> None:
    write_masks(exports / "of-folded" / "run", tmp_path / "masks")
    model = variant_model("llama", **size)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(DataError, match="masks"):
        permllm.load(tmp_path / "masks", dense=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ConfigError, match="dense"):
        permllm.load(tmp_path / "masks", dense=model, dtype="float16")


def test_masks_that_cannot_make_a_model_are_refused(exports: Path, tmp_path: Path) -> None:
    run = shutil.copytree(exports / "of-folded" / "run", tmp_path / "run")
    write_masks(run, tmp_path / "masks")
    summary = read_json(tmp_path / "masks" / SUMMARY)
    dense, other = exports / "of-folded" / "dense", tmp_path / "other"
    summary["settings"]["model"]["terms"] = "https://x.org"
    write_json(tmp_path / "masks" / SUMMARY, summary)
    with pytest.raises(ConfigError, match="accept_terms"):
        permllm.load(tmp_path / "masks", dense=dense)
    variant_model("qwen2").save_pretrained(other)
    with pytest.raises(DataError, match="was pruned from"):
        permllm.load(tmp_path / "masks", dense=other, accept_terms=True)
    with pytest.raises(ConfigError, match="dense="):
        permllm.load(tmp_path / "masks", accept_terms=True)
    with pytest.raises(ConfigError, match="dense"):
        permllm.load(dense, dense=dense)
    sparsity = read_json(run / "metrics.json")["sparsity"]
    change_metrics(run, sparsity=sparsity | {"weights_changed": True})
    with pytest.raises(ConfigError, match="changed weights"):
        write_masks(run, tmp_path / "again")
    assert not (tmp_path / "again").exists()
