"""Typed settings of a run, and the hash of the run.

`conf/config.yaml` explains each setting and has its default. The groups `pruner`, `allocation`,
`permutation`, `temperature`, `mask` and `reconstruction` stay mappings. Each names a class
(`_target_`); its other keys are the arguments of that class.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping
from dataclasses import field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BeforeValidator, Field
from pydantic.dataclasses import dataclass

from permllm.errors import ConfigError, first_line
from permllm.settings.identity import (
    PATHS,
    digest_of,
    identity_by_fields,
    input_digest,
    is_task_file,
    with_names,
    without_classes,
)
from permllm.settings.learning import LearningSettings
from permllm.settings.values import (
    NULL_IS_EMPTY,
    SETTINGS,
    Arguments,
    Count,
    Length,
    Names,
    Positive,
    Round,
    Texts,
    Whole,
    as_list,
    flatten,
    validated,
)

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
Placement = Literal["device", "sharded", "host", "disk"]
PLACEMENTS = get_args(Placement)  # the fastest first
# Groups of `conf/` whose methods may train, in the order in which they do.
LEARNING = ("permutation", "mask", "reconstruction")
# All groups whose options are methods, in the order in which a job reads them.
METHOD_GROUPS = ("pruner", "allocation", *LEARNING)
# Options of these groups that do nothing.
NEUTRAL_OPTIONS = {"allocation": "uniform", "mask": "pruner", "reconstruction": "none"}
# Metadata of settings that do not determine the pruned model; see `identity_by_fields`.
_NO_IDENTITY = {"identity": False}


@dataclasses.dataclass(frozen=True)
class NMPattern:
    """N:M pattern: `n` of every `m` consecutive weights along the input channels are kept."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: object, key: str = "sparsity") -> NMPattern:
        """Parse `"N:M"`. Raises ConfigError, which names the setting `key`, for other values."""
        match = re.fullmatch(r"([0-9]+):([0-9]+)", str(text))
        if match is None or not 0 < int(match[1]) < int(match[2]):
            raise ConfigError(
                f"{key}={text!r}: expected N:M as a string with 0 < N < M, such as '2:4' or '4:8'"
            )
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def check_divides(pattern: NMPattern, channels: int, where: str) -> None:
    """Raise ConfigError unless M divides `channels`, the number of input channels of `where`."""
    if channels % pattern.m:
        raise ConfigError(
            f"{pattern}: M = {pattern.m} does not divide the {channels} input channels of {where}"
        )


@dataclass(config=SETTINGS)
class ModelConfig:
    """Group `model`."""

    name: str
    source: Literal["wheel", "hub", "local", "random"]
    hub_name: str | None = None
    path: str | None = None
    revision: str | None = None
    wheel: str | None = None
    dtype: Dtype | Literal["auto"] = "float32"
    device: str = field(default="auto", metadata={"identity": lambda device: device.split(":")[0]})
    placement: Placement | Literal["auto"] = field(default="auto", metadata=_NO_IDENTITY)
    architecture: Arguments = field(default_factory=dict)
    bos: bool = False
    accept_terms: bool = field(default=False, metadata=_NO_IDENTITY)
    terms: str | None = field(default=None, metadata=_NO_IDENTITY)
    licence: str | None = field(default=None, metadata=_NO_IDENTITY)
    base_model: str | None = field(default=None, metadata=_NO_IDENTITY)
    lcp_epochs: Count = field(default=3, metadata=_NO_IDENTITY)
    notice: str | None = field(default=None, metadata=_NO_IDENTITY)

    def __post_init__(self) -> None:
        if self.source == "hub" and not self.hub_name:
            raise ConfigError("model=hub needs model.hub_name=OWNER/NAME, a repository on the hub")
        if self.source == "local" and not self.path:
            raise ConfigError(
                "model=local needs model.path=DIR, a folder with a checkpoint, or FILE.gguf"
            )
        if self.dtype == "auto" and self.source != "local":
            raise ConfigError(f"model.dtype=auto: model={self.name} has no dtype of its own")
        if self.placement == "disk" and self.source == "random":
            raise ConfigError(
                f"model.placement=disk: model={self.name} is random and has no files; use host"
            )

    def check_terms(self) -> None:
        """Raise ConfigError if the model has terms that nobody has accepted."""
        if self.terms and not self.accept_terms:
            raise ConfigError(
                f"model={self.name} has terms that you must accept: read {self.terms}, and give "
                "model.accept_terms=true if you accept them"
            )


@dataclass(config=SETTINGS)
class CalibrationConfig:
    """Group `calibration`."""

    dataset: Texts
    data_files: str | None = None
    samples: Count = 128
    seqlen: Length = 1024
    batch_size: Count = 8
    statistics: Literal["dense", "sequential"] = "dense"
    sampling: Literal["disjoint", "documents", "overlapping"] = "disjoint"

    @property
    def names(self) -> list[str]:
        """Names of the texts."""
        return as_list(self.dataset)


@dataclass(config=SETTINGS)
class PerplexityConfig:
    """Settings `evaluation.perplexity`."""

    dataset: Texts | None
    seqlen: Length
    data_files: str | None = field(default=None, metadata=_NO_IDENTITY)  # the file counts
    limit: Count | None = None
    batch_tokens: Count = field(default=2048, metadata=_NO_IDENTITY)

    @property
    def names(self) -> list[str]:
        """Names of the texts: the file's, or those of `dataset`."""
        if self.data_files:
            return [Path(self.data_files).stem]
        return as_list(self.dataset)


@dataclass(config=SETTINGS)
class TaskConfig:
    """Settings of one task, `evaluation.tasks.NAME`."""

    num_fewshot: Whole | None = None
    limit: Count | None = None


@dataclass(config=SETTINGS)
class LMEvalConfig:
    """Settings of all tasks, `evaluation.lm_eval`."""

    limit: Count | None = None
    batch_size: Count = field(default=8, metadata=_NO_IDENTITY)
    source: Literal["hub", "wheel"] = field(default="hub", metadata={"former": ["hub"]})
    add_bos_token: bool | None = None


def _by_name(tasks: Any) -> Any:
    if isinstance(tasks, str):
        tasks = [name.strip() for name in tasks.split(",")]
    return dict.fromkeys(tasks) if isinstance(tasks, list) else tasks or {}


# Settings of tasks by name; names alone, also in one string, are valid too.
Tasks = Annotated[dict[str, Annotated[TaskConfig, NULL_IS_EMPTY]], BeforeValidator(_by_name)]


@dataclass(config=SETTINGS)
class EvaluationConfig:
    """Group `evaluation`."""

    perplexity: PerplexityConfig
    tasks: Tasks = field(default_factory=dict)
    lm_eval: LMEvalConfig = field(default_factory=LMEvalConfig)
    weights: Literal["fp8"] | None = None


@dataclass(config=SETTINGS)
class LoggerConfig:
    """Group `logger`."""

    name: Literal["auto", "wandb", "tensorboard", "none"]
    project: str = "permllm"
    group: str | None = None


@dataclass(config=SETTINGS)
class ExportConfig:
    """Group `export`.

    With `form=none` a run has no checkpoint, and the command `export` writes the first form that
    the permutations allow.
    """

    form: Literal["none", "folded", "gathered", "simulate"] = "none"
    dtype: Dtype | None = None
    shard_gb: Positive = 5.0
    serve: Literal["vllm"] | None = None


def _by_fields(kind: type, **further: Any) -> dict[str, Any]:
    """Return the metadata of a group whose settings are fields of `kind`, and further ones."""
    return {"identity": partial(identity_by_fields, kind, **further)}


@dataclass(config=SETTINGS)
class RunConfig:
    """Settings of one job: one model, one method, one run directory."""

    name: str
    model: ModelConfig = field(metadata=_by_fields(ModelConfig))
    calibration: CalibrationConfig
    evaluation: EvaluationConfig = field(metadata=_NO_IDENTITY)
    logger: LoggerConfig = field(metadata=_NO_IDENTITY)
    pruner: dict[str, Any]
    allocation: dict[str, Any] = field(metadata={"former": [{"name": "uniform"}]})
    permutation: dict[str, Any] = field(
        metadata=_by_fields(LearningSettings, norm_tokens={"former": [None]})
    )
    temperature: dict[str, Any] = field(metadata=_NO_IDENTITY)  # a permutation may have a copy
    mask: dict[str, Any] = field(metadata=_by_fields(LearningSettings))
    reconstruction: dict[str, Any] = field(
        metadata=_by_fields(LearningSettings, relative={"former": [False]})
    )
    sparsity: str
    keep_dense: Names = field(metadata={"identity": sorted})
    block_size: Count = field(metadata=_NO_IDENTITY)  # a permutation may have a copy
    compute_dtype: Literal["auto", "float32", "bfloat16"]
    seed: Annotated[Whole, Field(le=2**32 - 1)]  # numpy accepts no larger seed
    runs_dir: str = field(metadata=_NO_IDENTITY)
    run_dir: str | None = field(metadata=_NO_IDENTITY)
    force: bool = field(metadata=_NO_IDENTITY)
    deterministic: bool = field(metadata=_NO_IDENTITY)
    plan: bool = field(metadata=_NO_IDENTITY)
    save_weights: bool
    export: ExportConfig = field(metadata=_NO_IDENTITY)
    protocol: str | None = field(metadata=_NO_IDENTITY)
    method: str | None = field(metadata=_NO_IDENTITY)
    budget: dict[str, Round | None] = field(metadata=_NO_IDENTITY)
    plan_on: Literal["l4", "rtx4090", "l40s", "a100", "h100", "h200", "b200"] | None = field(
        default=None, metadata=_NO_IDENTITY
    )

    def __post_init__(self) -> None:
        NMPattern.parse(self.sparsity)
        if self.plan_on and not self.plan:
            raise ConfigError(f"plan_on={self.plan_on} needs plan=true")
        if not self.plan:
            self.model.check_terms()

    @property
    def pattern(self) -> NMPattern:
        """Pattern of `sparsity`."""
        return NMPattern.parse(self.sparsity)

    @cached_property  # because reading the files takes time
    def resolved(self) -> dict[str, Any]:
        """All settings as plain values, with a digest of each file that they name (`inputs`)."""
        resolved = dataclasses.asdict(self)
        flat = flatten(resolved)
        digests = {key: input_digest(Path(flat[key])) for key in PATHS if flat.get(key)}
        digests |= {
            f"evaluation.tasks.{name}": input_digest(Path(name))
            for name in self.evaluation.tasks
            if is_task_file(name)
        }
        return resolved | {"inputs": digests}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Settings that determine the pruned model, as plain values."""
        return identity_of(self.resolved)

    @cached_property
    def hash(self) -> str:
        """Hexadecimal digest of `identity`."""
        return digest_of(self.identity)

    @cached_property
    def evaluation_identity(self) -> dict[str, Any]:
        """Settings that determine how a model is evaluated, as plain values."""
        return evaluation_of(self.resolved)


def identity_of(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the resolved settings that determine the pruned model, as the fields of classes say.

    Paths are replaced by the names of their files, which have digests among the inputs.
    """
    settings = without_classes(with_names(resolved))
    # Runs of 2.0.0 have `sparsity_of` and `paths`.
    before: dict[str, Any] = {"sparsity_of": {"former": [{}]}, "paths": _NO_IDENTITY}
    identity = identity_by_fields(RunConfig, settings, **before)
    permutation = identity["permutation"]
    for key in ("block_size", "temperature"):
        if key in permutation:
            identity[key] = permutation.pop(key)
    inputs = settings.get("inputs", {})
    identity["inputs"] = {
        key: digest for key, digest in inputs.items() if not key.startswith("evaluation.")
    }
    return identity


def evaluation_of(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that determine an evaluation: `perplexity`, `tasks`, `weights`, if given.

    A path is replaced by the name and the digest of its file.
    """
    settings = resolved["evaluation"]
    inputs = resolved.get("inputs", {})
    identity: dict[str, Any] = {}
    text = identity_by_fields(PerplexityConfig, settings["perplexity"])
    if file := settings["perplexity"].get("data_files"):
        digest = inputs.get("evaluation.perplexity.data_files")
        text |= {"dataset": None, "file": Path(file).name, "digest": digest}
    if resolved["model"].get("bos"):
        text["bos"] = True
    if file or text.get("dataset") is not None:
        identity["perplexity"] = text
    tasks = {}
    for name, task in (settings.get("tasks") or {}).items():
        shared = identity_by_fields(LMEvalConfig, settings["lm_eval"])
        values = shared | task | {"limit": task["limit"] or shared["limit"]}
        if digest := inputs.get(f"evaluation.tasks.{name}"):
            values["digest"] = digest
        tasks[Path(name).name] = values
    if tasks:
        identity["tasks"] = tasks
    if identity and settings.get("weights"):
        identity["weights"] = settings["weights"]
    return identity


def read_config(composed: DictConfig) -> RunConfig:
    """Return the typed settings of what Hydra composed; raise ConfigError for a wrong setting."""
    settings = copy.deepcopy(composed)
    try:
        keys = [key for key in settings.budget if not OmegaConf.is_missing(settings.budget, key)]
        settings.budget = OmegaConf.masked_copy(settings.budget, keys)
        resolved: Any = OmegaConf.to_container(settings, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} must be given") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'settings'}: {first_line(error)}") from error
    resolved["model"].pop("pins", None)  # the loader reads them by the model's name
    return validated(RunConfig, resolved)
