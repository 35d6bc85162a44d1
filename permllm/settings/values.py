"""Types of the values of settings, and the error for a value that is not valid."""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError

from permllm.errors import ConfigError

T = TypeVar("T")

# Configuration of every class of settings.
SETTINGS = ConfigDict(extra="forbid", coerce_numbers_to_str=True)

Whole = Annotated[int, Field(strict=True, ge=0)]
Count = Annotated[int, Field(strict=True, ge=1)]
Length = Annotated[int, Field(strict=True, ge=2)]
Amount = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


def _as_count(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Count that may be typed as 1e6.
Round = Annotated[Count, BeforeValidator(_as_count)]


def _one_text(value: str | list[str]) -> str | list[str]:
    """Return a list of one text as the text, because both are the same run."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def as_list(value: Any) -> list[Any]:
    """Return a value as a list of it; a list as it is, and None as an empty one."""
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


# Validator of settings that may be null, which is none of them.
NULL_IS_EMPTY = BeforeValidator(lambda value: value or {})
# Arguments of another library.
Arguments = Annotated[dict[str, Any], NULL_IS_EMPTY]
# Name of a text, or names of several.
Texts = Annotated[str | Annotated[list[str], Field(min_length=1)], AfterValidator(_one_text)]
# Indices of layers and names of modules, each once.
Names = Annotated[
    list[str], BeforeValidator(as_list), AfterValidator(lambda names: list(dict.fromkeys(names)))
]


def validated(kind: type[T], settings: Mapping[str, Any], prefix: str = "") -> T:
    """Return an object of a pydantic dataclass; raise ConfigError, as `refusal`, for its values."""
    try:
        return kind(**settings)
    except ValidationError as error:
        raise refusal(error, settings, prefix) from error


def refusal(error: ValidationError, settings: Mapping[str, Any], prefix: str = "") -> ConfigError:
    """Return the error `key=value: reason` for the first setting that pydantic refuses.

    `prefix` is the key of the group of these settings; empty: the top level.
    """
    details = error.errors(include_url=False)
    first = details[0]
    place = _place(settings, first["loc"])
    key = ".".join(filter(None, [prefix, *place]))
    if first["type"] == "missing":
        return ConfigError(f"{key} must be given")
    if first["type"] == "unexpected_keyword_argument":
        return ConfigError(f"{key} is no setting")
    # A value may be valid in several ways, and is then refused for several reasons.
    same = [detail for detail in details if _place(settings, detail["loc"]) == place]
    reasons = dict.fromkeys(_reason(detail["msg"]) for detail in same)
    value = f"={first['input']!r}" if place else ""
    return ConfigError(f"{key}{value}: {' or '.join(reasons)}")


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


def flatten(values: Mapping[str, Any], separator: str = ".", prefix: str = "") -> dict[str, Any]:
    """Return nested values as one level, with joined keys and without empty mappings."""
    flat: dict[str, Any] = {}
    for key, part in values.items():
        if isinstance(part, Mapping):
            flat |= flatten(part, separator, f"{prefix}{key}{separator}")
        else:
            flat[f"{prefix}{key}"] = part
    return flat


def nested(flat: Mapping[str, Any], separator: str = ".") -> dict[str, Any]:
    """Return values of one level, with joined keys, as nested values."""
    values: dict[str, Any] = {}
    for key, value in flat.items():
        *folders, name = key.split(separator)
        place = values
        for folder in folders:
            place = place.setdefault(folder, {})
        place[name] = value
    return values
