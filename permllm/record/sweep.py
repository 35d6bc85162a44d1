"""What the jobs of a sweep share, in whatever process a launcher runs them: the sweep's folder, a file of each outcome."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from permllm.record.files import write_record
from permllm.record.outcomes import JOBS, Job, kept

# Set before the jobs start: launchers hand it on to their processes, and conf/config.yaml builds hydra.sweep.dir with it.
VARIABLE = "PERMLLM_SWEEP"
# What does not make a sweep another one.
_LEFT_OUT = ("force", "plan", "logger", "runs_dir", "paths", "hydra.launcher", "hydra/launcher")
# What conf/config.yaml has for hydra.run.dir and hydra.sweep.subdir, and below runs_dir for hydra.sweep.dir.
_HERE, _SWEEPS = ".", "sweeps"
# Of the sweep that this process started.
_STARTED: list[tuple[Path, float]] = []


class SweepFolder(Callback):  # type: ignore[misc]
    """Hydra's callback that names the sweep before its first job: the same command, the same folder."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Set the variable that `hydra.sweep.dir` is built from. The same command has the same jobs, which write anew."""
        os.environ[VARIABLE] = sweep_name(config)
        _STARTED[:] = [(Path(config.hydra.sweep.dir), time.time())]


def sweep_name(config: DictConfig) -> str:
    """The experiment, or `sweep`, and a digest of what was typed."""
    hydra = config.hydra
    typed = [word for word in [*hydra.overrides.task, *hydra.overrides.hydra] if not word.lstrip("+~").startswith(_LEFT_OUT)]
    digest = hashlib.sha256(json.dumps(sorted(typed)).encode()).hexdigest()[:8]
    return f"{hydra.runtime.choices.get('experiment') or 'sweep'}-{digest}"


def outcomes() -> list[Job]:
    """Of the sweep that this process started, what has come of its jobs since; nothing for a single job."""
    return kept(_STARTED[0][0], _STARTED[0][1]) if _STARTED else []


def sweeping() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def overrides() -> list[str]:
    """What was typed for this job; nothing outside of Hydra."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def place_record(composed: DictConfig) -> DictConfig:
    """The settings of a job with the record where `hydra.run.dir` or `hydra.sweep.dir` says, where these were given.

    `run_dir` and `runs_dir` are what Hydra's users know as these two: a run directory of its own, and the folder of several.
    """
    if not HydraConfig.initialized() or composed.run_dir is not None:
        return composed
    hydra = HydraConfig.get()
    if not sweeping():
        given = {} if hydra.run.dir == _HERE else {"run_dir": hydra.run.dir}
    elif hydra.sweep.subdir != _HERE:
        given = {"run_dir": str(Path(hydra.sweep.dir) / hydra.sweep.subdir)}
    else:
        usual = Path(composed.runs_dir) / _SWEEPS
        given = {} if Path(hydra.sweep.dir).parent == usual else {"runs_dir": hydra.sweep.dir}
    return OmegaConf.merge(composed, given)  # type: ignore[return-value]


def keep(job: Job) -> None:
    """Write a job's outcome into the sweep's folder, for the process that waits for all of them."""
    hydra = HydraConfig.get()
    folder = Path(hydra.sweep.dir)
    values = asdict(job)
    if job.directory is not None:
        # From the sweep's folder, so that all of it can be moved, and read from anywhere.
        values["directory"] = os.path.relpath(job.directory, folder)
    write_record(folder / JOBS / f"{hydra.job.num:04d}.json", values)


def launched_elsewhere() -> bool:
    """Whether a launcher runs the jobs of the sweep in processes other than the one that was started."""
    return not str(HydraConfig.get().launcher.get("_target_", "")).endswith(".BasicLauncher")


def share_cores() -> None:
    """Give this process its share of the cores where a launcher runs several jobs of one machine at a time."""
    launcher = HydraConfig.get().launcher
    if "joblib" not in str(launcher.get("_target_", "")):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    at_once = int(launcher.get("n_jobs") or 1)
    at_once = at_once if at_once > 0 else max(1, cores + 1 + at_once)  # joblib: -1 is all of them, -2 all but one
    import torch  # not at the top: Hydra reads this module to answer --help

    torch.set_num_threads(max(1, cores // at_once))
