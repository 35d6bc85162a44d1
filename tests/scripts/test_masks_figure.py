"""Masks of runs side by side: each panel has the title of its own run and linear."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from permllm.errors import DataError
from permllm.store.tensors import save_masks
from scripts.masks_figure import main
from tests.kept import make_run


def test_each_panel_names_its_own_run_and_linear(
    tmp_path: Path,
) -> None:
    for number, (permutation, layers) in enumerate((("none", 5), ("lcp", 3))):
        run = make_run(tmp_path / "runs" / permutation, 20.0 + number, permutation=permutation)
        masks = {
            f"model.layers.{layer}.mlp.down_proj": torch.ones(24, 32) for layer in range(layers)
        }
        save_masks(run / "masks.safetensors", {path: mask.bool() for path, mask in masks.items()})
    file = tmp_path / "masks.svg"
    assert main([str(tmp_path / "runs"), "--to", str(file)]) == 0
    texts = " ".join(re.findall("<!-- (.*?) -->", file.read_text()))
    for layer, name in ((2, "none"), (1, "lcp")):
        assert f"{name}, seed 0: model.layers.{layer}.mlp.down_proj" in texts
    (tmp_path / "runs" / "lcp" / "masks.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(DataError):
        main([str(tmp_path / "runs"), "--to", str(file)])
