"""The text that settings name: of this package, of a module of someone's own, or a file."""

from __future__ import annotations

import pkgutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

from permllm.config import CalibrationConfig, PerplexityConfig
from permllm.data import texts
from permllm.data.text_file import TextFile
from permllm.data.texts.base import Text
from permllm.errors import ConfigError, check_one_of, check_whole, first_line

_FILE = "text"
_NO_TEXT = "base"


@dataclass(frozen=True)
class NamedText:
    """A text and what is known of it by its name.

    Attributes:
        name: of what is measured on it.
        text: the text.
        kept: its tokens may be kept for other jobs. The version of a stranger's code is not known.
    """

    name: str
    text: Text
    kept: bool = True


def calibration_text(config: CalibrationConfig) -> NamedText:
    """What is calibrated on.

    Raises:
        ConfigError: the name is no text's, or its text is not to calibrate on.
        DataError: a file's ending is none that can be read.
    """
    if config.dataset == _FILE:
        if not config.data_files:
            raise ConfigError(
                "calibration=text needs calibration.data_files=PATH, a txt, json lines or parquet file"
            )
        return _of_file(config.data_files)
    if config.data_files:
        raise ConfigError(f"calibration.data_files={config.data_files!r} needs calibration=text")
    return _of_module("calibration.dataset", config.dataset, "calibrates", (_FILE,))


def perplexity_texts(config: PerplexityConfig) -> list[NamedText]:
    """What perplexity is measured on; nothing where it is not.

    Raises:
        ConfigError: a name is no text's or another one's too, or its text is not to be evaluated
            on.
        DataError: a file's ending is none that can be read.
    """
    if config.data_files:
        return [_of_file(config.data_files)]
    key = "evaluation.perplexity.dataset"
    found = [_of_module(key, str(name), "evaluates") for name in config.names]
    names = [text.name for text in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(
            f"{key}={config.names} has {twice} twice: a result goes by its text's name, so name each text once"
        )
    return found


def check_texts(calibration: CalibrationConfig, perplexity: PerplexityConfig) -> None:
    """Raise ConfigError or DataError where either names no text that is for its use; no text is read."""
    calibrated = calibration_text(calibration)
    files = calibration.data_files, perplexity.data_files
    if all(files) and len({TextFile(str(file)).digest(calibration=True) for file in files}) == 1:
        raise ConfigError(
            f"evaluation.perplexity.data_files={perplexity.data_files!r} is the file that calibration reads: nothing of it "
            "is held out"
        )
    for named in perplexity_texts(perplexity):
        if named.text is calibrated.text and named.text.one_use:
            raise ConfigError(
                f"evaluation.perplexity.dataset={named.name!r} is not held out from calibration.dataset={named.name!r}, which "
                "sees all of it: calibrate on another text, or leave it out of the evaluation"
            )


def _of_file(path: str) -> NamedText:
    return NamedText(Path(path).stem, TextFile(path))


def _of_module(
    key: str, name: str, use: Literal["calibrates", "evaluates"], others: tuple[str, ...] = ()
) -> NamedText:
    if "." in name:
        module = name
    else:
        known = [
            found.name for found in pkgutil.iter_modules(texts.__path__) if found.name != _NO_TEXT
        ]
        usable = [
            one.replace("_", "-")
            for one in known
            if getattr(_loaded(key, f"{texts.__name__}.{one}"), use)
        ]
        check_one_of(key, name, (*usable, *others))
        module = f"{texts.__name__}.{name.replace('-', '_')}"
    text = _loaded(key, module)
    if not getattr(text, use):
        raise ConfigError(f"{key}={name!r} is not valid: its text has `{use} = False`")
    ours = module.partition(".")[0] == __name__.partition(".")[0]
    return NamedText(name.rpartition(".")[2], text, kept=ours)


def _loaded(key: str, module: str) -> Text:
    """The `TEXT` of a module, with all that it will be asked for: hours later would be late."""
    key = f"{key}={module}"
    try:
        text = getattr(import_module(module), "TEXT", None)
    except Exception as error:  # a module of someone else's may raise anything
        raise ConfigError(f"{key} cannot be imported: {first_line(error)}") from error
    if not isinstance(text, Text):
        raise ConfigError(
            f"{key}: the module needs a TEXT, an object whose class derives from permllm.data.texts.base.Text"
        )
    if text.max_windows is not None:
        check_whole(f"{key}: max_windows", text.max_windows, 1)
    return text
