"""GPUs and cores of the processes that run the jobs of a sweep at once."""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from permllm.errors import ConfigError

# A folder with a lock for each GPU, named as in CUDA_VISIBLE_DEVICES, for the processes of hydra/launcher=joblib.
GPUS = "PERMLLM_GPUS"
_MADE: list[tempfile.TemporaryDirectory[str]] = []  # that folder
_HELD: list[FileLock] = []  # the lock of this process's GPU


def first() -> bool:
    """Tell whether this is rank 0 of torchrun, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def share_gpus(launcher: Any, device: str) -> None:
    """Make the locks of the GPUs for joblib's processes. Raises ConfigError where the launcher cannot share what is there."""
    os.environ.pop(GPUS, None)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not launcher["_target_"].endswith(".BasicLauncher"):
        raise ConfigError("torchrun's processes go through the jobs of a sweep together: hydra/launcher=basic")
    at_once = _at_once(launcher)
    if not at_once or device not in ("auto", "cuda"):
        return
    import torch

    if count := torch.cuda.device_count():
        if at_once > count:
            raise ConfigError(f"hydra.launcher.n_jobs={launcher.n_jobs}: expected at most {count}, one for each GPU")
        _MADE[:] = [tempfile.TemporaryDirectory(prefix="permllm-gpus-")]
        os.environ[GPUS] = _MADE[0].name
        for name in (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(","):
            Path(_MADE[0].name, name).touch()


def share_machine() -> None:
    """Give a process of joblib a GPU of its own and its share of the cores, before its first job."""
    from hydra.core.hydra_config import HydraConfig

    if at_once := _at_once(HydraConfig.get().launcher):
        import torch

        from permllm.runtime.devices import cores

        take_gpu()
        torch.set_num_threads(max(1, cores() // at_once))


def take_gpu() -> None:
    """Take the first GPU that no other process of the sweep has, for all jobs of this process."""
    while GPUS in os.environ and not _HELD:
        for file in sorted(Path(os.environ[GPUS]).iterdir()):
            lock = FileLock(file)
            with suppress(Timeout):
                lock.acquire(timeout=0)  # until the process ends
                _HELD.append(lock)
                os.environ["CUDA_VISIBLE_DEVICES"] = file.name  # CUDA reads it when it is used first
                return
        time.sleep(1)  # for a process that joblib replaces and that is about to end


def _at_once(launcher: Any) -> int:
    """Return the jobs that joblib runs at once; 0 for another launcher."""
    if "joblib" not in launcher["_target_"]:
        return 0
    from permllm.runtime.devices import cores  # imports torch

    count = int(launcher.get("n_jobs") or 1)
    return count if count > 0 else max(1, cores() + 1 + count)  # joblib: -1 is all cores, -2 all but one
