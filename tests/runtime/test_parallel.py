"""Ranks learn and prune what one process does from the same text; an error holds for all."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from permllm import job
from permllm.errors import ConfigError
from permllm.runtime import parallel
from permllm.runtime.signals import CONTINUES
from permllm.store.directory import RunDirectory, run_directory
from permllm.store.environment import git_commit
from permllm.store.files import read_json, read_lines
from permllm.store.sweep import read_outcomes, share_gpus
from permllm.store.tensors import load_masks, load_state
from permllm.training import trainer as training
from tests.conftest import ROOT, run_command
from tests.settings.test_config import config

TINY = ("model=tiny-random", "model.dtype=float64", "logger=none")
LCP = (*TINY, "calibration.samples=15", "permutation.epochs=2", "permutation.learning_rate=0.05")


def ranks(
    cwd: Path, *words: str, processes: int = 2, program: Path = ROOT / "run.py"
) -> list[subprocess.CompletedProcess[str]]:
    """Run a command in ranks that share no folder: theirs are `rank0`, `rank1` and so on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    # On the CPU, which they can share, also on a machine with a GPU.
    shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"LOCAL_WORLD_SIZE": str(processes), "CUDA_VISIBLE_DEVICES": ""}

    def run(rank: int) -> subprocess.CompletedProcess[str]:
        folder = cwd / f"rank{rank}"
        folder.mkdir(exist_ok=True)
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        return run_command(*words, cwd=folder, program=program, **own, **shared)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(processes) as pool:
        for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE"):
            patch.setenv(name, "1")  # once for all threads, each of which does so too
        return list(pool.map(run, range(processes)))


def check_equal(single: Path, several: Path, of_weights: float = 1e-12) -> None:
    """Compare the tensors and the losses of two runs.

    Args:
        of_weights: difference that weights may have. A Gram matrix is a sum in float32, whose
            rounding differs with the shares of the ranks.
    """
    for file in single.rglob("*.safetensors"):
        alone, together = load_file(file), load_file(several / file.relative_to(single))
        differs = of_weights if file.parent.name == "weights" else 1e-12
        torch.testing.assert_close(together, alone, rtol=1e-9, atol=differs)
    losses = [
        [line["loss"] for line in read_lines(run / "history.jsonl")] for run in (several, single)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-12)


@pytest.mark.parametrize(
    "method",
    [
        # Permutations are learned, then weights.
        (
            *("permutation=lcp", "permutation.epochs=2", "permutation.learning_rate=0.05"),
            *("reconstruction=distill", "reconstruction.cross_entropy=0.33"),
            "reconstruction.batch_size=4",
        ),
        ("permutation=none", "mask=gumbel", "mask.epochs=2", "mask.cross_entropy=0.5"),
    ],
    ids=["lcp-and-distill", "gumbel"],
)
def test_two_ranks_continue_a_run_to_what_one_process_learns(
    method: tuple[str, ...], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Batches of 4, 4, 4 and 3 windows: unequal shares.
    words = (*TINY, "calibration.samples=15", *method)

    def learn(folder: Path) -> None:
        job.run(config(*words, f"run_dir={folder}"))

    learn(tmp_path / "alone")
    write, left = training.save_state, [2]

    def write_and_stop(path: Path, state: object) -> None:
        write(path, state)
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_state", write_and_stop)
    with pytest.raises(KeyboardInterrupt):
        learn(tmp_path / "rank0" / "run")
    done = ranks(tmp_path, *words, "run_dir=run")
    assert [one.returncode for one in done] == [0, 0], done
    # Rank 0 alone says it, and alone writes.
    assert ["continuing after step" in one.stderr for one in done] == [True, False]
    assert ["files " in one.stdout for one in done] == [True, False]
    assert not [file for file in (tmp_path / "rank1").rglob("*") if file.is_file()]
    check_equal(tmp_path / "alone", tmp_path / "rank0" / "run")


def saliency_of(cache: Path) -> dict[str, Tensor]:
    """Return the saliency factors of the dense model that a job has left in its cache."""
    (file,) = (cache / "results").glob("saliency-*.pt")
    return load_state(file, torch.device("cpu"))


@pytest.mark.parametrize(
    ("processes", "method"),
    [
        # Seven windows: two or three for each rank.
        (3, ("calibration.statistics=sequential", "pruner=ria", "calibration.samples=7")),
        (2, ("pruner=wanda", "reconstruction=obs", "calibration.samples=7")),
        # None for the last rank.
        (3, ("pruner=wanda", "mask=refined", "calibration.samples=2")),
    ],
    ids=["sequential", "reconstruction", "fewer-windows-than-ranks"],
)
def test_ranks_that_share_the_windows_make_what_one_process_makes(
    processes: int, method: tuple[str, ...], cache: Path, tmp_path: Path
) -> None:
    # Rounding to bfloat16 would make a larger difference of a small one.
    words = (
        "model=tiny-random",
        "compute_dtype=float32",
        "logger=none",
        "permutation=heuristic",
        *method,
    )
    job.run(config(*words, f"run_dir={tmp_path / 'alone'}"))
    done = ranks(tmp_path, *words, "run_dir=run", processes=processes)
    assert [one.returncode for one in done] == [0] * processes, done
    single, several = tmp_path / "alone", tmp_path / "rank0" / "run"
    # Processes of a checkout with changes keep nothing in the cache.
    changed = (git_commit() or {}).get("dirty")
    if "calibration.statistics=sequential" not in words and not changed:
        factors = saliency_of(tmp_path / "rank0" / "cache")
        torch.testing.assert_close(factors, saliency_of(cache), rtol=1e-6, atol=0)
    masks = load_masks(several / "masks.safetensors")
    for path, expected in load_masks(single / "masks.safetensors").items():
        assert float((masks[path] == expected).float().mean()) >= 0.999
    alone, together = (read_json(folder / "metrics.json") for folder in (single, several))
    assert together["moved_channels"] == alone["moved_channels"]
    assert together["retained_saliency"] == pytest.approx(alone["retained_saliency"], rel=1e-6)
    # The inverse of a Gram matrix, which OBS takes, multiplies the rounding of its float32 sums.
    close = 1e-4 if "reconstruction=obs" in words else 1e-6
    assert together["output_error"] == pytest.approx(alone["output_error"], rel=close)
    for which in ("dense", "sparse"):
        for text, values in alone["perplexity"][which].items():
            value = together["perplexity"][which][text]["value"]
            assert value == pytest.approx(values["value"], rel=1e-5)


@pytest.mark.slow
def test_what_becomes_of_a_job_of_a_sweep_holds_for_all_ranks(tmp_path: Path) -> None:
    def record(*words: str) -> RunDirectory:
        made = config(*LCP, *words)
        return RunDirectory(tmp_path / "rank0" / run_directory(made), made)

    stray, busy = record("permutation.margin=1e300", "seed=1"), record("seed=1")
    stray.directory.mkdir(parents=True)
    (stray.directory / "stray").touch()
    with busy.opened():
        words = ("-m", *LCP, "permutation.margin=1e300,0.05", "seed=1,0,0")
        done = ranks(tmp_path, *words)
    assert [one.returncode for one in done] == [1, 0], done
    (folder,) = (tmp_path / "rank0" / "runs" / "sweeps").iterdir()
    jobs = read_outcomes(folder)
    # Rank 0 alone meets the first; all meet the next ones.
    reasons = ["run_dir=", "is not finite", "is not finite", "is in use by another"]
    assert [one.outcome for one in jobs] == ["failed"] * 3 + ["skipped", "ran", "skipped"]
    assert all(reason in one.reason for reason, one in zip(reasons, jobs, strict=False))
    assert done[0].stderr.count("error: ") == 3
    assert done[0].stdout.count(" (skipped): ") == 1
    assert done[0].stdout.count("1 ran, 2 skipped, 3 failed") == 1
    assert (done[1].stdout, done[1].stderr) == ("", "")


# Both ranks meet the first error; one alone meets the second, while the other waits for it.
ERRORS = """
from datetime import timedelta
from permllm.errors import ConfigError, DataError
from permllm.runtime import parallel
parallel._ALL_FAIL = timedelta(seconds=1)
parallel.start()
for number in range(3):
    try:
        with parallel.failing_together():
            if number < 2:
                raise ConfigError("wrong setting")
            if parallel.rank() == 1:
                raise DataError("no space left")
            parallel.broadcast(number)
    except ConfigError as error:
        print("met by all", flush=True)
"""


@pytest.mark.slow
def test_an_error_that_one_rank_meets_alone_ends_all(tmp_path: Path) -> None:
    script = tmp_path / "errors.py"
    script.write_text(ERRORS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert done.stdout.count("met by all") == 4
    assert done.stderr.count(f"error: rank 1: no space left: {CONTINUES}") == 1


# Rank 1 waits longer for the work of rank 0 than an exchange may take, and then for an exchange.
WAITS = """
import time
from datetime import timedelta
import torch
from permllm.runtime import parallel
parallel._EXCHANGE = timedelta(seconds=2)
parallel.start()
parallel.all_reduce([torch.ones(1)])  # connects
found = parallel.on_main(lambda: time.sleep(4) or "worked")
print(found, flush=True)
if parallel.rank() == 0:
    time.sleep(8)
started = time.monotonic()
try:
    parallel.all_reduce([torch.ones(1)])
except RuntimeError:
    print(f"ended in {time.monotonic() - started:.0f} s", flush=True)
"""


def test_ranks_wait_long_for_what_rank_0_does_alone_and_not_for_an_exchange(
    tmp_path: Path,
) -> None:
    script = tmp_path / "waits.py"
    script.write_text(WAITS)
    done = ranks(tmp_path, program=script)
    assert [one.stdout.splitlines()[0] for one in done] == ["worked", "worked"], done
    assert done[1].stdout.splitlines()[1] in ("ended in 2 s", "ended in 3 s"), done


@pytest.mark.parametrize(("count", "at_once"), [(4, None), (13, 2), (3, 5), (1, 1)])
def test_each_rank_has_as_many_portions_and_each_sample_counts_once(
    count: int, at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    found = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        found.append(parallel.portions(torch.arange(count), at_once))
    assert len({len(of_rank) for of_rank in found}) == 1
    samples = []
    for part, counted in (portion for of_rank in found for portion in of_rank):
        assert counted in (0, len(part))
        assert 0 < len(part) <= (at_once or count)
        samples += part.tolist() if counted else []
    assert sorted(samples) == list(range(count))


def test_a_launcher_that_starts_processes_of_its_own_is_refused_under_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="hydra/launcher=basic"):
        share_gpus({"_target_": "hydra_plugins.hydra_joblib_launcher.JoblibLauncher"}, "auto")
