"""Folder of a sweep, its list of jobs, and the GPU and cores of each job."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from permllm.errors import ConfigError
from permllm.runs import outcomes
from permllm.runs.outcomes import Outcome

# The sweep's name. Launchers hand it on to their processes, and conf/config.yaml builds hydra.sweep.dir with it.
VARIABLE = "PERMLLM_SWEEP"
# A folder with a lock for each GPU, named as in CUDA_VISIBLE_DEVICES, for the processes of hydra/launcher=joblib.
GPUS = "PERMLLM_GPUS"
# Words that do not make a sweep another one.
_LEFT_OUT = ("force", "logger", "runs_dir", "paths", "hydra.launcher", "hydra/launcher")
# A longer sweep lists its jobs before it starts, and at most so many.
_SAID_FROM, _SCREEN = 10, 20
# The folder of the sweep that this process started, and that of its GPUs; the lock of this process's GPU.
_STARTED: list[Path] = []
_LOCKS: list[tempfile.TemporaryDirectory[str]] = []
_HELD: list[FileLock] = []


class SweepFolder(Callback):  # type: ignore[misc]
    """Hydra's callback that names and checks the sweep before its first job."""

    def on_multirun_start(self, config: DictConfig, config_name: str | None = None, **_: Any) -> None:
        """Set the variable that `hydra.sweep.dir` is built from, and list a long sweep's jobs.

        Raises:
            SystemExit: with code 1, after a line. Hydra takes any other error of a callback for a warning.
        """
        os.environ[VARIABLE] = sweep_name(config)
        jobs = jobs_of(config)
        try:
            check_places(config.hydra)
            _check_texts(config_name, jobs)
            share_gpus(config)
        except ConfigError as error:
            if first():
                print(f"error: {error}", file=sys.stderr)
            raise SystemExit(1) from error
        _STARTED[:] = [folder_of(config.hydra)]
        if first() and len(jobs) > _SAID_FROM:
            more = [f"and {len(jobs) - _SCREEN} more"] if len(jobs) > _SCREEN else []
            print(f"{len(jobs)} jobs:", *labels(jobs)[:_SCREEN], *more, sep="\n  ", file=sys.stderr)


def first() -> bool:
    """Tell whether this is the first of the processes of torchrun, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def sweep_name(config: DictConfig) -> str:
    """Return the experiment, or `sweep`, and a digest of the typed words and of what the experiment sweeps."""
    typed = sorted(word for word in _typed(config.hydra) if not word.lstrip("+~").startswith(_LEFT_OUT))
    digest = hashlib.sha256(json.dumps([typed, _axes(config.hydra)]).encode()).hexdigest()[:8]
    return f"{config.hydra.runtime.choices.get('experiment') or 'sweep'}-{digest}"


def _typed(hydra: Any, kinds: Sequence[str] = ("task", "hydra")) -> list[str]:
    words: Any = OmegaConf.to_container(hydra.overrides, resolve=False)  # a word may hold ${hydra:job.num}
    return [word for kind in kinds for word in words[kind]]


def _axes(hydra: Any) -> list[str]:
    """Return the words that an experiment sweeps."""
    sweeper: Any = OmegaConf.to_container(hydra.sweeper, resolve=False)
    return [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]


def folder_of(hydra: Any) -> Path:
    """Return the folder of the sweep's outcomes, which lies in a `hydra.sweep.dir` that was typed."""
    folder, name = Path(hydra.sweep.dir), os.environ[VARIABLE]
    return folder if folder.name == name else folder / "sweeps" / name


def jobs_of(config: DictConfig) -> list[list[str]]:
    """Return the words of each job; none for a sweeper other than Hydra's own, which draws them later."""
    if not str(config.hydra.sweeper.get("_target_", "")).endswith(".BasicSweeper"):
        return []
    words = [*_axes(config.hydra), *_typed(config.hydra, ["task"])]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())  # a glob asks for the options
    return BasicSweeper.split_arguments(parser.parse_overrides(words), None)[0]


def labels(jobs: Sequence[Sequence[str]]) -> list[str]:
    """Return the words of each job that not all jobs have."""
    shared = set.intersection(*map(set, jobs))
    return [" ".join(word for word in job if word not in shared) for job in jobs]


def check_places(hydra: Any) -> None:
    """Raise ConfigError where a setting of ours and one of Hydra's name the same place."""
    typed = {word.lstrip("+").partition("=")[0] for word in _typed(hydra)}
    for ours, other in (("run_dir", "hydra.run.dir"), ("runs_dir", "hydra.sweep.dir")):
        if {ours, other} <= typed:
            raise ConfigError(f"{ours} and {other} are the same setting: give one of them")


def _check_texts(config_name: str | None, jobs: list[list[str]]) -> None:
    """Raise ConfigError where the models of a sweep choose different texts, on which they cannot be compared."""
    models = dict.fromkeys(word for job in jobs for word in job if word.startswith("model="))
    texts = {}
    for model in models if len(models) > 1 else ():
        words = [*(word for word in jobs[0] if not word.startswith("model=")), model]
        config = GlobalHydra.instance().config_loader().load_configuration(config_name, words, run_mode=RunMode.RUN)
        parts = (config.calibration, config.evaluation.perplexity)
        texts[model] = " and ".join(str(part.data_files or part.dataset) for part in parts)
    if len(set(texts.values())) > 1:
        said = "; ".join(f"{model} {text}" for model, text in texts.items())
        raise ConfigError(
            f"the models of this sweep have texts of their own, to calibrate and to evaluate on: {said}: give "
            "protocol=offline or protocol=paper, or calibration= and evaluation="
        )


def _at_once(launcher: Any) -> int:
    """Return the jobs that joblib runs at once; 0 for another launcher."""
    if "joblib" not in str(launcher.get("_target_", "")):
        return 0
    from permllm.runtime.devices import cores  # imports torch

    count = int(launcher.get("n_jobs") or 1)
    return count if count > 0 else max(1, cores() + 1 + count)  # joblib: -1 is all cores, -2 all but one


def share_gpus(config: DictConfig) -> None:
    """Make the locks of the GPUs for the processes of joblib.

    Raises:
        ConfigError: there are more jobs at once than GPUs, or torchrun's processes would have a launcher each.
    """
    os.environ.pop(GPUS, None)
    launcher = config.hydra.launcher
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not str(launcher.get("_target_", "")).endswith(".BasicLauncher"):
        raise ConfigError("torchrun's processes go through the jobs of a sweep together: hydra/launcher=basic")
    at_once = _at_once(launcher)
    if not at_once or config.model.device not in ("auto", "cuda"):
        return
    import torch

    count = torch.cuda.device_count()
    if at_once > count > 0:
        raise ConfigError(f"hydra.launcher.n_jobs={launcher.n_jobs}: expected at most {count}, one for each GPU")
    if count:
        _LOCKS[:] = [tempfile.TemporaryDirectory(prefix="permllm-gpus-")]
        os.environ[GPUS] = _LOCKS[0].name
        for name in (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))).split(","):
            Path(_LOCKS[0].name, name).touch()


def share_machine() -> None:
    """Give a process of joblib a GPU of its own and its share of the cores, before a job."""
    if at_once := _at_once(HydraConfig.get().launcher):
        take_gpu()
        import torch

        from permllm.runtime.devices import cores

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


def of_sweep() -> list[Outcome]:
    """Return the outcomes of the sweep that this process started; none for a single job."""
    return outcomes.kept(_STARTED[0]) if _STARTED else []


def sweeping() -> bool:
    """Tell whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def overrides() -> list[str]:
    """Return the words that were typed for this job; none outside of Hydra."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def place(composed: DictConfig) -> DictConfig:
    """Return the settings of a job with its run directory where `hydra.run.dir` or `hydra.sweep.dir` says, where given."""
    if not HydraConfig.initialized():
        return composed
    hydra = HydraConfig.get()
    check_places(hydra)
    if composed.run_dir is not None:
        return composed
    if not sweeping():
        given = {} if hydra.run.dir == "." else {"run_dir": hydra.run.dir}
    elif hydra.sweep.subdir != ".":
        given = {"run_dir": str(Path(hydra.sweep.dir) / hydra.sweep.subdir)}
    else:
        given = {} if Path(hydra.sweep.dir).name == os.environ[VARIABLE] else {"runs_dir": hydra.sweep.dir}
    return OmegaConf.merge(composed, given)  # type: ignore[return-value]


def forget() -> None:
    """Forget the earlier outcome of this job."""
    outcomes.file_of(folder_of(HydraConfig.get()), HydraConfig.get().job.num).unlink(missing_ok=True)


def keep(job: Outcome) -> None:
    """Keep this job's outcome for the process that waits for all of them."""
    outcomes.keep(job, folder_of(HydraConfig.get()), HydraConfig.get().job.num)
