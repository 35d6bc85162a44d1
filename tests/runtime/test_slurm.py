"""A real SLURM of one node: a sweep, a job that is put back in its middle, torchrun in a step."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from permllm.store.sweep import read_outcomes
from tests.conftest import ROOT

pytestmark = pytest.mark.slow
TINY = ("model=tiny-random", "logger=none", "permutation.epochs=1", "evaluation.perplexity.limit=2")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Yield the environment of commands that find a running SLURM."""
    path, names = f"{os.environ['PATH']}:/usr/sbin", ("munged", "slurmctld", "slurmd")
    missing = [name for name in names if shutil.which(name, path=path) is None]
    if missing or os.geteuid():
        text = f"needs root, slurm-wlm and munge: without {', '.join(missing) or 'root'}"
        if os.environ.get("CI"):
            pytest.fail(text)
        pytest.skip(text)
    folder = tmp_path_factory.mktemp("slurm")
    script = str(Path(__file__).with_name("slurm_here.sh"))
    try:
        said = subprocess.run(
            [script, "start", str(folder)], check=True, capture_output=True, text=True, timeout=60
        ).stdout
        name, _, value = said.split()[1].partition("=")
        yield os.environ | {name: value, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    finally:
        subprocess.run([script, "stop", str(folder)], check=True, timeout=60)


def started(slurm: dict[str, str], cwd: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        words, cwd=cwd, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen[str]) -> str:
    """Return the output of a process, once it has ended well."""
    try:
        out, err = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 0, err
    return out


def waited(what: str, found: Callable[[], object], process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if found():
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    pytest.fail(f"{what} never came")


def test_a_sweep_whose_job_is_put_back_in_its_middle_and_the_same_command_again(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    # Steps of a model of two narrow layers, enough of them to be met in the middle.
    command = [sys.executable, str(ROOT / "run.py"), "-m", *TINY, "permutation=lcp"]
    command += ["permutation.epochs=400", "seed=0,1", "hydra/launcher=submitit_slurm"]
    command += ["hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=30"]
    sweep = started(slurm, tmp_path, *command)
    waited("a checkpoint", lambda: len(list(tmp_path.glob("runs/*/lcp*.pt"))) == 2, sweep)
    queue = ["squeue", "--noheader", "--format=%i"]
    jobs = subprocess.run(queue, env=slurm, check=True, capture_output=True, text=True)
    first = min(jobs.stdout.split())
    subprocess.run(["scontrol", "requeue", first], env=slurm, check=True)
    assert "2 ran" in ended(sweep)
    logs = {path.parent.name: path.read_text() for path in tmp_path.glob("runs/*/*.log")}
    assert sorted("continuing after step" in text for text in logs.values()) == [False, True]
    for path in tmp_path.glob("runs/*/metrics.json"):
        assert json.loads(path.read_text())["perplexity"]["sparse"]
    assert "2 skipped" in ended(started(slurm, tmp_path, *command))
    (folder,) = (tmp_path / "runs" / "sweeps").iterdir()
    assert [job.outcome for job in read_outcomes(folder)] == ["skipped", "skipped"]


def test_torchrun_in_a_step_of_srun_starts_ranks_that_learn_together(
    slurm: dict[str, str], tmp_path: Path
) -> None:
    command = ["srun", "--ntasks=1", "--cpus-per-task=2", sys.executable, "-m"]
    command += ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [str(ROOT / "run.py"), *TINY, "permutation=lcp", "permutation.batch_size=2"]
    ended(started(slurm, tmp_path, *command))
    (record,) = tmp_path.glob("runs/*/environment.json")
    assert json.loads(record.read_text())["hardware"]["processes"] == 2
    assert json.loads(record.with_name("metrics.json").read_text())["perplexity"]["sparse"]
