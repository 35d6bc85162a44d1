"""What the files that others have written must hold: one declared form for each kind, checked by pydantic, types and all.

Keys that a form does not name may stand beside those that it does: a newer version's, or somebody's own.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import cache
from typing import Annotated, Any, NotRequired, TypeVar, cast

from pydantic import AfterValidator, Field, JsonValue, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from permllm.errors import ConfigError, DataError
from permllm.sparsity import NMPattern

Schema = TypeVar("Schema")

# Of a value that is not valid, characters that are shown.
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
        field = ".".join(str(part) for part in first["loc"])
        shown = repr(first["input"])
        shown = shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise DataError(f"{where}: {f'{field}: ' if field else ''}{message}, and it is {shown}") from error
    return cast(Schema, value)


@cache
def _adapter(schema: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, schema))


def _pattern(text: str) -> str:
    try:
        return str(NMPattern.parse(text))
    except ConfigError as error:
        raise ValueError(str(error)) from error


Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
# Not NaN, which is neither above nor below anything; a perplexity may be infinite.
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Pattern = Annotated[str, AfterValidator(_pattern)]
Object = dict[str, JsonValue]
FileName = Annotated[str, Field(pattern=r"^[^/\\\\]+$")]


class Perplexity(TypedDict):
    """Of one text, in `metrics.json`."""

    value: Amount
    window: Positive
    tokens: Positive


class Accuracy(TypedDict):
    """Of one zero-shot task, in `metrics.json`."""

    acc: Share | None
    acc_norm: Share | None
    stderr: Amount | None
    n: Positive | None
    limited: bool
    split: str | None
    data: NotRequired[str | None]


class Sparsity(TypedDict):
    """What pruning left, in `metrics.json`."""

    pattern: Pattern
    fraction: Share
    violations: Whole
    weights_changed: NotRequired[bool]


class TensorEntry(TypedDict):
    """An entry in the header of a safetensors file."""

    dtype: str
    shape: list[Whole]
    data_offsets: Annotated[list[Whole], Field(min_length=2, max_length=2)]


class TensorIndex(TypedDict):
    """`model.safetensors.index.json`: the file of each tensor, which lies in the same folder."""

    weight_map: Annotated[dict[str, FileName], Field(min_length=1)]


class ModelSettings(TypedDict):
    """A transformers `config.json`, of which transformers itself checks the rest."""

    model_type: str
