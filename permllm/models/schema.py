"""Forms of the files of a stranger's checkpoint, checked by pydantic before transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Hashable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired, TypeVar, cast

from pydantic import Field, JsonValue, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from permllm.errors import DataError, first_line, printable
from permllm.runs import files

Schema = TypeVar("Schema")

# Characters of a value that are shown.
_SHOWN = 60
Object = dict[str, JsonValue]
FileName = Annotated[str, Field(pattern=r"^[^/\\\\\x00]+$")]


def read_json(path: Path, schema: type[Schema]) -> Schema:
    """Read a JSON file by a form.

    Raises DataError, which names the file and the first field that is not as it must be.
    """
    value = files.read_json(path)
    try:
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # half of a character can be neither printed nor passed on
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable JSON: {first_line(error)}") from error
    return validated(str(path), value, schema)


def validated(where: str, value: Any, schema: type[Schema]) -> Schema:
    """Return the value if it is as a schema says.

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
        raise DataError(
            f"{where}: {f'{field}: ' if field else ''}{message}, and it is {shown}"
        ) from error
    return cast(Schema, value)


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


@cache
def _adapter(schema: Hashable) -> TypeAdapter[Any]:
    return TypeAdapter(cast(Any, schema))


class TensorIndex(TypedDict):
    """`model.safetensors.index.json`: the file of each tensor, which lies in the same folder."""

    weight_map: Annotated[dict[str, FileName], Field(min_length=1)]


# Not a kernel of the hub, nor what transformers may take one for: it would be a stranger's code.
_Attention = Literal["eager", "sdpa"] | None


class ModelSettings(TypedDict):
    """Settings of a transformers `config.json`; transformers itself checks the rest.

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
