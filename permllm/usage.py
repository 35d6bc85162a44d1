"""Groups and their options as a person types them, and errors of a command line in one line."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from permllm.config import RunConfig, conf_directory
from permllm.errors import SHORT_ERRORS, ConfigError, everything_wanted, first_line

# Groups whose options are classes.
_METHODS = ("pruner", "permutation", "mask", "reconstruction")


def options_of() -> dict[str, tuple[str | None, list[str]]]:
    """The groups in the order in which they are composed, each with the option that it has by itself and all options."""
    conf = conf_directory()
    found = {}
    for entry in yaml.safe_load((conf / "config.yaml").read_text(encoding="utf-8"))["defaults"]:
        group, chosen = next(iter(entry.items())) if isinstance(entry, dict) else (entry, None)
        if " " not in group and (conf / group).is_dir():
            found[group] = (chosen, sorted(file.stem for file in (conf / group).glob("[!_]*.yaml")))
    return found


def check_names(config: RunConfig) -> None:
    """Raise ConfigError where the option of a method, as Hydra has chosen it, has the `name` of another option of its group.

    Runs go by that name and not by the class, which may move: they would be taken for the other option's.
    """
    if not HydraConfig.initialized():  # nothing was chosen by its file's name
        return
    chosen, options = HydraConfig.get().runtime.choices, options_of()
    for group in _METHODS:
        option, name = chosen.get(group), getattr(config, group).get("name")
        if name != option and name in options[group][1]:
            raise ConfigError(
                f"{group}={option}: its `name` is {name}, which is another option: its runs would be taken for those"
            )


def reported(job: Callable[[], Any]) -> Any:
    """Run what Hydra makes of a command line; where Hydra refuses it, print one line, or all if `HYDRA_FULL_ERROR=1`.

    Raises:
        SystemExit: with code 1, after the line.
    """
    if everything_wanted():
        return job()
    before = os.environ.get("HYDRA_FULL_ERROR")
    # Hydra then raises what it would print.
    os.environ |= {"HYDRA_FULL_ERROR": "1", SHORT_ERRORS: "1"}
    try:
        return job()
    except (HydraException, OmegaConfBaseException) as error:
        print(f"error: {refusal(error)}", file=sys.stderr)
    except ValueError as error:
        # Hydra has no error of its own for GROUP=null.
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not str(frame.f_globals.get("__name__")).startswith("hydra."):
            raise
        print(f"error: {' '.join(word for word in sys.argv[1:] if 'null' in word)}: {error}", file=sys.stderr)
    finally:
        os.environ.pop(SHORT_ERRORS)
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before
    raise SystemExit(1)


def refusal(error: Exception) -> str:
    """Return what Hydra or OmegaConf says of a command line, in one line and without the search path."""
    said = [str(error).partition("Config search path:")[0].strip()]
    if (override := getattr(error, "override", None)) and override not in said[0]:
        said.insert(0, override)
    if isinstance(error.__cause__, OmegaConfBaseException):
        said.append(first_line(error.__cause__))
    return " ".join(": ".join(said).split())
