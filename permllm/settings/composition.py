"""Composition of the settings in `conf/` by Hydra, and the settings of a job that Hydra started."""

import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from importlib import resources
from inspect import signature
from pathlib import Path
from typing import Any

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from permllm.errors import ConfigError, first_line
from permllm.settings.config import METHOD_GROUPS, RunConfig, read_config
from permllm.settings.options import conf_directory, groups, help_of_groups
from permllm.settings.values import flatten

# Variable with the name of the sweep. The processes of launchers get it, and conf/config.yaml uses
# it for hydra.sweep.dir.
SWEEP_VARIABLE = "PERMLLM_SWEEP"
ONE_PLACE = "are the same setting: give one of them"

# Hydra 1.4 has only one version base, and asks which classes settings may name. They may name any
# class, because the user who starts the job writes the settings.
_ANY_CLASS: Any = getattr(hydra.utils, "UNSAFE_DISABLE_EXECUTION_CHECKS", None)
HYDRA_DEFAULTS: dict[str, Any] = {} if _ANY_CLASS else {"version_base": "1.3"}
HYDRA_MAIN = HYDRA_DEFAULTS | ({"execution_whitelist": _ANY_CLASS} if _ANY_CLASS else {})


# Ends of Hydra's messages: folders of the machine, and the advice to append a key, which only
# `model.architecture` allows.
_ADVICE = re.compile(r"Config search path:|To append to your ")
# Least likeness of a key to the typed one, from 0 to 1, with which an error names it, and largest
# number of keys that it names because only their group is missing.
_LIKE = 0.8
_MOST_NAMED = 3


def register_resolvers() -> None:
    """Register the resolvers of `conf/` with OmegaConf.

    `nm:PATTERN`: N:M for a file name (`2:4` as `2x4`). `last:PATH`: the last name in a path.
    `packaged:PATH`: a path inside the package.
    `either:VALUE,CASE,A,B`: A if VALUE is CASE, or is in the list CASE; otherwise B.
    `windows_of:TOKENS`: windows of calibration text for so many tokens, at least 128.
    `learning_steps:SHARE` and `learning_windows:SHARE`: steps of a method that learns, and windows
    of text for it, so that it reads `budget.tokens`; without them its share of `budget.steps` and
    `budget.learning_windows`; null if these are not given either.
    `help:PLACES`: the options of all groups.
    """
    resolvers: dict[str, Callable[..., Any]] = {
        "either": _either,
        "help": help_of_groups,
        "nm": lambda pattern: str(pattern).replace(":", "x"),
        "packaged": lambda path: str(resources.files("permllm") / path),
        "last": lambda path: os.path.basename(os.path.abspath(str(path))),
        "learning_steps": _learning_steps,
        "learning_windows": _learning_windows,
        "windows_of": _windows_of,
    }
    # The function that can replace a resolver has another name since version 2.4.
    new = "replace" in signature(OmegaConf.register_resolver).parameters
    register: Any = OmegaConf.register_resolver if new else OmegaConf.register_new_resolver
    for name, resolver in resolvers.items():
        register(name, resolver, replace=True)


def _either(value: Any, case: Any, a: Any, b: Any) -> Any:
    return a if value in (case if isinstance(case, list) else [case]) else b


def _windows_of(tokens: int, *, _root_: DictConfig) -> int:
    return max(128, math.ceil(tokens / _root_.calibration.seqlen))


def _learning_windows(share: float, *, _root_: DictConfig) -> int | None:
    tokens = OmegaConf.select(_root_, "budget.tokens")
    if tokens is not None:
        return math.ceil(tokens / _root_.calibration.seqlen)
    windows = OmegaConf.select(_root_, "budget.learning_windows")
    return None if windows is None else round(windows * share)


def _learning_steps(share: float, *, _parent_: DictConfig, _root_: DictConfig) -> int | None:
    if OmegaConf.select(_root_, "budget.tokens") is not None:
        windows = _learning_windows(share, _root_=_root_)
        return math.ceil(windows / _parent_.batch_size)
    steps = OmegaConf.select(_root_, "budget.steps")
    return None if steps is None else round(steps * share)


def sweeping() -> bool:
    """Tell if this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def job_config(composed: DictConfig) -> RunConfig:
    """Return the checked settings of a job that Hydra started.

    `hydra.run.dir` becomes `run_dir`, and `hydra.sweep.dir` `runs_dir`.

    Raises:
        ConfigError: a setting is not valid, a directory is given twice, or nothing reads a typed
            amount.
    """
    if not HydraConfig.initialized():
        return read_config(composed)
    hydra_config = HydraConfig.get()
    merged: Any = OmegaConf.merge(composed, _directories(composed, hydra_config))
    config = read_config(merged)
    if not sweeping():  # another job of a sweep may read it
        check_amounts(hydra_config.overrides.task, composed, config)
    return config


def check_amounts(words: Iterable[str], composed: DictConfig, config: RunConfig) -> None:
    """Raise ConfigError if an amount of the budget is typed and changes no result.

    `words` are overrides or their keys, `composed` the settings before `config`, with references.
    """
    for word in words:
        if typed := re.match(r"\+*(budget\.\w+)", word):
            another = OmegaConf.from_dotlist([f"{typed[1]}=1000000000"])  # which nobody types
            other = read_config(OmegaConf.merge(composed, another))  # type: ignore[arg-type]
            same = other.identity == config.identity
            if same and other.evaluation_identity == config.evaluation_identity:
                raise ConfigError(f"{word}: nothing in this run reads it; leave it out")


def _directories(composed: DictConfig, hydra_config: Any) -> dict[str, str]:
    """Return `runs_dir` and `run_dir` where the user has set Hydra's own directories."""
    directories = {}
    if sweeping():
        folder = Path(hydra_config.sweep.dir)
        if folder.name != os.environ[SWEEP_VARIABLE]:
            directories["runs_dir"] = str(folder)
        if hydra_config.sweep.subdir != "." and composed.run_dir is None:
            directories["run_dir"] = str(folder / hydra_config.sweep.subdir)
    elif hydra_config.run.dir != ".":
        if composed.run_dir is not None:
            raise ConfigError(f"run_dir and hydra.run.dir {ONE_PLACE}")
        directories["run_dir"] = hydra_config.run.dir
    return directories


def composed(words: Sequence[str]) -> DictConfig:
    """Compose settings by overrides, without a job; raise ConfigError if Hydra refuses one."""
    register_resolvers()
    try:
        with initialize_config_dir(str(conf_directory()), **HYDRA_DEFAULTS):
            return compose("config", overrides=list(words))
    # Hydra raises ValueError for a group whose option is no name.
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(message_of(error)) from error


def message_of(error: Exception) -> str:
    """Return the message of an error of Hydra or OmegaConf in one line."""
    cause = error.__cause__
    if isinstance(cause, ConfigAttributeError | ConfigKeyError):
        return unknown_key(cause)
    parts = [_ADVICE.split(str(error))[0].strip()]
    if (override := getattr(error, "override", None)) and override not in parts[0]:
        parts.insert(0, override)
    if isinstance(cause, OmegaConfBaseException):
        parts.append(first_line(cause))
    return " ".join(": ".join(parts).split())


def unknown_key(error: ConfigAttributeError | ConfigKeyError) -> str:
    """Return the message for a key that no setting has, with the keys that may be meant."""
    typed = str(error.full_key)
    group, _, name = typed.partition(".")
    settings: Any = error.parent_node
    option = settings.get("name") if group in METHOD_GROUPS and name else None
    message = f"{typed} is no setting"
    if option:
        message = f"{typed}: {group}={option} has no such setting"
    every: Any = OmegaConf.to_container(settings._get_root())
    keys = [*groups(), *flatten(every)]
    meant = get_close_matches(typed, keys, 1, _LIKE)
    if not meant and not option:  # the group may be missing
        meant = [key for key in keys if key.endswith(f".{typed}")][:_MOST_NAMED]
    if not meant:
        return f"{message}; `permllm run --cfg job` lists all settings"
    return f"{message}; did you mean {' or '.join(meant)}?"
