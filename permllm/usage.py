"""What a person who types gets: the help on one screen, and what is wrong with a command line in one line.

`python run.py --help` prints `help_text`, which is Hydra's template too. A line says the key, the value, and what would be
valid or nearest; `HYDRA_FULL_ERROR=1` gives everything instead.
"""

from __future__ import annotations

import os
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, Union, get_args, get_origin

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from permllm.config import HYDRA_DEFAULTS, RunConfig, conf_directory
from permllm.errors import SHORT_ERRORS, ConfigError, everything_wanted, first_line

_WIDTH = 100
# Beside the nearest name, all are listed where there are no more than these.
_MOST_NAMES = 20
# Groups whose options are classes.
_METHODS = ("pruner", "permutation", "mask", "reconstruction")
# Settings whose keys are anybody's names.
_GIVEN_WHOLE = ("evaluation.tasks", "sparsity_of")
# In a group, what nobody sets.
_NOT_SET = {"_target_", "uses"}
_HELP = """\
{program}: prune a language model to N:M, learn its channel permutations, evaluate it.
usage: {program} [GROUP=OPTION | KEY=VALUE]...     with -m, A,B,C for a value sweeps

groups and their options (* unless another is chosen):
{groups}

  {program}                                      the default model, ten minutes on two cores
  {program} pruner=ria sparsity=4:8 seed=1       another pruner, pattern, seed
  {program} -m seed=0,1,2 permutation=none,lcp   a sweep: one table of means and deviations
  {program} experiment=quickstart                orders and masks, learned and not: a table
  {program} model=llama-2-7b plan=true           sizes and memory, without weights

settings as they would be: {program} --cfg job --resolve; from where: --info defaults
what each does: docs/options.md; Hydra's own help: {program} --hydra-help"""
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", type(None): "null"}


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


def help_text(program: str | None = None) -> str:
    """The help: what it does, the groups, five commands, and how to see the settings.

    Args:
        program: what is typed; None is what was.
    """
    lines = []
    for group, (chosen, options) in options_of().items():
        marked = [f"*{option}" if option == chosen else option for option in options]
        lines += textwrap.wrap(
            " ".join(marked), _WIDTH, initial_indent=f"  {group:<15} ", subsequent_indent=" " * 18, break_on_hyphens=False
        )
    return _HELP.format(program=program or program_name(), groups="\n".join(lines))


def completions(line: str) -> list[str] | None:
    """What may stand in the place of the last word; None where only the settings themselves say it, which Hydra composes.

    Args:
        line: that was typed so far.
    """
    word = "" if line.endswith(" ") else line.rsplit(maxsplit=1)[-1]
    key, equals, _ = word.partition("=")
    groups = options_of()
    if "hydra.searchpath" in line or set(word) & set("+~.") or (equals and key not in groups):
        return None
    if equals:
        found = [f"{key}={option}" for option in groups[key][1]]
    else:
        nested = [one.name for one in fields(RunConfig) if re.match(r"\w+Config|dict", str(one.type))] + ["hydra"]
        found = [f"{group}=" for group in groups] + [f"{name}." for name in nested]
        found += [f"{one.name}=" for one in fields(RunConfig) if one.name not in (*nested, *groups)]
    return sorted(one for one in found if one.startswith(word))


def program_name() -> str:
    """What was typed: `permllm run`, or `python run.py`."""
    return sys.argv[0] if sys.argv[0].startswith("permllm ") else "python run.py"


@contextmanager
def short_errors() -> Iterator[None]:
    """What Hydra refuses is raised inside instead of printed and left, unless all of it was asked for."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    if everything_wanted():
        yield
        return
    os.environ |= {"HYDRA_FULL_ERROR": "1", SHORT_ERRORS: "1"}
    try:
        yield
    finally:
        os.environ.pop(SHORT_ERRORS)
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


def reported(job: Callable[[], Any]) -> Any:
    """What Hydra makes of a command line; where it refuses it, one line on stderr.

    Raises:
        SystemExit: with code 1, after the line.
    """
    with short_errors():
        try:
            return job()
        except (HydraException, OmegaConfBaseException) as error:
            if SHORT_ERRORS not in os.environ:
                raise
            print(f"error: {refusal(error, sys.argv[1:])}", file=sys.stderr)
    raise SystemExit(1)


def refusal(error: Exception, words: Sequence[str]) -> str:
    """What is wrong with a command line that Hydra refuses, in one line.

    Args:
        error: what was raised.
        words: of the command line.
    """
    if isinstance(error, OverrideParseException):
        return f"{error.override}: expected KEY=VALUE or GROUP=OPTION; a value with commas, brackets or spaces needs quotes"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, option = str(error.missing_cfg_file).rpartition("/")
        if group:
            return f"{group}={option}: no such option{_meant(option, _listed(error.options or _options(group)))}"
    text = str(error)
    if match := re.search(r"Ambiguous value for argument '([^'=]+)=([^']*)'", text):
        key, value = match.groups()
        return f"{key}={value}: several values are a sweep, which -m asks for; a list is '{key}=[{value}]'"
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else None
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown(match[1], words)
    if match := re.search(r"Error merging override (\+*~?)([^=\s]+)(?:=(.*))?", text):
        sign, key, value = match.groups()
        if sign == "~" or value is None:
            return f"~{key}: a setting cannot be taken away; {key}=null where it may be empty"
        return refused(key, value, cause or error, words)
    if match := re.match(r"In '([^']+)': \w+ raised while composing config:\s*(.*)", text, re.DOTALL):
        said = " ".join(match[2].partition("full_key")[0].split())
        key = re.search(r"full_key: (\S+)", match[2])
        return f"{key[1] if key else match[1]}: {said} (in {match[1]}.yaml)"
    key = getattr(error, "full_key", None)
    return " ".join(filter(None, [f"{key}:" if key else "", first_line(error)]))


def refused(key: str, value: Any, error: Exception, words: Sequence[str]) -> str:
    """What is wrong with a setting that OmegaConf refuses, in one line.

    Args:
        key: dotted.
        value: of it.
        error: what OmegaConf raised.
        words: that choose the groups.
    """
    if "not in" in first_line(error) or "does not exist" in first_line(error):
        return _unknown(getattr(error, "full_key", None) or key, words)
    return f"{key}={value}: expected {_expected(key, words) or first_line(error)}"


def _unknown(key: str, words: Sequence[str]) -> str:
    """A line for a key that is not there: what there is beside it, and which is nearest."""
    prefix, _, name = key.rpartition(".")
    composed = _composed_without(key, words)
    inside = OmegaConf.select(composed, prefix) if prefix else composed
    if prefix in _GIVEN_WHOLE:
        return f"{key}: {prefix} is given whole, as in '{prefix}={{{name}: VALUE}}'"
    if prefix and not isinstance(inside, DictConfig):
        return _unknown(prefix, words)
    unset = _NOT_SET | ({"name"} if "_target_" in (inside or {}) else set())  # the name of an option that names a class
    names = [str(one) for one in inside if str(one) not in unset] if prefix else [*{**options_of(), **inside}]
    chosen = f" of {prefix}={inside.get('name')}" if prefix and "." not in prefix and inside.get("name") else ""
    what = f"no setting{chosen}" if prefix else "no group or setting"
    value = next((word.partition("=")[2] for word in words if word.lstrip("+").partition("=")[0] == key), None)
    return f"{key}{'' if value is None else f'={value}'}: {what}{_meant(name, names, f'{prefix}.' if prefix else '')}"


def _meant(name: str, names: Iterable[str], prefix: str = "") -> str:
    names = list(names)
    near = get_close_matches(name, names, n=1)
    meant = f"; did you mean {prefix}{near[0]}?" if near else ";" if names else ""
    return meant + (f" valid are: {', '.join(names)}" if names and (len(names) <= _MOST_NAMES or not near) else "")


def _listed(options: Iterable[str]) -> list[str]:
    return sorted(option for option in options if not option.startswith("_"))


def _options(group: str) -> list[str]:
    return options_of().get(group, (None, []))[1]


def _expected(key: str, words: Sequence[str]) -> str:
    """The kinds of value that a setting takes; nothing where it is not known."""
    prefix, _, name = key.rpartition(".")
    composed = _composed_without(key, words)
    inside = OmegaConf.select(composed, prefix) if prefix else composed
    node = inside._get_node(name) if isinstance(inside, DictConfig) else None
    hint = getattr(getattr(node, "_metadata", None), "ref_type", None)
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [_KINDS[part] for part in parts if part in _KINDS]
    if float in parts and int in parts:
        kinds.remove(_KINDS[int])
    if kinds and node is not None and node._metadata.optional and _KINDS[type(None)] not in kinds:
        kinds.append(_KINDS[type(None)])
    return " or ".join(kinds)


def _composed_without(key: str, words: Sequence[str]) -> DictConfig:
    """The settings without what was typed for a key, nor anything else that cannot be composed."""
    kept = [word for word in words if "=" in word and not word.startswith("-") and "," not in word]
    kept = [word for word in kept if word.lstrip("+~").partition("=")[0] != key]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_directory()), **HYDRA_DEFAULTS):
        for chosen in (kept, [word for word in kept if word.partition("=")[0] in options_of()], []):
            try:
                return compose("config", overrides=chosen)
            except (HydraException, OmegaConfBaseException):
                continue
    return OmegaConf.create({})
