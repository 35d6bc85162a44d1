"""GPUs of the processes that run the jobs of a sweep in parallel."""

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from permllm.errors import ConfigError

# Variable with a folder for the processes of hydra/launcher=joblib. The folder has a lock for each
# GPU, with a name as in CUDA_VISIBLE_DEVICES.
GPUS = "PERMLLM_GPUS"
_MADE: list[tempfile.TemporaryDirectory[str]] = []  # the folder of this process
_HELD: list[FileLock] = []  # the lock of the GPU of this process


def first() -> bool:
    """Tell if this is rank 0 of torchrun, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def share_gpus(launcher: Any, device: str) -> None:
    """Make the locks of the GPUs for joblib's processes. Joblib itself shares the cores.

    Raises:
        ConfigError: the launcher does not work under torchrun, or has more jobs than GPUs.
    """
    os.environ.pop(GPUS, None)
    target = launcher["_target_"]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not target.endswith(".BasicLauncher"):
        raise ConfigError(
            "under torchrun all processes run each job: expected hydra/launcher=basic"
        )
    if "joblib" not in target or device not in ("auto", "cuda"):
        return
    import torch
    from joblib import effective_n_jobs  # type: ignore[import-untyped]

    if count := torch.cuda.device_count():
        if effective_n_jobs(launcher.n_jobs) > count:
            raise ConfigError(
                f"hydra.launcher.n_jobs={launcher.n_jobs}: expected at most {count}, one per GPU"
            )
        _MADE[:] = [tempfile.TemporaryDirectory(prefix="permllm-gpus-")]
        os.environ[GPUS] = _MADE[0].name
        every = ",".join(map(str, range(count)))
        for name in (os.environ.get("CUDA_VISIBLE_DEVICES") or every).split(","):
            Path(_MADE[0].name, name).touch()


def take_gpu() -> None:
    """Take a GPU that no other process of the sweep has, for all jobs of this process."""
    while GPUS in os.environ and not _HELD:
        for file in sorted(Path(os.environ[GPUS]).iterdir()):
            lock = FileLock(file)
            with suppress(Timeout):
                lock.acquire(timeout=0)  # until the process ends
                _HELD.append(lock)
                os.environ["CUDA_VISIBLE_DEVICES"] = file.name  # before CUDA is used first
                return
        time.sleep(1)  # joblib may replace a process that has not ended yet
