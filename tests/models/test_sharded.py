"""Layers in parts on several processes: the result is that of one process with the whole model."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from permllm.config import read_config
from permllm.errors import ConfigError
from permllm.pruning.methods import methods_of
from permllm.runtime import parallel
from tests.conftest import run_command
from tests.models.test_offload import saved
from tests.test_config import composed

# The shares of 7 and of 4 samples differ between the ranks, and one has none of the last batch.
WORDS = ("model=local", "model.dtype=float64", "model.device=cpu", "calibration=builtin")
WORDS += ("evaluation=builtin", "calibration.samples=7", "calibration.seqlen=32", "logger=none")
WORDS += ("budget.epochs=1", "evaluation.perplexity.limit=2", "run_dir=run")
LCP = ("permutation=lcp", "permutation.batch_size=4", "permutation.select_from=6")
SEQUENTIAL = ("pruner=sparsegpt", "permutation=heuristic", "calibration.statistics=sequential")
FILES = ("permutations.safetensors", "masks.safetensors", "weights/00000.safetensors")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several files, whose widths are no multiples of three."""
    sizes = {"hidden_size": 40, "intermediate_size": 52, "num_key_value_heads": 2}
    folder = tmp_path_factory.mktemp("checkpoint")
    return saved("llama", folder, torch.float64, num_attention_heads=2, **sizes)


def run_ranks(folder: Path, *words: str, processes: int) -> None:
    """Run a command as torchrun does, each rank in a folder of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def rank(number: int) -> None:
        own = folder / f"rank{number}"
        own.mkdir()
        variables = {"RANK": str(number), "LOCAL_RANK": str(number)}
        variables |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        done = run_command(*words, cwd=own, CUDA_VISIBLE_DEVICES="", **variables)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(rank, range(processes)))


@pytest.mark.parametrize(
    ("processes", "placement", "method"),
    [
        # Windows of one layer; portions that one rank has none of; weights that change.
        pytest.param(
            3,
            "sharded",
            [
                *LCP,
                "permutation.layers_per_stage=1",
                "permutation.micro_batch_size=1",
                "reconstruction=obs",
                "export=gathered",
            ],
            id="stages",
        ),
        pytest.param(
            2,
            "sharded",
            [*LCP, "keep_dense=[0]", "mask=score", "mask.layers_per_stage=1"],
            id="masks",
        ),
        pytest.param(2, "sharded", SEQUENTIAL, id="sparsegpt", marks=pytest.mark.slow),
        # Each streams all layers for itself: from the same files, or from its own memory.
        pytest.param(2, "disk", [*LCP, "reconstruction=obs"], id="disk", marks=pytest.mark.slow),
        pytest.param(2, "host", [*LCP, "mask=score"], id="host", marks=pytest.mark.slow),
    ],
)
def test_several_processes_give_what_one_gives(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processes: int,
    placement: str,
    method: list[str],
) -> None:
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    words = (*WORDS, f"model.path={checkpoint}", *method)
    one = run_command(*words, cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    run_ranks(tmp_path, *words, f"model.placement={placement}", processes=processes)
    single, several = tmp_path / "run", tmp_path / "rank0" / "run"
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (single, several)]
    assert metrics[0]["perplexity"] == metrics[1]["perplexity"]
    assert metrics[0]["sparsity"] == metrics[1]["sparsity"]
    for file in FILES:
        assert (single / file).is_file() == (several / file).is_file()
        if (single / file).is_file():
            expected, found = load_file(single / file), load_file(several / file)
            assert expected.keys() == found.keys()
            assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert not list((tmp_path / "rank1").rglob("*.json"))


def test_sharded_weights_need_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("model=tiny", "logger=none", "permutation=none", "model.placement=sharded")
    with pytest.raises(ConfigError, match=r"^model\.placement=sharded needs several processes"):
        methods_of(read_config(composed(*words)))
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    methods_of(read_config(composed(*words)))
    with pytest.raises(ConfigError, match=r"^reconstruction: .* needs model\.placement=device$"):
        methods_of(read_config(composed(*words, "reconstruction=distill")))
