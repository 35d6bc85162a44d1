"""What `conf/` composes into, in Hydra's ConfigStore: the type and the default of every setting, which stand beside its class.

A key or a value that cannot be is refused while composing. A YAML of the package names its node in its defaults list
(`/settings/GROUP/OPTION@_here_`); one of somebody else's needs none, and has the settings that it lists.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import MISSING, Field, field, fields, make_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from permllm.config import (
    FROM_THE_TOP,
    HYDRA_DEFAULTS,
    BudgetConfig,
    EvaluationConfig,
    ModelConfig,
    RunConfig,
    conf_directory,
    register_resolvers,
)
from permllm.errors import ConfigError, first_line
from permllm.mask.settings import LowRankSettings, MaskSettings
from permllm.permutation.lcp.settings import LCPSettings
from permllm.permutation.lcp.temperature import Constant, Cosine, Exponential, Linear
from permllm.permutation.settings import FromFileSettings, HeuristicSettings
from permllm.pruning.reconstruction_settings import ADMMSettings, DistillSettings, OBSSettings
from permllm.pruning.settings import RIASettings, SparseGPTSettings

# The settings of each option that names a class, by group; an option without settings of its own is not here.
SETTINGS: dict[str, dict[str, type]] = {
    "pruner": {"ria": RIASettings, "sparsegpt": SparseGPTSettings},
    "permutation": {"heuristic": HeuristicSettings, "from_file": FromFileSettings, "lcp": LCPSettings},
    "temperature": {"linear": Linear, "cosine": Cosine, "exponential": Exponential, "constant": Constant},
    "mask": {"score": MaskSettings, "lowrank": LowRankSettings},
    "reconstruction": {"obs": OBSSettings, "admm": ADMMSettings, "distill": DistillSettings},
}
# The name of the whole configuration's node.
WHOLE = "settings"


def register() -> None:
    """Put all nodes into the ConfigStore."""
    store = ConfigStore.instance()
    store.store(WHOLE, _NODES[WHOLE])
    for group, options in SETTINGS.items():
        for option in options:
            store.store(option, _NODES[f"{group}/{option}"], f"{WHOLE}/{group}")


def _node(group: str, settings: type) -> type:
    """The node of a class that a group names: its arguments but those from the top."""
    own = [one for one in fields(settings) if one.init and one.name not in FROM_THE_TOP]
    uses = [one.name for one in fields(settings) if one.name in FROM_THE_TOP]
    hints = get_type_hints(settings)
    made: list[Any] = [("_target_", str, field(default="???")), ("name", str, field(default="???"))]
    made += [("uses", list[str], field(default_factory=lambda: list(uses)))] if uses else []
    made += [(one.name, _type(hints[one.name]), _default(one)) for one in own]
    return _made(settings, made)


def _whole() -> type:
    """The node of everything: `RunConfig`, whose groups that name a class hold what any class may take."""
    tasks: Any = ("tasks", Any, field(default=None))  # whose names are anybody's
    evaluation = _made(EvaluationConfig, [tasks], True)
    architecture: Any = ("architecture", dict[str, Any] | None, field(default_factory=dict))  # null takes a model's away
    typed: list[Any] = [
        ("model", _made(ModelConfig, [architecture], True)),
        ("evaluation", evaluation),
        ("budget", BudgetConfig, field(default_factory=BudgetConfig)),
        # A name alone is a list of one; names of modules are anybody's.
        ("keep_dense", Any, field(default=None)),
        ("sparsity_of", Any, field(default=None)),
    ]
    return _made(RunConfig, typed + [(group, Any) for group in SETTINGS], True)


def _made(settings: type, made: list[Any], derived: bool = False) -> type:
    """A dataclass of this module, where a launcher's process finds it too."""
    name = f"{settings.__name__}Node"
    node = make_dataclass(name, made, bases=(settings,) if derived else ())
    node.__module__ = __name__
    globals()[name] = node
    return node


def _type(hint: Any) -> Any:
    """A type as OmegaConf checks it.

    A choice is a string here, which its class compares with what is valid. A whole number given for a real one stays what it
    is: the digest of a run tells 1 from 1.0.
    """
    if get_origin(hint) is Literal:
        return str
    if get_origin(hint) in (Union, types.UnionType):
        return Union[tuple(_type(part) for part in get_args(hint))]  # noqa: UP007
    return int | float if hint is float else hint


def _default(one: Field[Any]) -> Any:
    if one.default is MISSING and one.default_factory is MISSING:
        return field(default="???")
    return field(default=one.default) if one.default is not MISSING else field(default_factory=one.default_factory)


_NODES = {f"{group}/{option}": _node(group, one) for group, options in SETTINGS.items() for option, one in options.items()}
_NODES[WHOLE] = _whole()


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


def composed(words: Sequence[str]) -> DictConfig:
    """Compose settings without starting a job. Raises ConfigError where Hydra refuses a word.

    Args:
        words: what is typed after `run.py`.
    """
    register_resolvers()
    register()
    try:
        with initialize_config_dir(str(conf_directory()), **HYDRA_DEFAULTS):
            return compose("config", overrides=list(words))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(refusal(error)) from error


def refusal(error: Exception) -> str:
    """Return what Hydra or OmegaConf says of a command line, in one line and without the search path."""
    said = [str(error).partition("Config search path:")[0].strip()]
    if (override := getattr(error, "override", None)) and override not in said[0]:
        said.insert(0, override)
    if isinstance(error.__cause__, OmegaConfBaseException):
        said.append(first_line(error.__cause__))
    return " ".join(": ".join(said).split())
