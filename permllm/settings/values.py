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


def _texts(given: Any) -> Any:
    if given is None or isinstance(given, str):
        return given
    if isinstance(given, list) and given and all(isinstance(name, str) for name in given):
        return given[0] if len(given) == 1 else given  # a list of one is the same evaluation
    raise ValueError("expected the name of a text, a list of names, or null")


def _names(given: Any) -> list[str]:
    """Return indices of layers and names of modules as strings, each once, in the given order."""
    names = [] if given is None else given if isinstance(given, list) else [given]
    for name in names:
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            raise ValueError(f"{name!r} is neither the index of a layer nor the name of a module")
    return list(dict.fromkeys(map(str, names)))


def _patterns(given: Any) -> dict[str, Any]:
    if not isinstance(given or {}, dict):
        raise ValueError("expected N:M by name, as in sparsity_of={down_proj: 4:8}")
    _names(list(given or {}))
    return {str(name): given[name] for name in sorted(given or {}, key=str)}


# Arguments of another library; null: none.
Arguments = Annotated[dict[str, Any], BeforeValidator(lambda given: given or {})]
# Name of a text, or names of several; None: no text.
Texts = Annotated[Any, BeforeValidator(_texts)]
# Indices of layers and names of modules.
Names = Annotated[list[str], BeforeValidator(_names)]
# Values by index of a layer or name of a module, sorted by name.
ByName = Annotated[dict[str, Any], BeforeValidator(_patterns)]


def validated(kind: type[T], given: Mapping[str, Any], prefix: str = "") -> T:
    """Return an object of a class of settings.

    Args:
        kind: the class, a dataclass of pydantic.
        given: values of its fields.
        prefix: as in `refused`.

    Raises:
        ConfigError: pydantic refuses a value.
    """
    try:
        return kind(**given)
    except ValidationError as error:
        raise refused(error, given, prefix) from error


def refused(error: ValidationError, given: Mapping[str, Any], prefix: str = "") -> ConfigError:
    """Return the error `key=value: reason` for the first setting that pydantic refuses.

    Args:
        error: error of pydantic.
        given: settings that pydantic got.
        prefix: key of the group of these settings; empty: the top level.
    """
    found = [(_place(given, one["loc"]), one) for one in error.errors(include_url=False)]
    place, first = found[0]
    key = ".".join([prefix, *place] if prefix else place)
    if first["type"] == "missing":
        return ConfigError(f"{key} must be given")
    if first["type"] == "unexpected_keyword_argument":
        return ConfigError(f"{key} is no setting")
    value: Any = given
    for name in place:
        value = value[name]
    reasons = dict.fromkeys(_reason(one["msg"]) for other, one in found if other == place)
    return ConfigError(f"{key}{f'={value!r}' if place else ''}: {' or '.join(reasons)}")


def _place(given: Any, loc: Iterable[int | str]) -> list[str]:
    """Return the keys of a setting, without the parts of a union that pydantic adds."""
    place: list[str] = []
    for part in loc:
        if not isinstance(given, Mapping):
            break
        place.append(str(part))
        given = given.get(part)
    return place


def _reason(message: str) -> str:
    for theirs, ours in {
        "Value error, ": "",
        "Input should be": "must be",
        "greater than or equal to": "at least",
    }.items():
        message = message.replace(theirs, ours)
    return message
