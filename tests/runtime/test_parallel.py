"""Two ranks under torchrun learn what one process does from the same batches, whatever becomes of a job or of one of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from permllm import job
from permllm.config import read_config
from permllm.errors import ConfigError
from permllm.runs.directory import RunDirectory, run_directory
from permllm.runs.launched import share_gpus
from permllm.runs.sweep import kept
from permllm.runtime import parallel
from permllm.runtime.terminal import CONTINUES
from tests.conftest import ROOT, run_command
from tests.test_config import composed

OVERRIDES = (
    "model=tiny",
    "model.dtype=float64",
    "logger=none",
    "calibration.samples=15",  # batches of 4, 4, 4 and 3: unequal shares
    "permutation.epochs=20",
    "permutation.learning_rate=0.05",
    "permutation.select_from=6",
)
# A rank cannot see the files of another one: its working directory and its cache are its own, as on
# a machine of its own.
APART = f"""
import os, pathlib, runpy, sys
from permllm.errors import DataError
from permllm.runtime import parallel
from permllm.training import loop as training
parallel._SAME_ERROR = 2.0
own = pathlib.Path("rank" + os.environ["RANK"])
own.mkdir(exist_ok=True)
os.chdir(own)
os.environ["PERMLLM_CACHE"] = str(own.resolve() / "cache")
pathlib.Path("pid").write_text(str(os.getpid()))
write, left = training.save_state, [int(os.environ.get("CHECKPOINTS_THAT_FIT", "1000"))]
def write_torch(path, state):
    left[0] -= 1
    if left[0] < 0:
        raise DataError(f"no space left to write {{path.name}}")
    write(path, state)
training.save_state = write_torch
sys.argv[0] = {str(ROOT / "run.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def torchrun(
    cwd: Path, *overrides: str, processes: int = 2, **environment: str
) -> subprocess.Popen[str]:
    """Start ranks that share no folder: theirs are `rank0`, `rank1` and so on in `cwd`."""
    script = cwd / "apart.py"
    script.write_text(APART)
    for rank in range(processes):
        (cwd / f"rank{rank}" / "pid").unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        str(script),
    ]
    # On the CPU, which they can share, also on a machine with a GPU.
    variables = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
    } | environment
    return subprocess.Popen(
        [*command, *overrides],
        cwd=cwd,
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(process: subprocess.Popen[str], seconds: float = 300) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, out, err


def history(run: Path) -> list[dict[str, float]]:
    file = run / "history.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process learns: the folder with its run `run`."""
    folder = tmp_path_factory.mktemp("alone")
    one = run_command(*OVERRIDES, "run_dir=run", cwd=folder)
    assert one.returncode == 0, one.stderr
    return folder


def check_equal(single: Path, double: Path) -> None:
    """The orders and the losses of two runs."""
    alone, together = (load_file(run / "permutations.safetensors") for run in (single, double))
    assert all(torch.equal(alone[name], together[name]) for name in alone)
    assert any(not torch.equal(order.sort().values, order) for order in alone.values())
    assert len(history(double)) == 20
    for left, right in zip(history(single), history(double), strict=True):
        assert abs(left["loss"] - right["loss"]) < 1e-12
        if left["epoch"] > 14:
            assert abs(left["measured_loss"] - right["measured_loss"]) < 1e-12


def test_a_rank_that_ends_in_the_middle_of_learning_ends_all_and_the_same_command_continues(
    tmp_path: Path, alone: Path
) -> None:
    command, run = (*OVERRIDES, "run_dir=run"), tmp_path / "rank0" / "run"
    process = torchrun(tmp_path, *command)
    give_up = time.monotonic() + 300
    while len(history(run)) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < give_up
        time.sleep(0.01)
    os.kill(int((tmp_path / "rank1" / "pid").read_text()), signal.SIGKILL)
    code, _, err = finished(process, seconds=60)
    assert code != 0
    assert err.count(CONTINUES) == 1
    done = len(history(run))
    assert 2 <= done < 20
    # An error that one rank alone meets.
    code, _, err = finished(torchrun(tmp_path, *command, CHECKPOINTS_THAT_FIT="2"), seconds=60)
    assert code != 0
    assert (
        err.count(f"error: rank 0: no space left to write lcp_checkpoint.pt: {CONTINUES}")
        == err.count("error: ")
        == 1
    )
    assert done < len(history(run)) < 20
    code, out, err = finished(torchrun(tmp_path, *command))
    assert code == 0, err
    # One of them says it. The state is written before the line of the history.
    assert (
        sum("continuing after step" in line for line in err.splitlines())
        == out.count("files ")
        == 1
    )
    assert sorted(entry.name for entry in (tmp_path / "rank1").iterdir()) == [
        "pid"
    ]  # rank 0 alone writes
    orders = [
        load_file(folder / "run" / "permutations.safetensors")
        for folder in (alone, tmp_path / "rank0")
    ]
    assert all(torch.equal(orders[0][name], orders[1][name]) for name in orders[0])


def test_two_ranks_learn_what_one_process_does_and_what_becomes_of_a_job_holds_for_both(
    tmp_path: Path, alone: Path
) -> None:
    def record(*overrides: str) -> RunDirectory:
        config = read_config(composed(*OVERRIDES, *overrides))
        return RunDirectory(tmp_path / "rank0" / run_directory(config), config)

    stray, busy = record("permutation.margin=1e300", "seed=1"), record("seed=1")
    stray.directory.mkdir(parents=True)
    (stray.directory / "stray").touch()
    with busy.opened():
        command = ("-m", *OVERRIDES, "permutation.margin=1e300,0.05", "seed=1,0,0")
        code, out, err = finished(torchrun(tmp_path, *command))
    assert code == 1, err
    (folder,) = (tmp_path / "rank0" / "runs" / "sweeps").iterdir()
    jobs = kept(folder)
    reasons = {
        0: "holds no config.yaml",  # which rank 0 alone meets
        1: "is not finite",  # which all meet
        2: "is not finite",
        3: "is in use by another process",
    }
    assert [job.outcome for job in jobs] == ["failed"] * 3 + ["skipped", "ran", "skipped"]
    assert all(reason in jobs[number].reason for number, reason in reasons.items())
    assert err.count("error: ") == 3
    assert "is finished already" in err
    check_equal(alone / "run", Path(str(jobs[4].directory)))
    assert out.count("1 ran, 2 skipped, 3 failed") == out.count("outcome") == 1
    assert not list((tmp_path / "rank1").rglob("*.json"))


def test_ranks_share_the_batches_that_weights_learn_from(tmp_path: Path) -> None:
    words = (
        "model=tiny",
        "model.dtype=float64",
        "logger=none",
        "permutation=none",
        "reconstruction=distill",
        "run_dir=run",
    )
    words += ("calibration.samples=5", "reconstruction.batch_size=3")
    one = run_command(*words, cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    code, _, err = finished(torchrun(tmp_path, *words))
    assert code == 0, err
    file = Path("run") / "weights" / "00000.safetensors"
    alone, together = load_file(tmp_path / file), load_file(tmp_path / "rank0" / file)
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("count", "at_once"), [(4, None), (4, 1), (13, 2), (3, 5), (1, 1), (7, 2)])
def test_each_rank_has_as_many_portions_and_each_sample_counts_once(
    count: int, at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    found = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        found.append(parallel.portions(torch.arange(count), at_once))
    assert len({len(of_rank) for of_rank in found}) == 1
    portions = [portion for of_rank in found for portion in of_rank]
    assert all(
        counted in (0, len(part)) and 0 < len(part) <= (at_once or count)
        for part, counted in portions
    )
    assert sorted(int(index) for part, counted in portions if counted for index in part) == list(
        range(count)
    )


def test_a_batch_that_leaves_processes_without_samples_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "world_size", lambda: 8)
    monkeypatch.setattr(parallel, "share", lambda value: value)
    for setting in ("permutation.batch_size=4", "calibration.samples=4"):
        config = read_config(
            composed(
                "model=tiny",
                "logger=none",
                "permutation.batch_size=8",
                f"runs_dir={tmp_path}",
                setting,
            )
        )
        name = setting.split("=", maxsplit=1)[0]
        with pytest.raises(
            ConfigError,
            match=rf"{setting} leaves .* of 8 processes without .*: the smallest is {name}=8",
        ):
            job.run(config)
    assert not list(tmp_path.rglob("metrics.json"))
    assert not cache.exists()


def test_a_launcher_that_starts_processes_of_its_own_is_refused_under_torchrun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="hydra/launcher=basic"):
        share_gpus({"_target_": "hydra_plugins.hydra_joblib_launcher.JoblibLauncher"}, "auto")
