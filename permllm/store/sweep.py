"""Folder of a sweep, its list of jobs, and the outcome of each job."""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from permllm.errors import ConfigError, DataError
from permllm.settings.identity import digest_of
from permllm.store.files import read_json, write_json
from permllm.store.launched import first, share_gpus

# Variable with the name of the sweep. The processes of launchers get it, and conf/config.yaml uses
# it for hydra.sweep.dir.
VARIABLE = "PERMLLM_SWEEP"
# Overrides that do not change the name of the sweep.
_LEFT_OUT = ("force", "logger", "runs_dir", "paths", "hydra.launcher", "hydra/launcher")
_ONE_PLACE = "are the same setting: give one of them"
STARTED: list[Path] = []  # the folder of the sweep that this process started


@dataclass
class Outcome:
    """Outcome of one job, a JSON file in the sweep's folder."""

    overrides: list[str]  # of the command line, for this job
    outcome: str  # ran, skipped (the run was finished, or another process runs it) or failed
    reason: str = ""  # why the job was skipped or failed
    directory: str | None = None  # run directory; None: the run is not finished


class SweepFolder(Callback):  # type: ignore[misc]
    """Hydra's callback that names and checks a sweep before its first job."""

    def on_multirun_start(
        self, config: DictConfig, config_name: str | None = None, **_: Any
    ) -> None:
        """Set the variable with the sweep's name, and check the sweep."""
        os.environ[VARIABLE] = sweep_name(config.hydra)
        folder = folder_of(config.hydra)
        try:
            if config.runs_dir != config.paths.runs_dir and folder != Path(config.hydra.sweep.dir):
                raise ConfigError(f"runs_dir and hydra.sweep.dir {_ONE_PLACE}")
            _check_texts(config_name, _jobs(config.hydra))
            share_gpus(config.hydra.launcher, config.model.device)
        except ConfigError as error:  # Hydra turns other errors of a callback into warnings
            raise SystemExit(f"error: {error}" if first() else 1) from error
        STARTED[:] = [folder]


def sweep_name(hydra: Any) -> str:
    """Return the experiment, or `sweep`, and a digest of the overrides and the swept settings."""
    # An override may have ${hydra:job.num}, which has no value yet.
    words: Any = OmegaConf.to_container(hydra.overrides, resolve=False)
    every = sorted([*words["task"], *words["hydra"]])
    typed = [word for word in every if not word.lstrip("+~").startswith(_LEFT_OUT)]
    digest = digest_of({"typed": typed, "swept": str(hydra.sweeper.get("params"))})[:8]
    return f"{hydra.runtime.choices.get('experiment') or 'sweep'}-{digest}"


def folder_of(hydra: Any) -> Path:
    """Return the folder of the outcomes: `hydra.sweep.dir`, or a subfolder if the user sets it."""
    folder = Path(hydra.sweep.dir)
    name = os.environ[VARIABLE]
    return folder if folder.name == name else folder / "sweeps" / name


def labels(jobs: list[list[str]]) -> list[str]:
    """Return for each job its overrides without those that all jobs share."""
    shared = set.intersection(*map(set, jobs))
    return [" ".join(word for word in job if word not in shared) for job in jobs]


def sweeping() -> bool:
    """Tell if this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def overrides() -> list[str]:
    """Return the overrides of this job; none outside Hydra."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def place(composed: DictConfig) -> DictConfig:
    """Return a job's settings with the directories of `hydra.run.dir` or `hydra.sweep.dir`."""
    if not HydraConfig.initialized():
        return composed
    hydra = HydraConfig.get()
    directories = {}
    if sweeping():
        if folder_of(hydra) != Path(hydra.sweep.dir):
            directories["runs_dir"] = hydra.sweep.dir
        if hydra.sweep.subdir != ".":
            directories["run_dir"] = str(Path(hydra.sweep.dir) / hydra.sweep.subdir)
    elif hydra.run.dir != ".":
        if composed.run_dir is not None:
            raise ConfigError(f"run_dir and hydra.run.dir {_ONE_PLACE}")
        directories["run_dir"] = hydra.run.dir
    merged: Any = OmegaConf.merge(composed, directories)
    return composed if composed.run_dir is not None else merged


def outcome_file() -> Path:
    """Return the file of this job's outcome."""
    return folder_of(HydraConfig.get()) / "jobs" / f"{HydraConfig.get().job.num:04d}.json"


def keep(job: Outcome) -> None:
    """Write the outcome of this job.

    The path of the run is relative, so that the sweep and its runs can be moved together.
    """
    file = outcome_file()
    directory = None if job.directory is None else os.path.relpath(job.directory, file.parents[1])
    write_json(file, asdict(job) | {"directory": directory})


def kept(folder: Path) -> list[Outcome]:
    """Read the outcomes in a sweep's folder, sorted by job, without damaged files."""
    jobs = []
    for file in sorted(folder.glob("jobs/*.json")):
        with suppress(DataError, TypeError):
            job = Outcome(**read_json(file))
            if job.directory:
                job.directory = os.path.normpath(folder / job.directory)
            jobs.append(job)
    return jobs


def _jobs(hydra: Any) -> list[list[str]]:
    """Return the overrides of each job; none for a sweeper that chooses them later."""
    if not hydra.sweeper["_target_"].endswith(".BasicSweeper"):
        return []
    typed: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    words = [*(f"{key}={value}" for key, value in (hydra.sweeper.params or {}).items()), *typed]
    loader = GlobalHydra.instance().config_loader()  # for globs of options
    parsed = OverridesParser.create(config_loader=loader).parse_overrides(words)
    return BasicSweeper.split_arguments(parsed, None)[0]


def _check_texts(config_name: str | None, jobs: list[list[str]]) -> None:
    """Raise ConfigError if the models of a sweep have different texts and so cannot be compared."""
    of_model = {word: job for job in jobs for word in job if word.startswith("model=")}
    if len(of_model) < 2:
        return
    texts = {}
    loader = GlobalHydra.instance().config_loader()
    for model, job in of_model.items():
        config = loader.load_configuration(config_name, job, run_mode=RunMode.RUN)
        texts[model] = " and ".join(
            str(part.data_files or part.dataset)
            for part in (config.calibration, config.evaluation.perplexity)
        )
    if len(set(texts.values())) > 1:
        listed = "; ".join(f"{model} {text}" for model, text in texts.items())
        raise ConfigError(
            f"the models of this sweep have different texts ({listed}): "
            "give protocol=offline or protocol=paper, or calibration= and evaluation="
        )
