"""Masks without weights: the model and the checkpoint that they make, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

import permllm
from permllm import job
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
from tests.settings.test_config import config


@pytest.mark.parametrize("form", ["folded", "gathered"])
def test_masks_make_the_model_of_their_run(form: str, exports: Path, tmp_path: Path) -> None:
    run, masks = exports / f"of-{form}" / "run", tmp_path / "masks"
    assert call("export", [str(run), "--form", "masks", "--to", str(masks)]) == 0
    loaded = permllm.load(masks)
    pruned = reference(variant_model("llama"), run).state_dict()
    assert all(torch.equal(value, pruned[name]) for name, value in loaded.state_dict().items())
    assert not loaded.training
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    half = permllm.load(masks, dtype=torch.bfloat16, attn_implementation="eager").state_dict()
    assert all(torch.equal(half[name], pruned[name].bfloat16()) for name in pruned)
    export_run(masks, ExportConfig(), tmp_path / "out")
    assert read_json(tmp_path / "out" / SUMMARY)["form"] == form
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (exports / form / WEIGHTS).read_bytes()


@pytest.mark.parametrize(("name", "dtype"), [("float16", torch.float16), ("auto", torch.float32)])
def test_masks_of_a_random_model_load_in_a_dtype_by_name(
    name: str, dtype: torch.dtype, tmp_path: Path, cache: Path
) -> None:
    job.run(config("model=tiny", "logger=none", "permutation=none", f"run_dir={tmp_path}/run"))
    write_masks(tmp_path / "run", tmp_path / "masks")
    assert permllm.load(tmp_path / "masks", dtype=name).dtype == dtype


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


def test_masks_that_cannot_make_a_model_are_refused(exports: Path, tmp_path: Path) -> None:
    run = shutil.copytree(exports / "of-folded" / "run", tmp_path / "run")
    write_masks(run, tmp_path / "masks")
    summary = read_json(tmp_path / "masks" / SUMMARY)
    model = summary["settings"]["model"]
    model["terms"] = "https://x.org"
    write_json(tmp_path / "masks" / SUMMARY, summary)
    with pytest.raises(ConfigError, match="accept_terms"):
        permllm.load(tmp_path / "masks")
    variant_model("qwen2").save_pretrained(tmp_path / "other")
    model["path"] = str(tmp_path / "other")
    write_json(tmp_path / "masks" / SUMMARY, summary)
    with pytest.raises(DataError, match="was pruned from"):
        permllm.load(tmp_path / "masks", accept_terms=True)
    sparsity = read_json(run / "metrics.json")["sparsity"]
    change_metrics(run, sparsity=sparsity | {"weights_changed": True})
    with pytest.raises(ConfigError, match="changed weights"):
        write_masks(run, tmp_path / "again")
    assert not (tmp_path / "again").exists()
