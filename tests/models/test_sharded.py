"""Layers in parts on several processes: what is pruned and learned is what one process makes of the whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from permllm.config import read_config
from permllm.errors import ConfigError
from permllm.pruning.methods import methods_of
from permllm.runtime import parallel
from tests.conftest import ROOT, run_command, run_python
from tests.runtime.test_parallel import finished, torchrun
from tests.test_config import composed

# The shares of 13 and of 4 samples differ between three ranks, and two of them have none of the
# last batch.
WORDS = (
    "model.dtype=float64",
    "calibration=builtin",
    "evaluation=builtin",
    "calibration.samples=13",
)
WORDS += ("budget.epochs=1", "evaluation.perplexity.limit=2")
LCP = ("permutation=lcp", "permutation.batch_size=4", "permutation.select_from=6")
FILES = ("permutations.safetensors", "masks.safetensors", "weights/00000.safetensors")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, of several files."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    # No multiple of three: parts of other sizes.
    shape = ["model.architecture.hidden_size=40", "model.architecture.num_attention_heads=5"]
    shape += ["model.architecture.num_key_value_heads=5", "model.architecture.intermediate_size=52"]
    words = [str(folder), "model=tiny", "model.dtype=float64", *shape, "--shard-gb", "0.0001"]
    assert run_python("scripts/random_checkpoint.py", *words, cwd=ROOT).returncode == 0
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.mark.parametrize(
    ("processes", "placement", "method"),
    [
        # Windows of one layer, of which each knows the layers before; portions that one rank has
        # none of.
        (3, "sharded", [*LCP, "permutation.layers_per_stage=1", "permutation.micro_batch_size=1"]),
        # A rank has no sample of the last batch, and nothing learns in the layer before those that
        # do.
        (2, "sharded", [*LCP, "keep_dense=[0]", "permutation.batch_size=2"]),
        (
            2,
            "sharded",
            ["permutation=heuristic", "mask=score", "mask.layers_per_stage=1", "mask.batch_size=4"],
        ),
        # Weights that change go back to their parts.
        (
            2,
            "sharded",
            ["permutation=heuristic", "pruner=sparsegpt", "calibration.statistics=sequential"],
        ),
        (3, "sharded", [*LCP, "reconstruction=obs", "export=gathered"]),
        # Each streams all layers for itself: from the same files, or from its own memory.
        (2, "disk", [*LCP, "permutation.layers_per_stage=1", "reconstruction=obs"]),
        (2, "host", [*LCP, "mask=score", "mask.batch_size=4"]),
    ],
    ids=["stages", "dense-first", "masks", "sparsegpt", "obs", "disk", "host"],
)
def test_it_is_what_one_process_makes_of_the_model(
    checkpoint: Path, tmp_path: Path, processes: int, placement: str, method: list[str]
) -> None:
    words = (
        "model=local",
        f"model.path={checkpoint}",
        *WORDS,
        "logger=none",
        "run_dir=run",
        *method,
    )
    one = run_command(*words, cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    code, _, err = finished(
        torchrun(tmp_path, *words, f"model.placement={placement}", processes=processes)
    )
    assert code == 0, err
    single, several = tmp_path / "run", tmp_path / "rank0" / "run"
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (single, several)]
    assert metrics[0]["perplexity"] == metrics[1]["perplexity"]
    assert metrics[0]["sparsity"] == metrics[1]["sparsity"]
    for file in FILES:
        assert (single / file).is_file() == (several / file).is_file()
        if (single / file).is_file():
            found = [load_file(run / file) for run in (single, several)]
            assert found[0].keys() == found[1].keys()
            assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items()), (
                file
            )
    assert not list((tmp_path / "rank1").rglob("*.json"))


def test_one_process_has_nobody_to_share_with(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(
        composed("model=tiny", "logger=none", "permutation=none", "model.placement=sharded")
    )
    with pytest.raises(
        ConfigError, match=r"^model\.placement=sharded needs several processes: torchrun"
    ):
        methods_of(config)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    methods_of(config)


def test_what_trains_all_weights_is_refused() -> None:
    words = (
        "model=tiny",
        "logger=none",
        "permutation=none",
        "model.placement=sharded",
        "reconstruction=distill",
    )
    with pytest.raises(
        ConfigError, match=r"^reconstruction: Distill .*, which needs model\.placement=device$"
    ):
        methods_of(read_config(composed(*words)))
