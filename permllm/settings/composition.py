"""Composition of the settings in `conf/` by Hydra."""

import re
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from permllm.errors import ConfigError, first_line

# Hydra 1.4 has only one version base, and asks which classes settings may name. They may name any
# class, because the user who starts the job writes the settings.
_ANY_CLASS: Any = getattr(hydra.utils, "UNSAFE_DISABLE_EXECUTION_CHECKS", None)
HYDRA_DEFAULTS: dict[str, Any] = {} if _ANY_CLASS else {"version_base": "1.3"}
HYDRA_MAIN = HYDRA_DEFAULTS | ({"execution_whitelist": _ANY_CLASS} if _ANY_CLASS else {})


# Ends of Hydra's messages: folders of the machine, and the advice to append a key, which no setting
# here allows.
_ADVICE = re.compile(r"Config search path:|To append to your ")


def conf_directory() -> Path:
    """Return the folder of the YAML files, in an installed package or beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def register_resolvers() -> None:
    """Register the resolvers of `conf/` with OmegaConf.

    `nm:PATTERN`: N:M for a file name (`2:4` as `2x4`). `last:PATH`: the part after the last slash.
    `either:VALUE,CASE,A,B`: A if VALUE is CASE, or is in the list CASE; otherwise B.
    `times:COUNT,FACTOR`: the rounded product; null if COUNT is null.
    """
    # The function that can replace a resolver has another name since version 2.4.
    new = "replace" in signature(OmegaConf.register_resolver).parameters
    register: Any = OmegaConf.register_resolver if new else OmegaConf.register_new_resolver
    register("either", _either, replace=True)
    register("nm", lambda pattern: str(pattern).replace(":", "x"), replace=True)
    register("last", lambda path: str(path).rsplit("/", 1)[-1], replace=True)
    register("times", _times, replace=True)


def _either(value: Any, case: Any, a: Any, b: Any) -> Any:
    return a if value in (case if isinstance(case, list) else [case]) else b


def _times(count: float | None, factor: float) -> int | None:
    return None if count is None else round(count * factor)


def replaced_options(method: str, choices: Mapping[str, str]) -> list[str]:
    """Return the chosen options, `GROUP=OPTION`, that are others than a method of `conf/` has.

    Args:
        method: option of the group `method`; one of another package has no such file.
        choices: options by group.
    """
    own = {"mask": "pruner", "reconstruction": "none"} | _options_of_method(method)
    return [
        f"{group}={choices[group]}" for group in own if choices.get(group, own[group]) != own[group]
    ]


def _options_of_method(method: str) -> dict[str, str]:
    file = conf_directory() / "method" / f"{method}.yaml"
    options = dict[str, str]()
    if not file.is_file():
        return options
    for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["defaults"]:
        if isinstance(entry, dict):
            options |= {key.removeprefix("override /"): option for key, option in entry.items()}
        else:  # another method, which this one is a variant of
            options |= _options_of_method(entry)
    return options


def composed(words: Sequence[str]) -> DictConfig:
    """Compose settings without starting a job. Raise ConfigError if Hydra refuses an override.

    Args:
        words: overrides, as on the command line of `run.py`.
    """
    register_resolvers()
    try:
        with initialize_config_dir(str(conf_directory()), **HYDRA_DEFAULTS):
            return compose("config", overrides=list(words))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(refusal(error)) from error


def refusal(error: Exception) -> str:
    """Return the message of an error of Hydra or OmegaConf, in one line."""
    parts = [_ADVICE.split(str(error))[0].strip()]
    if (override := getattr(error, "override", None)) and override not in parts[0]:
        parts.insert(0, override)
    if isinstance(error.__cause__, OmegaConfBaseException):
        parts.append(first_line(error.__cause__))
    return " ".join(": ".join(parts).split())
