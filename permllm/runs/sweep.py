"""What the jobs of a sweep share, in whatever process a launcher runs them: the sweep's folder, a file of each outcome."""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import islice, product
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from permllm.runs.files import write_record
from permllm.runs.outcomes import JOBS, Outcome, kept, kept_files

# Set before the jobs start: launchers hand it on to their processes, and conf/config.yaml builds hydra.sweep.dir with it.
VARIABLE = "PERMLLM_SWEEP"
# What does not make a sweep another one.
_LEFT_OUT = ("force", "plan", "logger", "runs_dir", "paths", "hydra.launcher", "hydra/launcher")
# What conf/config.yaml has for hydra.run.dir and hydra.sweep.subdir, and below runs_dir for hydra.sweep.dir.
_HERE, _SWEEPS = ".", "sweeps"
# A sweep of more jobs says so before it starts; this many are listed.
_SAID_FROM, _SCREEN = 10, 20
# Of the sweep that this process started.
_STARTED: list[tuple[Path, float]] = []


class SweepFolder(Callback):  # type: ignore[misc]
    """Hydra's callback that names the sweep before its first job: the same command, the same folder."""

    def on_multirun_start(self, config: DictConfig, config_name: str | None = None, **_: Any) -> None:
        """Set the variable that `hydra.sweep.dir` is built from. The same command has the same folder; its jobs write anew.

        Raises:
            SystemExit: with code 1, after a line, where the models of the sweep have other texts: Hydra takes any other error
                of a callback for a warning.
        """
        os.environ[VARIABLE] = sweep_name(config)
        _STARTED[:] = [(Path(config.hydra.sweep.dir), time.time())]
        axes = axes_of(config)
        first = os.environ.get("RANK", "0") == "0"  # of torchrun's processes
        planned = any(word.lower() in ("plan=true", "plan=1") for word in axes.get("plan", []))
        if first and axes and not planned:
            forget(_STARTED[0][0], [_telling(words) for words in product(*axes.values())])
        if reason := _different_texts(config_name, axes):
            if first:
                print(f"error: {reason}", file=sys.stderr)
            raise SystemExit(1)
        if first and math.prod(map(len, axes.values())) > _SAID_FROM:
            print("\n".join(_listed(axes)), file=sys.stderr)


def sweep_name(config: DictConfig) -> str:
    """The experiment, or `sweep`, and a digest of what was typed."""
    hydra = config.hydra
    typed = _telling([*hydra.overrides.task, *hydra.overrides.hydra])
    digest = hashlib.sha256(json.dumps(typed).encode()).hexdigest()[:8]
    return f"{hydra.runtime.choices.get('experiment') or 'sweep'}-{digest}"


def _telling(words: Iterable[str]) -> list[str]:
    """Of what is typed, what tells a sweep, or a job of one, from another; sorted."""
    return sorted(word for word in words if not word.lstrip("+~").startswith(_LEFT_OUT))


def forget(folder: Path, jobs: list[list[str]]) -> None:
    """Remove the outcomes of an earlier version of a sweep: of an experiment whose jobs were others.

    Args:
        folder: of the sweep.
        jobs: what tells each of its jobs from the others now.
    """
    for file, job in kept_files(folder):
        if _telling(job.overrides) not in jobs:
            words = " ".join(job.overrides)
            print(f"{words} is no job of this sweep any more: its run stays, outside of the sweep's tables", file=sys.stderr)
            file.unlink(missing_ok=True)


def axes_of(config: DictConfig) -> dict[str, list[str]]:
    """What is typed, or an experiment says, for each key of a sweep; nothing where another sweeper than Hydra's draws it."""
    hydra = config.hydra
    if not str(hydra.sweeper.get("_target_", "")).endswith(".BasicSweeper"):
        return {}
    given = [f"{key}={value}" for key, value in (hydra.sweeper.get("params") or {}).items()]
    axes = {}
    # A glob asks it which options there are.
    loader = GlobalHydra.instance().config_loader() if GlobalHydra.instance().is_initialized() else None
    for override in OverridesParser.create(config_loader=loader).parse_overrides([*given, *hydra.overrides.task]):
        key = override.get_key_element()
        if override.is_sweep_override():
            axes[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            axes[key] = [f"{key}={override.get_value_element_as_str()}"]
    return axes


def _listed(axes: dict[str, list[str]]) -> Iterator[str]:
    """How many jobs there are and which, at most a screen of them, by what varies between them."""
    varying = [values for values in axes.values() if len(values) > 1]
    count = math.prod(map(len, varying))
    yield f"{count} jobs:"
    yield from (f"  {' '.join(words)}" for words in islice(product(*varying), _SCREEN))
    if count > _SCREEN:
        yield f"  and {count - _SCREEN} more"


def _different_texts(config_name: str | None, axes: dict[str, list[str]]) -> str:
    """Why a sweep over models compares what cannot be compared: the texts that they choose differ; empty where they do not."""
    models = axes.get("model", [])
    if len(models) < 2:
        return ""
    others = [values[0] for key, values in axes.items() if key != "model"]
    loader = GlobalHydra.instance().config_loader()
    texts = {}
    for model in models:
        config = loader.load_configuration(config_name, [*others, model], run_mode=RunMode.RUN)
        calibration, perplexity = config.calibration, config.evaluation.perplexity
        texts[model] = tuple(_text_of(part) for part in (calibration, perplexity))
    if len(set(texts.values())) == 1:
        return ""
    said = "; ".join(f"{model} {calibration} and {perplexity}" for model, (calibration, perplexity) in texts.items())
    return (
        f"the models of this sweep have texts of their own, to calibrate and to evaluate on: {said}. What is measured on "
        "different texts cannot be compared: give protocol=offline or protocol=paper, or calibration= and evaluation="
    )


def _text_of(part: Any) -> str:
    name = part.data_files or part.dataset
    return str(name) if isinstance(name, str | None) else ", ".join(map(str, name))


def outcomes() -> list[Outcome]:
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


def keep(job: Outcome) -> None:
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
    import torch  # not at the top: Hydra reads this module to answer --help

    from permllm.runtime.devices import cores

    at_once = int(launcher.get("n_jobs") or 1)
    at_once = at_once if at_once > 0 else max(1, cores() + 1 + at_once)  # joblib: -1 is all of them, -2 all but one
    torch.set_num_threads(max(1, cores() // at_once))
