"""GPUs of the processes that run the jobs of a sweep at once."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from permllm.errors import ConfigError

# A folder with a lock for each GPU, named as in CUDA_VISIBLE_DEVICES, for the processes of
# hydra/launcher=joblib.
GPUS = "PERMLLM_GPUS"
_MADE: list[tempfile.TemporaryDirectory[str]] = []  # that folder
_HELD: list[FileLock] = []  # the lock of this process's GPU


def first() -> bool:
    """Tell whether this is rank 0 of torchrun, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def share_gpus(launcher: Any, device: str) -> None:
    """Make the locks of the GPUs for joblib's processes.

    The cores are shared by joblib, which gives each process its part of the threads.

    Raises:
        ConfigError: the launcher cannot share what is there.
    """
    os.environ.pop(GPUS, None)
    target = launcher["_target_"]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not target.endswith(".BasicLauncher"):
        raise ConfigError("torchrun's processes do each job together: give hydra/launcher=basic")
    if "joblib" not in target or device not in ("auto", "cuda"):
        return
    import torch
    from joblib import effective_n_jobs  # type: ignore[import-untyped]

    if count := torch.cuda.device_count():
        if effective_n_jobs(launcher.n_jobs) > count:
            jobs = f"hydra.launcher.n_jobs={launcher.n_jobs}"
            raise ConfigError(f"{jobs}: expected at most {count}, one for each GPU")
        _MADE[:] = [tempfile.TemporaryDirectory(prefix="permllm-gpus-")]
        os.environ[GPUS] = _MADE[0].name
        every = ",".join(map(str, range(count)))
        for name in (os.environ.get("CUDA_VISIBLE_DEVICES") or every).split(","):
            Path(_MADE[0].name, name).touch()


def take_gpu() -> None:
    """Take the first GPU that no other process of the sweep has, for all jobs of this process."""
    while GPUS in os.environ and not _HELD:
        for file in sorted(Path(os.environ[GPUS]).iterdir()):
            lock = FileLock(file)
            with suppress(Timeout):
                lock.acquire(timeout=0)  # until the process ends
                _HELD.append(lock)
                os.environ["CUDA_VISIBLE_DEVICES"] = file.name  # before CUDA is used first
                return
        time.sleep(1)  # for a process that joblib replaces and that is about to end
