"""Files of a run directory: their names, and writing that leaves a whole file or none."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from permllm.errors import DataError, first_line

# Of `metrics.json` and of kept records.
SCHEMA_VERSION = 3

CONFIG, ENVIRONMENT, LOG = "config.yaml", "environment.json", "run.log"
METRICS, EVALUATIONS, HISTORY = "metrics.json", "evaluations", "history.jsonl"
PERMUTATIONS, MASKS = "permutations.safetensors", "masks.safetensors"
# Folders: of weights and of pruned layers with a file of each layer, and of the checkpoint.
WEIGHTS, PRUNED_LAYERS, EXPORT = "weights", "pruned_layers", "export"
CHECKPOINT, MASK_CHECKPOINT = "lcp_checkpoint.pt", "mask_checkpoint.pt"
DISTILL_CHECKPOINT, BEST_SO_FAR = "distill_checkpoint.pt", "best_so_far.safetensors"
# Of loggers: TensorBoard's curves, and the id of the W&B run.
TENSORBOARD, WANDB_ID = OF_LOGGERS = "tensorboard", ".wandb-id"
# Only an unfinished run needs these.
UNFINISHED = (CHECKPOINT, MASK_CHECKPOINT, DISTILL_CHECKPOINT, BEST_SO_FAR, PRUNED_LAYERS)
RESULTS = (EVALUATIONS, HISTORY, PERMUTATIONS, MASKS, WEIGHTS, EXPORT, *UNFINISHED)

# Kept runs, a line each; any such file ends with the suffix.
RECORDS = "records.jsonl"
LINES = ".jsonl"


def layer_file(folder: str, layer: int) -> str:
    """Return the name of a decoder layer's file, in `WEIGHTS` or `PRUNED_LAYERS`."""
    return f"{folder}/{layer:05d}.safetensors"


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """Give a scratch file beside `path`, and rename it to `path` at the end.

    One process writes a target at a time: locks are the caller's.

    Raises:
        DataError: the file cannot be written, for example because the disk is full. The target
            stays as it was.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path} is no file and cannot be replaced by one")
    scratch = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(b"")
        mode = scratch.stat().st_mode  # as the umask says, which not every library heeds
        yield scratch
        scratch.chmod(mode)
        os.replace(scratch, path)
    except (OSError, RuntimeError) as error:  # the latter is torch.save's where the disk is full
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

    Raises DataError, which names the file, where it cannot be read or holds something else.
    """
    return _read(path, json.loads, "JSON")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping from a YAML file. Errors as `read_json`."""
    return _read(path, yaml.safe_load, "YAML")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file with a JSON object a line; without a file there are none.

    Errors as `read_json`.
    """
    if not path.exists():
        return []

    def parse(text: str) -> list[dict[str, Any]]:
        return [dict(json.loads(line)) for line in text.splitlines()]

    return _read(path, parse, "JSON", list)


def _read(path: Path, parse: Callable[[str], Any], form: str, kind: type = dict) -> Any:
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} is not readable {form}: {first_line(error)}") from error
    if not isinstance(value, kind):
        raise DataError(f"{path} holds a {type(value).__name__}, expected a {kind.__name__}")
    return value


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, hexadecimal. Raises DataError where it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a scratch folder beside `target`, and rename it to `target` at the end.

    One process writes a target at a time: locks are the caller's.

    Raises:
        DataError: the folder cannot be written, for example because the disk is full.
    """
    scratch = target.with_name(f".{target.name}.tmp")
    try:
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
        scratch.mkdir(parents=True)
        yield scratch
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    except (OSError, SafetensorError) as error:
        raise DataError(f"cannot write {target}: {first_line(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def matches(folder: Path, digests: Mapping[str, str]) -> bool:
    """Return whether each of these files of a folder has this sha256.

    Raises DataError where one cannot be read.
    """
    return all(file_sha256(folder / name) == digest for name, digest in digests.items())
