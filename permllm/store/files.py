"""Files of a run directory: their names, and functions that write a complete file or none."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from permllm.errors import DataError, first_line
from permllm.runtime.files import file_sha256

# Version of `metrics.json` and of files of records.
SCHEMA_VERSION = 3

CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
LOG = "run.log"
METRICS = "metrics.json"
EVALUATIONS = "evaluations"
HISTORY = "history.jsonl"
ALLOCATION = "allocation.json"
PERMUTATIONS = "permutations.safetensors"
MASKS = "masks.safetensors"
# Folders: weights and pruned layers, with one file for each layer, and the exported checkpoint.
WEIGHTS = "weights"
PRUNED_LAYERS = "pruned_layers"
EXPORT = "export"
# Summary of an export, beside its weights or masks.
SUMMARY = "permllm.json"
LCP_CHECKPOINT = "lcp_checkpoint.pt"
MASK_CHECKPOINT = "mask_checkpoint.pt"
DISTILL_CHECKPOINT = "distill_checkpoint.pt"
# Files of loggers: the folder of TensorBoard, and the id of the W&B run.
TENSORBOARD = "tensorboard"
WANDB_ID = ".wandb-id"
# Prefix, in loggers, of values that tables need and a person seldom looks at.
RECORD = "record"
OF_LOGGERS = (TENSORBOARD, WANDB_ID)
# Files that only an unfinished run needs.
UNFINISHED = (LCP_CHECKPOINT, MASK_CHECKPOINT, DISTILL_CHECKPOINT, PRUNED_LAYERS)
RESULTS = (EVALUATIONS, HISTORY, ALLOCATION, PERMUTATIONS, MASKS, WEIGHTS, EXPORT, *UNFINISHED)

# Usual name, and suffix, of a file of records, which has one run in each line.
RECORDS = "records.jsonl"
LINES = ".jsonl"


def layer_file(folder: str, layer: int) -> str:
    """Return the name of a decoder layer's file, in `WEIGHTS` or `PRUNED_LAYERS`."""
    return f"{folder}/{layer:05d}.safetensors"


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside `path`, and rename it to `path` at the end.

    The caller must hold a lock if several processes may write `path`.

    Raises:
        DataError: `path` is a device or a folder, or the file cannot be written, for example
            because the disk is full. `path` is unchanged.
    """
    if path.exists() and not path.is_file():  # a device, which root could replace
        raise DataError(f"{path} is no file: expected a file, or nothing")
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(b"")
        mode = scratch.stat().st_mode  # from the umask, which some libraries ignore
        yield scratch
        scratch.chmod(mode)
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        raise DataError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with replaced(path) as scratch:
        scratch.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises DataError, which names the file, if it cannot be read or has another content.
    """
    return _mapping(path, json.loads)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file. Errors as `read_json`."""
    return _mapping(path, yaml.safe_load)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the JSON objects of a file, one in each line that is not blank; no file: none.

    Errors as `read_json`.
    """
    if not path.exists():
        return []

    def parse(text: str) -> list[dict[str, Any]]:
        return [dict(json.loads(line)) for line in text.splitlines() if line.strip()]

    return _read(path, parse)


def _mapping(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    value = _read(path, parse)
    if not isinstance(value, dict):
        raise DataError(f"{path} has a {type(value).__name__}: expected keys and values")
    return value


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `target`, and rename it to `target` at the end.

    The caller must hold a lock if several processes may write `target`.

    Raises:
        DataError: the folder cannot be written, for example because the disk is full.
    """
    scratch = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(scratch, ignore_errors=True)  # a killed process may have left it
        scratch.mkdir(parents=True)
        yield scratch
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot write {target}: {first_line(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_sha256(directory: Path, name: str, digest: str) -> None:
    """Raise DataError, which names the file, unless a file of a run directory has this sha256."""
    path = directory / name
    if not path.is_file():
        raise DataError(f"{path} is missing; force=true runs it again")
    if file_sha256(path) != digest:
        raise DataError(f"{path} has changed since the run wrote it; force=true runs it again")
