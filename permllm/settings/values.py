"""Types of the values of settings, and the error for a value that is not valid."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, ConfigDict, Field, ValidationError

from permllm.errors import ConfigError

T = TypeVar("T")

# Configuration of every class of settings.
SETTINGS = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

Whole = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
Length = Annotated[int, Field(strict=True, ge=2)]
Amount = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


def _texts(value: Any) -> Any:
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return value[0] if len(value) == 1 else value  # a list of one is the same evaluation
    raise ValueError("expected the name of a text, a list of names, or null")


def _names(value: Any) -> list[str]:
    """Return indices of layers and names of modules as strings, each once, in their order."""
    names = [] if value is None else value if isinstance(value, list) else [value]
    for name in names:
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise ValueError(f"{name!r} is neither the index of a layer nor the name of a module")
    return list(dict.fromkeys(map(str, names)))


def _patterns(value: Any) -> dict[str, Any]:
    if not isinstance(value or {}, dict):
        raise ValueError("expected N:M by name, as in sparsity_of={down_proj: 4:8}")
    _names(list(value or {}))
    return {str(name): value[name] for name in sorted(value or {}, key=str)}


# Arguments of another library; null: none.
Arguments = Annotated[dict[str, Any], BeforeValidator(lambda value: value or {})]
# Name of a text, or names of several; None: no text.
Texts = Annotated[Any, BeforeValidator(_texts)]
# Indices of layers and names of modules.
Names = Annotated[list[str], BeforeValidator(_names)]
# Values by index of a layer or name of a module, sorted by name.
ByName = Annotated[dict[str, Any], BeforeValidator(_patterns)]


def validated(kind: type[T], settings: Mapping[str, Any], prefix: str = "") -> T:
    """Return an object of a class of settings.

    Args:
        kind: the class, a dataclass of pydantic.
        settings: values of its fields.
        prefix: as in `refused`.

    Raises:
        ConfigError: pydantic refuses a value.
    """
    try:
        return kind(**settings)
    except ValidationError as error:
        raise refused(error, settings, prefix) from error


def refused(error: ValidationError, settings: Mapping[str, Any], prefix: str = "") -> ConfigError:
    """Return the error `key=value: reason` for the first setting that pydantic refuses.

    Args:
        error: error of pydantic.
        settings: settings that pydantic got.
        prefix: key of the group of these settings; empty: the top level.
    """
    refusals = [
        (_place(settings, of_key["loc"]), of_key) for of_key in error.errors(include_url=False)
    ]
    place, first = refusals[0]
    key = ".".join([prefix, *place] if prefix else place)
    if first["type"] == "missing":
        return ConfigError(f"{key} must be given")
    if first["type"] == "unexpected_keyword_argument":
        return ConfigError(f"{key} is no setting")
    value: Any = settings
    for name in place:
        value = value[name]
    reasons = dict.fromkeys(_reason(of_key["msg"]) for other, of_key in refusals if other == place)
    return ConfigError(f"{key}{f'={value!r}' if place else ''}: {' or '.join(reasons)}")


def _place(settings: Any, loc: Iterable[int | str]) -> list[str]:
    """Return the keys of a setting, without the parts of a union that pydantic adds."""
    place: list[str] = []
    for part in loc:
        if not isinstance(settings, Mapping):
            break
        place.append(str(part))
        settings = settings.get(part)
    return place


def _reason(message: str) -> str:
    for of_pydantic, ours in {
        "Value error, ": "",
        "Input should be": "must be",
        "greater than or equal to": "at least",
    }.items():
        message = message.replace(of_pydantic, ours)
    return message
