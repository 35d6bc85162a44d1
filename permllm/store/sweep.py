"""Folder of a sweep, the outcome of each of its jobs, and the GPUs of jobs in parallel."""

import atexit
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from permllm.command import exit_on_error, is_first_rank
from permllm.errors import ConfigError, DataError
from permllm.settings.composition import ONE_PLACE, SWEEP_VARIABLE
from permllm.settings.identity import digest_of
from permllm.store.files import read_json, write_json

# Variable with the folder of the sweep's outcomes. The processes of launchers get it.
FOLDER_VARIABLE = "PERMLLM_SWEEP_FOLDER"
# Variable with a folder for the processes of hydra/launcher=joblib. The folder has a lock for each
# GPU, with a name as in CUDA_VISIBLE_DEVICES.
GPUS_VARIABLE = "PERMLLM_GPUS"
# Overrides that do not change the name of the sweep.
_LEFT_OUT = ("force", "logger", "runs_dir", "hydra.launcher", "hydra/launcher")


@dataclass
class Outcome:
    """Outcome of one job, a JSON file in the sweep's folder.

    Attributes:
        overrides: words of the command line, for this job.
        outcome: `ran`, `skipped` (the run was finished, or another process runs it) or `failed`.
        reason: reason why the job was skipped or failed.
        directory: run directory; None: the run is not finished.
    """

    overrides: list[str]
    outcome: str
    reason: str = ""
    directory: str | None = None


class SweepFolder(Callback):  # type: ignore[misc]
    """Hydra's callback that names and checks a sweep before its first job."""

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        """Set the variables of the sweep, and check the sweep."""
        name = sweep_name(config.hydra)
        os.environ[SWEEP_VARIABLE] = name  # hydra.sweep.dir reads it
        folder = Path(config.hydra.sweep.dir)

        def check() -> None:
            if folder.name != name and config.runs_dir != "runs":
                raise ConfigError(f"runs_dir and hydra.sweep.dir {ONE_PLACE}")
            share_gpus(config.hydra.launcher, config.model.device)

        exit_on_error(check)  # Hydra turns other errors of a callback into warnings
        if folder.name != name:  # the user chose it
            folder = folder / "sweeps" / name
        os.environ[FOLDER_VARIABLE] = str(folder.absolute())


def sweep_name(hydra_config: Any) -> str:
    """Return the experiment, or `sweep`, and a digest of the overrides and the swept settings."""
    # An override may have ${hydra:job.num}, which has no value yet.
    words: Any = OmegaConf.to_container(hydra_config.overrides, resolve=False)
    every = sorted([*words["task"], *words["hydra"]])
    typed = [word for word in every if not word.lstrip("+~").startswith(_LEFT_OUT)]
    digest = digest_of({"typed": typed, "swept": str(hydra_config.sweeper.get("params"))})[:8]
    return f"{hydra_config.runtime.choices.get('experiment') or 'sweep'}-{digest}"


def job_name() -> str:
    """Return the number of this job in its sweep, and the words that were typed for it."""
    return f"job {HydraConfig.get().job.num + 1}: {' '.join(overrides())}"


def overrides() -> list[str]:
    """Return the overrides of this job; none outside Hydra."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def outcome_file() -> Path:
    """Return the file of this job's outcome."""
    return Path(os.environ[FOLDER_VARIABLE]) / "jobs" / f"{HydraConfig.get().job.num:04d}.json"


def remove_outcome() -> None:
    """Remove the outcome of this job from an earlier start of the same sweep, in rank 0."""
    if is_first_rank():
        outcome_file().unlink(missing_ok=True)


def write_outcome(outcome: str, reason: str = "", directory: Path | None = None) -> None:
    """Write the outcome of this job, in rank 0, and print that of a job without a result.

    The path of the run is relative, so that the sweep and its runs can be moved together.
    """
    if is_first_rank():
        file = outcome_file()
        relative = None if directory is None else os.path.relpath(directory, file.parents[1])
        write_json(file, asdict(Outcome(overrides(), outcome, reason, relative)))
        if reason:
            print(f"{job_name()}: {outcome}")


def read_outcomes(folder: Path) -> list[Outcome]:
    """Read the outcomes in a sweep's folder, sorted by job, without damaged files."""
    outcomes = []
    for file in sorted(folder.glob("jobs/*.json")):
        with suppress(DataError, TypeError):
            outcome = Outcome(**read_json(file))
            if outcome.directory:
                outcome.directory = os.path.normpath(folder / outcome.directory)
            outcomes.append(outcome)
    return outcomes


def share_gpus(launcher: Any, device: str) -> None:
    """Make the locks of the GPUs for joblib's processes. Joblib itself shares the cores.

    Raises ConfigError if the launcher does not work under torchrun, or has more jobs than GPUs.
    """
    os.environ.pop(GPUS_VARIABLE, None)
    target = launcher["_target_"]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not target.endswith(".BasicLauncher"):
        raise ConfigError(
            "under torchrun all processes run each job: expected hydra/launcher=basic"
        )
    if "joblib" not in target or device not in ("auto", "cuda"):
        return
    import torch
    from joblib import effective_n_jobs  # type: ignore[import-untyped]

    count = torch.cuda.device_count()
    if not count:
        return
    if effective_n_jobs(launcher.n_jobs) > count:
        raise ConfigError(
            f"hydra.launcher.n_jobs={launcher.n_jobs}: expected at most {count}, one per GPU"
        )
    folder = tempfile.TemporaryDirectory(prefix="permllm-gpus-")
    atexit.register(folder.cleanup)
    os.environ[GPUS_VARIABLE] = folder.name
    every = ",".join(map(str, range(count)))
    for name in (os.environ.get("CUDA_VISIBLE_DEVICES") or every).split(","):
        Path(folder.name, name).touch()


@cache  # the lock is held until the process ends
def take_gpu() -> FileLock | None:
    """Take a GPU that no other process of the sweep has, for all jobs of this process."""
    while GPUS_VARIABLE in os.environ:
        for file in sorted(Path(os.environ[GPUS_VARIABLE]).iterdir()):
            lock = FileLock(file)
            with suppress(Timeout):
                lock.acquire(timeout=0)
                os.environ["CUDA_VISIBLE_DEVICES"] = file.name  # before CUDA is used first
                return lock
        time.sleep(1)  # joblib may replace a process that has not ended yet
    return None
