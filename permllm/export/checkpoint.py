"""Write the pruned model of a run as a checkpoint, tensor by tensor, from the run record and the dense model."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from permllm.config import DTYPES, ModelConfig, NMPattern
from permllm.errors import ConfigError, DataError, check_one_of, check_positive
from permllm.export.card import model_card, model_notice
from permllm.export.fold import FORMS, StoredOrder, stored_order
from permllm.export.gathered import sparse_config
from permllm.models.checkpoint import all_finite, parameter_names
from permllm.models.families import ChannelGroup, channel_groups
from permllm.models.load import hub_commit
from permllm.models.selection import recorded_groups
from permllm.models.source import DenseSource, dense_source
from permllm.runs.files import (
    CONFIG,
    ENVIRONMENT,
    METRICS,
    file_sha256,
    matches,
    read_json,
    read_yaml,
    write_json,
)
from permllm.runs.tensors import Pruned, save_tensors

log = logging.getLogger(__name__)

SUMMARY = "permllm.json"


@dataclass(frozen=True)
class Request:
    """What an export is asked for.

    Attributes:
        form: one of `FORMS`.
        dtype: of the weights; None is that of the run.
        shard_gb: largest size of a file, in 10^9 bytes.
    """

    form: str
    dtype: str | None = None
    shard_gb: float = 5.0

    def check(self) -> None:
        """Raise ConfigError when a value is not valid."""
        check_one_of("export.form", self.form, FORMS)
        if self.dtype is not None:
            check_one_of("export.dtype", self.dtype, DTYPES)
        check_positive("export.shard_gb", self.shard_gb)


def export_run(
    directory: Path,
    request: Request,
    target: Path,
    dense: Path | None = None,
    replace: bool = False,
) -> dict[str, Any]:
    """Write the pruned model of a run.

    Args:
        directory: of a run that has been pruned.
        request: form and dtype.
        target: the folder to write; must not hold anything yet. It appears when it is complete.
        dense: folder of the dense model, where it is no longer where the run found it.
        replace: an earlier checkpoint in the target, which stays until the new one is complete.

    Returns:
        The summary that is also written beside the model: form, pattern, size in bytes, seconds.

    Raises:
        ConfigError: the request cannot be met: the directory is no run, the orders do not fold, the
            target is not empty.
        DataError: the dense model is not the one that was pruned, or the record is incomplete.
    """
    request.check()
    started = time.perf_counter()
    if not replace:
        check_free(target)
    record = _Record(directory)
    model = ModelConfig(
        **(record.model | ({"source": "local", "path": str(dense)} if dense is not None else {}))
    )
    if model.source == "hub":
        # The commit that was pruned, whatever the branch holds by now.
        model.revision = hub_commit(record.metrics["model"])
    source = dense_source(model, record.config["seed"])
    # A model that moved can be told from another one only where the run found it in a folder too.
    comparable = dense is None or record.metrics["model"].startswith("local:")
    if comparable and source.identity != record.metrics["model"]:
        raise DataError(
            f"{directory} was pruned from {record.metrics['model']}, and this model is {source.identity}"
        )
    if not comparable:
        began = record.metrics["model"]
        log.warning(
            "nothing says whether %s is the model that was pruned, %s: only its shape is compared",
            dense,
            began,
        )
    return write_checkpoint(record, request, source, target, started, replace)


def write_checkpoint(
    record: PrunedRecord,
    request: Request,
    source: DenseSource,
    target: Path,
    started: float,
    replace: bool = False,
) -> dict[str, Any]:
    """Write a pruned model.

    Args:
        record: what is known of it.
        request: form and dtype.
        source: the model that was pruned; of its pruned linears, `record` makes the weights from
            what it gives.
        target: as in `export_run`.
        started: `time.perf_counter()` when it began.
        replace: as in `export_run`.

    Returns:
        As `export_run`; so are the errors.
    """
    if not replace:
        check_free(target)
    target = target.resolve()
    scratch = target.with_name(f".{target.name}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch, ignore_errors=True)  # of an export that was killed
        scratch.mkdir()
        summary = _write(record, request, source, scratch, started)
        shutil.rmtree(target, ignore_errors=True)
        scratch.rename(target)
    except OSError as error:
        raise DataError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return summary


def check_free(target: Path) -> None:
    """Raise ConfigError where a folder holds something already, or cannot be put in its place when it is complete."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is there already and not empty; choose another folder")
    if target.exists() and (os.path.samefile(target, os.curdir) or os.path.ismount(target)):
        what = "a mount point" if os.path.ismount(target) else "the working directory"
        raise ConfigError(f"{target} is {what}, which cannot be replaced; name a folder below it")


def present_export(folder: Path) -> dict[str, Any] | None:
    """Return the summary of an exported model if a folder holds one whose weights are as they were written."""
    try:
        summary = read_json(folder / SUMMARY)
        return summary if matches(folder, summary["sha256"]) else None
    except (DataError, KeyError):
        return None


class PrunedWeights(Protocol):
    """The orders and weights of a pruned model."""

    @property
    def orders(self) -> dict[str, Tensor]:
        """Int64 `(C_in,)` by channel group."""

    def weight(self, path: str, dense: Tensor) -> Tensor:
        """The pruned weight of a linear, original channel order, where `dense`, what the source has, is."""


class PrunedRecord(Protocol):
    """What an export needs to know of a pruned model."""

    @property
    def config(self) -> dict[str, Any]:
        """Resolved, as in `config.yaml`."""

    @property
    def metrics(self) -> dict[str, Any]:
        """As in `metrics.json`."""

    @property
    def environment(self) -> dict[str, Any]:
        """As in `environment.json`; empty where it is not known."""

    @property
    def pattern(self) -> NMPattern:
        """N:M, of what `sparsity.patterns` of the metrics does not name."""

    def pruned(self, groups: list[ChannelGroup]) -> PrunedWeights:
        """Its orders and weights, for these channel groups, which were pruned."""


class _Record:
    """Of a run directory; masks and changed weights one at a time."""

    def __init__(self, directory: Path) -> None:
        if not (directory / METRICS).is_file():
            raise ConfigError(f"{directory} is not a run directory: it has no {METRICS}")
        self.metrics = read_json(directory / METRICS)
        if self.metrics.get("status") != "finished":
            raise ConfigError(
                f"{directory} is not finished (status {self.metrics.get('status')!r}); the same command continues it"
            )
        self.config = read_yaml(directory / CONFIG)
        environment = directory / ENVIRONMENT
        self.environment = read_json(environment) if environment.is_file() else {}
        known = {field.name for field in fields(ModelConfig)}
        try:
            self.model = {
                name: value for name, value in self.config["model"].items() if name in known
            }
            self.pattern = NMPattern.parse(self.config["sparsity"])
        except (KeyError, AttributeError) as error:
            raise DataError(f"{directory / CONFIG} holds no settings of a run") from error
        self._directory = directory

    def pruned(self, groups: list[ChannelGroup]) -> PrunedWeights:
        """Return the permutations and weights."""
        return Pruned(self._directory, self.metrics)


def _write(
    record: PrunedRecord, request: Request, source: DenseSource, folder: Path, started: float
) -> dict[str, Any]:
    _write_settings("generation_config", source.generation, folder)
    skeleton = source.skeleton
    groups = channel_groups(skeleton)
    left = recorded_groups(groups, record.pattern, record.metrics["sparsity"].get("patterns", {}))
    pruned = {f"{path}.weight": path for group in left for path in group.members}
    kept = record.pruned(left)
    stored = stored_order(request.form, skeleton, groups, kept.orders)
    dtype = getattr(torch, request.dtype or record.config["model"]["dtype"])

    shapes = dict(skeleton.state_dict())
    planned: dict[str, Tensor] = {}
    for name in parameter_names(skeleton):
        floating = shapes[name].is_floating_point()
        planned[name] = torch.empty(
            shapes[name].shape, dtype=dtype if floating else None, device="meta"
        )
    for path, order in stored.gathers.items():
        planned[f"{path}.input_order"] = torch.empty(order.shape, dtype=torch.int32, device="meta")

    def make(name: str) -> Tensor:
        if name.endswith(".input_order"):
            return stored.gathers[name.removesuffix(".input_order")].to(torch.int32)
        return _stored(record, kept, source, stored, name, pruned.get(name), dtype)

    config = _config(source, stored, dtype)
    _write_settings("config", config, folder)  # before anything large
    files = write_shards(folder, planned, make, int(request.shard_gb * 1e9))

    source.save_tokenizer(folder)
    others = record.metrics["sparsity"].get("patterns")
    summary = {
        "form": request.form,
        "sparsity": str(record.pattern),
        **({"patterns": others} if others else {}),
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in planned.values()),
        "config_hash": record.metrics["config_hash"],
        "shard_gb": request.shard_gb,
        "gathers": len(stored.gathers),
        "sha256": {name: file_sha256(folder / name) for name in files},
        "seconds": time.perf_counter() - started,
    }
    write_json(folder / SUMMARY, summary)
    (folder / "README.md").write_text(
        model_card(record.config, record.metrics, record.environment, summary), encoding="utf-8"
    )
    notice = model_notice(record.config)
    if notice is not None:
        (folder / "NOTICE").write_text(f"{notice}\n", encoding="utf-8")
    return summary


def write_shards(
    folder: Path, planned: Mapping[str, Tensor], make: Callable[[str], Tensor], largest: int
) -> list[str]:
    """Write tensors as `model.safetensors`, or as several files and the index that transformers reads.

    Args:
        folder: an existing one.
        planned: shape and dtype of each tensor, by name; may be on the meta device.
        make: gives a tensor by its name; those of one file are in memory at a time.
        largest: size of a file in bytes, at most, where no tensor is larger.

    Returns:
        The names of the files with tensors.
    """
    split = split_torch_state_dict_into_shards(
        dict(planned), filename_pattern="model{suffix}.safetensors", max_shard_size=largest
    )
    for file, names in split.filename_to_tensors.items():
        save_tensors(folder / file, {name: make(name) for name in names})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)
    return list(split.filename_to_tensors)


def _write_settings(name: str, settings: PreTrainedConfig | GenerationConfig, folder: Path) -> None:
    try:
        settings.save_pretrained(folder)
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"model.{name} cannot be saved by transformers: {reason}") from error


def _stored(
    record: PrunedRecord,
    kept: PrunedWeights,
    source: DenseSource,
    stored: StoredOrder,
    name: str,
    path: str | None,
    dtype: torch.dtype,
) -> Tensor:
    """One tensor as the checkpoint holds it."""
    tensor = source.read(name)
    if not tensor.is_floating_point():
        return tensor
    # The masks belong to the weights in the run's dtype.
    tensor = tensor.to(getattr(torch, record.config["model"]["dtype"]))
    if path is not None:
        tensor = kept.weight(path, tensor)
    cast = tensor.to(dtype)
    if not all_finite(cast):
        if not all_finite(tensor):
            raise DataError(f"{name} holds values that are not finite")
        raise DataError(
            f"{name} does not fit into {str(dtype).removeprefix('torch.')}: export it in another dtype"
        )
    # Adding +0.0 turns -0.0, which some sparse kernels break on, into +0.0, and changes nothing
    # else.
    return stored.apply(name, cast + 0.0 if path is not None else cast)


def _config(source: DenseSource, stored: StoredOrder, dtype: torch.dtype) -> PreTrainedConfig:
    config = source.skeleton.config
    vars(config).pop(
        "auto_map", None
    )  # of remote code, which nothing here runs and no export holds
    architecture = type(source.skeleton).__name__
    if stored.gathers:
        config = sparse_config(config, sorted(stored.gathers))
        architecture = f"Sparse{architecture}"
    config.architectures = [architecture]
    config.dtype = dtype
    return config
