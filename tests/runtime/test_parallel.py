"""Two processes under torchrun learn what one does with the same global batch, whatever becomes of a job or of one of them."""

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
from permllm.runs.sweep import kept
from permllm.runtime import parallel
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
# What one process has the other cannot see: its working directory and its cache are its own, as on a machine of its own.
APART = f"""
import os, pathlib, runpy, sys
from permllm.errors import DataError
from permllm.training import loop as training
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


def torchrun(cwd: Path, *overrides: str, processes: int = 2, **environment: str) -> subprocess.Popen[str]:
    """Start processes that share no folder: theirs are `rank0`, `rank1` and so on in `cwd`."""
    script = cwd / "apart.py"
    script.write_text(APART)
    for rank in range(processes):
        (cwd / f"rank{rank}" / "pid").unlink(missing_ok=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script)]
    # On the CPU, which they can share, also on a machine with a GPU.
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment
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


def test_a_process_that_ends_in_the_middle_of_learning_ends_all_and_the_same_command_continues(
    tmp_path: Path, alone: Path
) -> None:
    command = (*OVERRIDES, "run_dir=run")
    continues = "the same command continues where it stopped"

    def killed(rank: int, passes: int) -> str:
        process = torchrun(tmp_path, *command)
        give_up = time.monotonic() + 300
        while len(history(tmp_path / "rank0" / "run")) < passes:
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < give_up
            time.sleep(0.01)
        os.kill(int((tmp_path / f"rank{rank}" / "pid").read_text()), signal.SIGKILL)
        code, _, err = finished(process, seconds=60)
        assert code != 0
        return err

    err = killed(1, passes=2)
    assert err.count(f"the process of rank 1 died (killed, crashed, or lost with its machine): {continues}") == 1
    done = len(history(tmp_path / "rank0" / "run"))
    assert 2 <= done < 20
    err = killed(0, passes=done + 2)
    assert err.count(f"the process of rank 0 died (killed, crashed, or lost with its machine): {continues}") == 1
    # One of them says it. The state is written before the line of the history.
    assert sum("continuing after step" in line for line in err.splitlines()) == 1
    code, _, err = finished(torchrun(tmp_path, *command, CHECKPOINTS_THAT_FIT="2"), seconds=60)
    assert code != 0
    assert "error: no space left to write lcp_checkpoint.pt\n" in err
    assert f"the other processes are in the middle of a step and end too: {continues}" in err
    assert "died" not in err
    assert len(history(tmp_path / "rank0" / "run")) < 20
    code, out, err = finished(torchrun(tmp_path, *command))
    assert code == 0, err
    assert out.count("files ") == 1
    assert sorted(entry.name for entry in (tmp_path / "rank1").iterdir()) == ["pid"]  # one keeps the record
    orders = [load_file(folder / "run" / "permutations.safetensors") for folder in (alone, tmp_path / "rank0")]
    assert all(torch.equal(orders[0][name], orders[1][name]) for name in orders[0])


def test_two_processes_learn_what_one_does_and_what_becomes_of_a_job_holds_for_both(tmp_path: Path, alone: Path) -> None:
    def record(*overrides: str) -> RunDirectory:
        config = read_config(composed(*OVERRIDES, *overrides))
        return RunDirectory(tmp_path / "rank0" / run_directory(config), config)

    stray, busy, other = record("permutation.margin=1e300", "seed=1"), record("seed=1"), record("seed=2")
    stray.directory.mkdir(parents=True)
    stray.path("stray").touch()
    with other.opened():
        other.metrics["model"] = "another"
        other.save()
    with busy.opened():
        command = ("-m", *OVERRIDES, "permutation.margin=1e300,0.05", "seed=1,2,0,0")
        code, out, err = finished(torchrun(tmp_path, *command))
    assert code == 1, err
    (folder,) = (tmp_path / "rank0" / "runs" / "sweeps").iterdir()
    jobs = kept(folder)
    reasons = {
        0: "holds no config.yaml",  # before the others have a part in it
        1: "is not finite",  # in all of them at once
        2: "is not finite",
        3: "is not finite",
        4: "is in use by another process",
        5: "began with another",  # while the others load their model
    }
    assert [job.outcome for job in jobs] == ["failed"] * 4 + ["skipped", "failed", "ran", "skipped"]
    assert all(reason in jobs[number].reason for number, reason in reasons.items())
    assert "is finished already" in err
    check_equal(alone / "run", Path(str(jobs[6].directory)))
    assert out.count("1 ran, 2 skipped, 5 failed") == out.count("outcome") == 1
    assert not list((tmp_path / "rank1").rglob("jobs"))
    assert not list((tmp_path / "rank1").rglob("metrics.json"))


def test_a_batch_that_leaves_processes_without_samples_is_refused(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "world_size", lambda: 8)
    for setting in ("permutation.batch_size=4", "calibration.samples=4"):
        config = read_config(
            composed("model=tiny", "logger=none", "permutation.batch_size=8", f"runs_dir={tmp_path}", setting)
        )
        name = setting.split("=", maxsplit=1)[0]
        with pytest.raises(ConfigError, match=rf"{setting} leaves .* of 8 processes without .*: the smallest is {name}=8"):
            job.run(config)
    assert not list(tmp_path.rglob("metrics.json"))
    assert not cache.exists()
    # A method that does not learn has no use for the other processes.
    assert job.run(read_config(composed("model=tiny", "logger=none", "permutation=heuristic", f"runs_dir={tmp_path}")))


def test_a_launcher_that_starts_processes_of_its_own_is_refused_under_torchrun(tmp_path: Path) -> None:
    command = ("-m", "model=tiny", "logger=none", "hydra/launcher=joblib", "hydra.launcher.n_jobs=1", "seed=0")
    result = run_command(*command, cwd=tmp_path, WORLD_SIZE="2")
    assert result.returncode == 1
    assert "error: torchrun's processes go through the jobs of a sweep together" in result.stderr
    assert "Traceback" not in result.stderr
