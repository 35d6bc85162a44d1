"""What `conf/` composes into, in Hydra's ConfigStore: the type and the default of every setting, which stand beside its class.

A key or a value that cannot be is refused while composing. A YAML of the package names its node in its defaults list
(`/settings/GROUP/OPTION@_here_`); one of somebody else's needs none, and has the settings that it lists.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import MISSING, Field, field, fields, make_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.core.config_store import ConfigStore

from permllm.config import BudgetConfig, CalibrationConfig, EvaluationConfig, ModelConfig, PerplexityConfig, RunConfig
from permllm.identity import FROM_THE_TOP
from permllm.permutation.lcp.settings import LCPSettings
from permllm.permutation.lcp.temperature import Constant, Cosine, Exponential, Linear
from permllm.permutation.settings import FromFileSettings, HeuristicSettings
from permllm.pruning.settings import GBLMSettings, RIASettings, SparseGPTSettings
from permllm.reconstruction.settings import BlockSettings, DistillSettings, OBSSettings
from permllm.renamed import old_keys
from permllm.studies.settings import LayerRuntimeSettings, SaliencyAndErrorSettings

# The settings of each option that names a class, by group; an option without settings of its own is not here.
SETTINGS: dict[str, dict[str, type]] = {
    "pruner": {"gblm": GBLMSettings, "ria": RIASettings, "sparsegpt": SparseGPTSettings},
    "permutation": {"heuristic": HeuristicSettings, "from_file": FromFileSettings, "lcp": LCPSettings},
    "temperature": {"linear": Linear, "cosine": Cosine, "exponential": Exponential, "constant": Constant},
    "reconstruction": {"obs": OBSSettings, "block": BlockSettings, "distill": DistillSettings},
    "study": {"layer_runtime": LayerRuntimeSettings, "saliency_and_error": SaliencyAndErrorSettings},
}
# The name of the whole configuration's node.
WHOLE = "settings"


def register() -> None:
    """Put all nodes into the ConfigStore."""
    store = ConfigStore.instance()
    store.store(WHOLE, whole())
    for group, options in SETTINGS.items():
        for option, settings in options.items():
            store.store(option, node(group, settings), f"{WHOLE}/{group}")


def node(group: str, settings: type) -> type:
    """The node of a class that a group names: its arguments but those from the top, with earlier names that stay empty.

    Args:
        group: of the options.
        settings: a dataclass.
    """
    own = [one for one in fields(settings) if one.init and one.name not in FROM_THE_TOP]
    uses = [one.name for one in fields(settings) if one.name in FROM_THE_TOP]
    hints = get_type_hints(settings)
    made: list[Any] = [("_target_", str, field(default="???"))]
    made += [] if group == "study" else [("name", str, field(default="???"))]
    made += [("uses", list[str], field(default_factory=lambda: list(uses)))] if uses else []
    made += [(one.name, _type(hints[one.name]), _default(one)) for one in own]
    names = {one.name for one in own}
    made += [(old, Any, field(default=None)) for old, new in _earlier(group) if new in names]
    return make_dataclass(settings.__name__, made)


def whole() -> type:
    """The node of everything: `RunConfig`, whose groups that name a class hold what any class may take."""
    perplexity = _with_earlier(PerplexityConfig, "evaluation.perplexity")
    evaluation = make_dataclass("EvaluationConfig", [("perplexity", perplexity)], bases=(EvaluationConfig,))
    architecture: Any = ("architecture", dict[str, Any] | None, field(default_factory=dict))  # null takes a model's away
    model = make_dataclass("ModelConfig", [architecture], bases=(ModelConfig,))
    typed: list[Any] = [
        ("model", model),
        ("calibration", _with_earlier(CalibrationConfig, "calibration")),
        ("evaluation", evaluation),
    ]
    typed += [(group, Any) for group in SETTINGS if group != "study"]
    typed += [("study", Any, field(default_factory=dict))]
    budget = _with_earlier(BudgetConfig, "budget")
    typed += [("budget", budget, field(default_factory=budget))]
    return make_dataclass("RunConfig", typed, bases=(RunConfig,))


def _with_earlier(settings: type, group: str) -> type:
    return make_dataclass(
        settings.__name__, [(old, Any, field(default=None)) for old, _ in _earlier(group)], bases=(settings,)
    )


def _earlier(group: str) -> Iterator[tuple[str, str]]:
    """The earlier and the present names of settings of a group, without the group."""
    for entry in old_keys(group):
        yield entry.old.rpartition(".")[2], entry.new.rpartition(".")[2]


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
