"""Sizes and memory that `plan=true` prints."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import run_command


def test_the_plan_needs_neither_weights_nor_network_and_writes_nothing(tmp_path: Path) -> None:
    plan = ("plan=true", "model.placement=device")
    result = run_command("model=qwen2.5-7b", *plan, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for number in ("3584", "18944", "53215232"):
        assert number in result.stdout
    windows = run_command("model=qwen2.5-7b", *plan, "permutation.layers_per_stage=8", cwd=tmp_path)
    assert "4, of at most 8 layers" in windows.stdout
    masks = run_command("model=qwen2.5-7b", *plan, "mask=score", "mask.layers_per_stage=2", cwd=tmp_path)
    a_layer = 3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944
    assert f"mask parameters        {28 * a_layer}, in stages of at most {2 * a_layer}" in masks.stdout
    held = float(re.search(r"learn masks +([\d.]+) GB", masks.stdout)[1])  # type: ignore[index]
    weights = float(re.search(r"  weights +([\d.]+) GB", masks.stdout)[1])  # type: ignore[index]
    # Scores, gradients and two moments in float32, and a masked weight that waits; what two layers keep of a batch, with a
    # copy of what they read for two of q, k and v and for one of gate and up.
    learned, activations = (4 * 4 + 2) * 2 * a_layer, 4 * 1024 * ((11 + 3) * 3584 + 4 * 18944) * 2 * 2
    a_group = 3 * 2 * 3584 * 2 * 18944  # the widest: its masked weight, and gradients of it
    assert (held - weights) * 1e9 == pytest.approx(learned + activations + a_group, abs=2e7)
    refined = run_command("model=qwen2.5-7b", *plan, "permutation=none", "mask=refined", cwd=tmp_path)
    sizes = {name: float(re.search(rf"  {name} +([\d.]+) GB", refined.stdout)[1]) for name in ("calibrate", "refine masks")}  # type: ignore[index]
    # The Gram matrix of the widest input and its copies; weights, masks and what they take away of the widest group.
    more = 5 * 4 * 18944**2 + 6 * 4 * 3584 * 2 * 18944
    assert (sizes["refine masks"] - sizes["calibrate"]) * 1e9 == pytest.approx(more, abs=2e7)
    weights_learn = run_command("model=qwen2.5-7b", *plan, "reconstruction=distill", "permutation=none", cwd=tmp_path)
    kept = 28 * a_layer // 2
    assert f"kept weights           {kept}," in weights_learn.stdout
    held = float(re.search(r"learn weights +([\d.]+) GB", weights_learn.stdout)[1])  # type: ignore[index]
    # Values, gradients and two moments in float32, and places; of all layers the states alone, as they are recomputed.
    states = 4 * 1024 * (3584 * 28 + 8 * 3584 + 4 * 2 * 18944) * 2
    head = 4 * 4 * 128 * 152064  # four numbers a logit; its weight is read as it is, in the format of the products
    assert (held - weights) * 1e9 == pytest.approx(5 * 4 * kept + states + a_group + head, abs=2e7)
    assert not (tmp_path / "runs").exists()


def test_a_random_model_has_no_files_in_its_plan(tmp_path: Path) -> None:
    random = run_command("model=tiny", "plan=true", cwd=tmp_path).stdout
    assert "host" in random
    assert "disk" not in random


def test_the_plan_says_what_is_shared_and_what_stays(tmp_path: Path) -> None:
    whole = run_command("model=qwen2.5-7b", "plan=true", "permutation.constraint=foldable", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    assert "residual_stream" in whole.stdout
    assert "stays where it starts" not in whole.stdout
    # Logits: 3584 x 64 of the stream once, in each of 28 layers 4 key-value heads of 128 channels and 18944 of the MLP.
    assert str(3584 * 64 + 28 * (4 * 128 * 64 + 18944 * 64)) in whole.stdout
    windows = run_command(
        "model=qwen2.5-7b", "plan=true", "permutation.constraint=foldable", "permutation.layers_per_stage=8", cwd=tmp_path
    )
    assert "residual_stream stays where it starts" in windows.stdout
