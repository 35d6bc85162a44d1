"""What the files that others have written must hold: one declared form for each kind, checked by pydantic, types and all.

Keys that a form does not name may stand beside those that it does: a newer version's, or somebody's own.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Annotated, Any, Literal, NotRequired, TypeVar, cast

from pydantic import AfterValidator, Field, JsonValue, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from permllm.config import NMPattern
from permllm.errors import ConfigError, DataError, printable

Schema = TypeVar("Schema")

# Of a value that is not valid, and of its place, characters that are shown.
_SHOWN = 60


def validated(where: str, value: Any, schema: type[Schema]) -> Schema:
    """The value, where it is as a schema says.

    Args:
        where: it is from; begins the message.
        value: plain values.
        schema: a type of this module.

    Returns:
        The value as it was given, with all its keys.

    Raises:
        DataError: it is not; one line that names the first field.
    """
    try:
        _adapter(cast(Hashable, schema)).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = _cut(printable(".".join(str(part) for part in first["loc"])))
        if first["type"] == "missing":
            raise DataError(f"{where}: {field} is missing") from error
        shown = _cut(repr(first["input"]))
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise DataError(f"{where}: {f'{field}: ' if field else ''}{message}, and it is {shown}") from error
    return cast(Schema, value)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@cache
def _adapter(schema: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, schema))


def _pattern(text: str) -> str:
    try:
        return str(NMPattern.parse(text))
    except ConfigError as error:
        raise ValueError(str(error)) from error


# What 64 bits hold, so that arithmetic with it cannot fail.
_MOST = 2**63 - 1
Whole = Annotated[int, Field(ge=0, le=_MOST)]
Positive = Annotated[int, Field(ge=1, le=_MOST)]
# Not NaN, which is neither above nor below anything; a perplexity may be infinite.
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
# Of any job; sums of them are finite.
Seconds = Annotated[float, Field(ge=0, le=1e12)]
Pattern = Annotated[str, AfterValidator(_pattern)]
# N:M by linear, or that it was not pruned, of those that are not as the rest.
Patterns = dict[str, Pattern | Literal["dense"]]
Object = dict[str, JsonValue]
FileName = Annotated[str, Field(pattern=r"^[^/\\\\\x00]+$")]
PathName = Annotated[str, Field(pattern=r"^[^\x00]+$")]
# crc32 of a file's bytes.
Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]


class Perplexity(TypedDict):
    """Of one text, in `metrics.json`."""

    value: Annotated[float, Field(gt=0)]
    window: Positive
    tokens: Positive


class Accuracy(TypedDict):
    """Of one zero-shot task, in `metrics.json`."""

    acc: Share | None
    acc_norm: Share | None
    stderr: Share | None
    n: Positive | None
    limited: bool
    split: str | None
    data: NotRequired[str | None]


class TaskResult(TypedDict):
    """Of a task of lm-eval with settings of its own, or of a group, in `metrics.json`; metrics have lm-eval's names."""

    metrics: dict[str, float | None]
    stderr: dict[str, float | None]
    n: Positive | None
    num_fewshot: Whole | None
    limited: bool
    split: str | None
    data: str | None
    asked: NotRequired[str]  # under which of `evaluation.tasks`


class MeasuredPerplexity(Perplexity):
    """`Perplexity`, and what it is made of, as it is kept for other jobs."""

    losses: list[Amount]


class ItemScores(TypedDict):
    """Of one task, in `scores.json`: the items' numbers in its data set, a digest of what they say, right (1) or wrong (0)."""

    items: list[Whole]
    digest: str
    acc: list[Share]


class TaskScores(TypedDict):
    """As `ItemScores`, with a score of each item by metric, under lm-eval's names."""

    items: list[Whole]
    digest: str
    metrics: dict[str, list[Annotated[float, Field(allow_inf_nan=False)]]]


class MeasuredTask(TaskResult):
    """`TaskResult`, and what it is made of, as it is kept for other jobs."""

    scores: NotRequired[TaskScores]


class MeasuredAccuracy(Accuracy):
    """`Accuracy`, and what it is made of, as it is kept for other jobs."""

    scores: NotRequired[ItemScores]


class EvaluationScores(TypedDict):
    """What an evaluation's numbers are made of, in `scores.json`: nats of each window by text, and items by task."""

    perplexity: NotRequired[dict[_Which, dict[str, list[Amount]]]]
    zero_shot: NotRequired[dict[_Which, dict[str, ItemScores]]]
    tasks: NotRequired[dict[_Which, dict[str, TaskScores]]]


class Scores(TypedDict):
    """`scores.json`: by the digest of the evaluation (`permllm.config.evaluation_of`)."""

    evaluations: dict[str, EvaluationScores]


class KeptRecord(TypedDict):
    """A line of a file of kept records: the small files of a run directory, under the directory's name."""

    run: FileName
    config: Object
    metrics: Object
    environment: NotRequired[Object]
    history: NotRequired[list[Object]]
    scores: NotRequired[Object]


class Sparsity(TypedDict):
    """What pruning left, in `metrics.json`; zeros as a share of what was pruned, and of all linears of the decoder layers."""

    pattern: Pattern
    patterns: NotRequired[Patterns]
    fraction: Share
    of_model: Share
    violations: Whole
    weights_changed: NotRequired[bool]
    weights_kept: NotRequired[bool]


class ExportSummary(TypedDict):
    """`permllm.json` beside an exported model, and `export` in `metrics.json`; its size in bytes."""

    form: Literal["simulate", "folded", "gathered"]
    sparsity: Pattern
    patterns: NotRequired[Patterns]
    dtype: str
    bytes: Positive
    config_hash: str
    shard_gb: Annotated[float, Field(gt=0)]
    gathers: Whole
    seconds: Seconds


class Protocol(TypedDict):
    """How a run was calibrated and measured, in `metrics.json`: those groups of its settings."""

    calibration: Object
    evaluation: Object


class Evaluated(TypedDict):
    """How a model was evaluated, in `metrics.json` (`permllm.config.evaluation_of`)."""

    perplexity: NotRequired[Object]
    zero_shot: NotRequired[Object]
    tasks: NotRequired[Object]


class OtherEvaluation(TypedDict):
    """Another evaluation of the same pruned model, in `metrics.json`."""

    evaluation: Evaluated
    evaluation_hash: str
    finished: bool
    protocol: NotRequired[Object]
    texts: NotRequired[dict[str, str | dict[str, str]]]
    perplexity: NotRequired[dict[_Which, dict[str, Perplexity]]]
    zero_shot: NotRequired[dict[_Which, dict[str, Accuracy]]]
    tasks: NotRequired[dict[_Which, dict[str, TaskResult]]]


def _of_both(found: dict[_Which, dict[str, Result]]) -> dict[_Which, dict[str, Result]]:
    if found.keys() != {"dense", "sparse"} or found["dense"].keys() != found["sparse"].keys():
        raise ValueError("the dense and the sparse model must have the same results")
    return found


_Which = Literal["dense", "sparse"]
Result = TypeVar("Result")
_Compared = Annotated[dict[_Which, dict[str, Result]], AfterValidator(_of_both)]
# By the name of a channel group; a mean is taken over them.
_ByGroup = Annotated[dict[str, Amount], Field(min_length=1)]


class RecordHead(TypedDict):
    """What every version's `metrics.json` has: whether the rest can be read at all, and is complete."""

    schema_version: int
    status: str


class _Metrics(RecordHead):
    """What a run has in every state; of what a stage adds, a run that is killed in it has not."""

    name: str
    config_hash: str
    seconds: dict[str, Seconds]
    protocol: NotRequired[Protocol]
    units: NotRequired[dict[str, str]]
    files: NotRequired[dict[FileName, Checksum]]
    model: NotRequired[str]
    texts: NotRequired[dict[str, str | dict[str, str]]]
    compute_dtype: NotRequired[str]
    moved_channels: NotRequired[_ByGroup]
    peak_host_memory_bytes: NotRequired[Whole]
    export: NotRequired[ExportSummary]
    evaluation: NotRequired[Evaluated]
    evaluation_hash: NotRequired[str]
    other_evaluations: NotRequired[list[OtherEvaluation]]
    code: NotRequired[list[str]]


class Metrics(_Metrics):
    """`metrics.json`, in whatever state the run is."""

    perplexity: NotRequired[dict[_Which, dict[str, Perplexity]]]
    zero_shot: NotRequired[dict[_Which, dict[str, Accuracy]]]
    tasks: NotRequired[dict[_Which, dict[str, TaskResult]]]
    placement: NotRequired[str]
    planned_memory_bytes: NotRequired[Whole]
    peak_memory_bytes: NotRequired[Whole]
    sparsity: NotRequired[Sparsity]
    retained_saliency: NotRequired[_ByGroup]
    output_error: NotRequired[_ByGroup]


class FinishedRun(_Metrics):
    """`metrics.json` of a run that is finished."""

    perplexity: NotRequired[_Compared[Perplexity]]
    zero_shot: NotRequired[_Compared[Accuracy]]
    tasks: NotRequired[_Compared[TaskResult]]
    placement: NotRequired[str]
    planned_memory_bytes: NotRequired[Whole]
    peak_memory_bytes: Whole
    sparsity: Sparsity
    retained_saliency: _ByGroup
    output_error: _ByGroup


class Pass(TypedDict):
    """A line of `history.jsonl`: what an epoch of learning found."""

    loss: float
    measured_loss: NotRequired[float | None]
    temperature: NotRequired[float | None]
    flips: NotRequired[float | None]
    mask_flips: NotRequired[float]
    weights_learned: NotRequired[Whole]
    first_layer: NotRequired[Whole]
    last_layer: NotRequired[Whole]
    step_seconds: NotRequired[Seconds]
    peak_memory_bytes: NotRequired[Whole]


class Commit(TypedDict):
    """Of the checkout that computed something."""

    commit: str
    dirty: bool


class Hardware(TypedDict):
    """What something was computed on; memory in bytes."""

    system: str
    processor: str
    instructions: NotRequired[str]
    bfloat16_products: NotRequired[bool]
    cores: Positive | None
    threads: Positive
    memory_bytes: Whole
    device: str
    processes: NotRequired[Positive]
    gpu: NotRequired[Object]


class Environment(TypedDict):
    """`environment.json`."""

    versions: dict[str, str]
    git: Commit | None
    hardware: Hardware
    seed: int
    command: str
    started: str


class Option(TypedDict):
    """The settings of a group: the option that was chosen, and what this option has, as plain values."""

    name: str


class ModelOption(Option):
    """Group `model`."""

    source: NotRequired[str]
    dtype: NotRequired[str]
    hub_name: NotRequired[str | None]
    path: NotRequired[str | None]


class PrunedModel(TypedDict):
    """Group `model` of a run whose dense model is to be read again."""

    name: str
    source: Literal["wheel", "hub", "local", "random"]
    dtype: Literal["float32", "bfloat16", "float16", "float64"]
    hub_name: NotRequired[str | None]
    path: NotRequired[str | None]
    revision: NotRequired[str | None]
    wheel: NotRequired[Literal["smollm2-135m", "gemma3-270m"] | None]
    device: NotRequired[str]
    architecture: NotRequired[Object]
    bos: NotRequired[bool]
    accept_terms: NotRequired[bool]
    terms: NotRequired[str | None]
    licence: NotRequired[str | None]
    notice: NotRequired[str | None]


class CalibrationOption(TypedDict):
    """Group `calibration`."""

    dataset: str
    samples: NotRequired[Positive]
    length: NotRequired[Positive]


class Limited(TypedDict):
    """How much of a text or of a task's items an evaluation takes; None is all."""

    limit: NotRequired[Positive | None]


class EvaluationOption(TypedDict):
    """Group `evaluation`."""

    perplexity: Limited
    zero_shot: NotRequired[Limited]


class Settings(TypedDict):
    """`config.yaml`: the settings of a job, resolved."""

    name: str
    model: ModelOption
    pruner: Option
    permutation: Option
    sparsity: Pattern
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)]
    block_size: NotRequired[Positive]
    calibration: NotRequired[CalibrationOption]
    evaluation: NotRequired[EvaluationOption]
    mask: Option
    reconstruction: Option
    temperature: NotRequired[Option]
    inputs: NotRequired[dict[str, str | None]]


class FileList(TypedDict):
    """`checksums.json`: of the files beside it."""

    files: dict[FileName, Checksum]


class SweepJob(TypedDict):
    """What became of a job of a sweep, in the sweep's folder."""

    overrides: list[str]
    outcome: Literal["ran", "skipped", "failed"]
    reason: NotRequired[str]
    directory: NotRequired[PathName | None]


class TensorEntry(TypedDict):
    """An entry in the header of a safetensors file."""

    dtype: str
    shape: list[Whole]
    data_offsets: Annotated[list[Whole], Field(min_length=2, max_length=2)]


class TensorIndex(TypedDict):
    """`model.safetensors.index.json`: the file of each tensor, which lies in the same folder."""

    weight_map: Annotated[dict[str, FileName], Field(min_length=1)]


# Not a kernel of the hub, nor what transformers may take one for: it would be a stranger's code.
_Attention = Literal["eager", "sdpa"] | None


class ModelSettings(TypedDict):
    """A transformers `config.json`, of which transformers itself checks the rest.

    What takes the longer to build the larger it is has a limit.
    """

    model_type: str
    num_hidden_layers: NotRequired[Annotated[int, Field(ge=1, le=1000)]]
    hidden_size: NotRequired[Annotated[int, Field(ge=1, le=1_000_000)]]
    head_dim: NotRequired[Annotated[int, Field(ge=1, le=1_000_000)] | None]
    num_labels: NotRequired[Annotated[int, Field(ge=0, le=100_000)]]
    attn_implementation: NotRequired[_Attention]
    _attn_implementation: NotRequired[_Attention]
    transformers_weights: NotRequired[None]
    quantization_config: NotRequired[Object | None]
    gathers: NotRequired[list[str]]
