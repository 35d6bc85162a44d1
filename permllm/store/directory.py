"""Run directory. A file that exists is complete; a run resumes after its last file."""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from filelock import FileLock, Timeout

from permllm.errors import ConfigError, DataError, InUseError
from permllm.runtime import parallel
from permllm.runtime.files import file_sha256
from permllm.runtime.memory import peak_host_memory, peak_memory, return_freed_memory
from permllm.settings.config import RunConfig, identity_of
from permllm.settings.identity import digest_of
from permllm.settings.values import flatten
from permllm.store.files import (
    CONFIG,
    EVALUATIONS,
    HISTORY,
    METRICS,
    OF_LOGGERS,
    RESULTS,
    SCHEMA_VERSION,
    UNFINISHED,
    WEIGHTS,
    check_sha256,
    read_json,
    read_lines,
    read_yaml,
    write_json,
    write_text,
)

# Logger of the file `run.log` alone, because a terminal has progress bars instead.
run_log = logging.getLogger("permllm.run_log")
run_log.setLevel(logging.INFO)
run_log.propagate = False

Value = TypeVar("Value")

# Names of chosen options, which change no result.
_LABELS = ("protocol", "method")
# Keys of the last evaluation that `metrics.json` repeats.
_COPIED = ("evaluation", "evaluation_hash", "perplexity", "tasks", "evaluated_texts")


class Record:
    """Metrics, history and files of a job, in memory. `RunDirectory` keeps them on disk.

    All ranks call the methods. Only rank 0 reads and writes files; the other ranks get its values.

    Attributes:
        directory: folder of the files; None: no file is kept.
        metrics: content of `metrics.json`.
        evaluation: results of the evaluation that the settings ask for: `perplexity`, `tasks`,
            `scores`, `seconds`.
        history: one entry for each epoch of learning.
    """

    directory: Path | None = None

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {"seconds": {}}
        self.evaluation: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        # Seconds of the phases inside the running phase; None: no phase runs.
        self._inside: float | None = None

    def save(self) -> None:
        """Write the metrics."""

    def read(self, name: str, load: Callable[[Path], Value]) -> Value | None:
        """Read a file of an earlier process; None: there is no such file."""
        return None

    def write(self, name: str, value: Value, save: Callable[[Path, Value], None]) -> None:
        """Write a file."""

    def get_or_compute(
        self,
        name: str,
        compute: Callable[[], Value],
        save: Callable[[Path, Value], None],
        load: Callable[[Path], Value],
    ) -> Value:
        """Read a file of an earlier process, or else compute and save it."""
        value = self.read(name, load)
        if value is None:
            value = parallel.broadcast(compute())
            self.write(name, value, save)
        return value

    def write_history(self, lines: list[dict[str, Any]]) -> None:
        """Replace the history by these lines."""
        self.history = lines

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        """Record the dtype of matrix products; raise ConfigError if the run began with another."""
        products = str(dtype).removeprefix("torch.")
        before = self.metrics.setdefault("compute_dtype", products)
        if before != products:
            raise ConfigError(
                f"{self.directory} began with products in {before}, and here they would be in "
                f"{products}: add compute_dtype={before} run_dir={self.directory} to continue it, "
                "or force=true to run it again"
            )

    @contextmanager
    def phase(self, name: str, device: torch.device) -> Iterator[None]:
        """Record the seconds and the peak memory of a phase, also if it is interrupted.

        The seconds of a phase inside another one count only for the inner phase.
        """
        outer = self._inside
        self._inside = 0.0
        if outer is None:
            return_freed_memory()  # it would count in the peak of this phase
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            record = self.evaluation if name.startswith("evaluate") else self.metrics
            seconds = record.setdefault("seconds", {})
            seconds[name] = seconds.get(name, 0.0) + took - self._inside
            self._inside = None if outer is None else outer + took
            self._keep_peak("peak_memory_bytes", peak_memory(device))
            self._keep_peak("peak_host_memory_bytes", peak_host_memory())
            if outer is None:
                run_log.info("%s: %.1f s", name, seconds[name])
                self.save()

    def _keep_peak(self, key: str, peak: int) -> None:
        self.metrics[key] = max(peak, self.metrics.get(key, 0))


class RunDirectory(Record):
    """Record of a run in its directory, which is made if it is missing.

    The states of a run are

        running --record_pruning--> pruned --finish--> finished --another evaluation--> pruned

    `metrics.json` has the `status` `running`, from the first `finish` on `finished`, and once the
    model is pruned `sparsity`. `evaluations/HASH.json` has `finished` once that evaluation is done.
    """

    directory: Path

    def __init__(self, directory: Path, config: RunConfig) -> None:
        super().__init__()
        self.directory = directory
        # False: files of an earlier run are still there, which `begin` replaces.
        self._has_begun = True
        self.config = dict(config.resolved)
        self.evaluation = {
            "evaluation": config.evaluation_identity,
            "evaluation_hash": digest_of(config.evaluation_identity),
        }
        self.metrics |= {
            "schema_version": SCHEMA_VERSION,
            "status": "running",
            "name": config.name,
            "config_hash": config.hash,
            "sha256": {},
        }

    @property
    def pruned(self) -> bool:
        """True: the model is pruned, so that only its evaluation may be missing."""
        return "sparsity" in self.metrics

    def is_finished(self) -> bool:
        """Tell in all ranks if the phases and the evaluation are finished and have their files."""
        if self.metrics["status"] != "finished" or "finished" not in self.evaluation:
            return False
        files = [self.directory / name for name in self.metrics["sha256"]]
        return parallel.on_main(lambda: all(map(Path.is_file, files)))

    @property
    def _evaluation_file(self) -> Path:
        return self.directory / EVALUATIONS / f"{self.evaluation['evaluation_hash']}.json"

    @contextmanager
    def opened(self, force: bool = False, wait: bool = True) -> Iterator[None]:
        """Lock the directory, and read the results of earlier processes.

        The directory is removed again if the run fails by its settings or its text before it has a
        result. With `force` earlier results are not read, and `begin` replaces them. While another
        process uses the run, `wait` decides between waiting and InUseError.

        Raises ConfigError if the directory belongs to another run, DataError if it is damaged.
        """
        with ExitStack() as locks:

            def lock_and_read() -> tuple[Any, ...]:
                self._lock(locks, wait)
                is_new = not self.directory.exists()
                self.directory.mkdir(exist_ok=True)
                self._check_config()
                if not force:
                    self._read()
                if not (self.directory / CONFIG).exists():
                    self._write_config()
                return is_new, self.metrics, self.evaluation, self.history

            self._has_begun = not force
            is_new, self.metrics, self.evaluation, self.history = parallel.on_main(lock_and_read)
            try:
                yield
            except (ConfigError, DataError):
                has_result = any((self.directory / name).exists() for name in RESULTS)
                if is_new and not has_result and parallel.rank() == 0:
                    shutil.rmtree(self.directory, ignore_errors=True)
                raise

    def _lock(self, locks: ExitStack, wait: bool) -> None:
        """Lock the directory. A process with another evaluation of the same run always waits."""
        place = self.directory.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        # Beside the directory, which may be removed, unless the user may change nothing there.
        folder = (place.parent if os.access(place.parent, os.W_OK) else place) / ".locks"
        folder.mkdir(exist_ok=True)
        same = FileLock(folder / f"{place.name}-{self.evaluation['evaluation_hash']}.lock")
        try:
            locks.enter_context(same.acquire(timeout=None if wait else 0))
        except Timeout as error:
            raise InUseError(f"{self.directory} is in use by another process") from error
        locks.enter_context(FileLock(folder / f"{place.name}.lock"))

    def _check_config(self) -> None:
        file = self.directory / CONFIG
        if not file.is_file():
            if any(not entry.name.startswith(".") for entry in self.directory.iterdir()):
                raise ConfigError(
                    f"run_dir={self.directory} has files but no {CONFIG}: expected a run directory"
                )
            return
        earlier = flatten(identity_of(read_yaml(file)))
        identity = flatten(identity_of(self.config))
        keys = sorted(earlier.keys() | identity.keys())
        differing = [key for key in keys if earlier.get(key) != identity.get(key)]
        if differing == ["compute_dtype"] and (self.directory / METRICS).exists():
            # `auto` may have meant the dtype that is given now.
            meant = read_json(self.directory / METRICS).get("compute_dtype")
            if meant == identity["compute_dtype"]:
                self.config["compute_dtype"] = earlier["compute_dtype"]
                return
        if differing:
            raise ConfigError(
                f"{file} is of a run with other values of {', '.join(differing[:5])}: choose "
                "another run_dir"
            )

    def begin(self) -> None:
        """Replace the files of an earlier run, once the job has all that it needs to start."""

        def replaced() -> None:
            if not self._has_begun:
                self._remove(METRICS, *RESULTS, *OF_LOGGERS)
            self._write_config()

        parallel.on_main(replaced)
        self._has_begun = True

    def _write_config(self) -> None:
        """Write the settings. Those that made a pruned model stay, beside a new evaluation."""
        path = self.directory / CONFIG
        earlier = read_yaml(path) if path.exists() else {}
        config = self.config
        if earlier and self.pruned:
            inputs = earlier.get("inputs", {}) | config["inputs"]
            config = earlier | {"evaluation": config["evaluation"], "inputs": inputs}
        # A run keeps its method's name when the same settings are typed without it.
        labels = {key: self.config.get(key) or earlier.get(key) for key in _LABELS}
        write_text(path, yaml.safe_dump(config | labels, sort_keys=False))

    def _read(self) -> None:
        """Read the results of earlier processes; show their evaluation if it is finished."""
        file = self.directory / METRICS
        if file.exists():
            metrics = read_json(file)
            if metrics.get("schema_version") != SCHEMA_VERSION:
                raise DataError(f"{file}: of another schema_version; force=true runs it again")
            metrics.setdefault("sha256", {})
            self.metrics = metrics
        self.history = read_lines(self.directory / HISTORY)
        if self._evaluation_file.exists():
            self.evaluation = read_json(self._evaluation_file)
        if self.metrics["status"] == "finished":
            self._remove(*UNFINISHED)  # the process may have ended before it removed them
            if "finished" in self.evaluation:
                self.save()
                self._write_config()

    def save(self) -> None:
        """Write the evaluation and `metrics.json`, which repeats the last evaluation.

        The `metrics.json` of a finished run keeps the earlier evaluation until the new one is
        finished.
        """
        if self.metrics["status"] != "finished" or "finished" in self.evaluation:
            for key in _COPIED:
                self.metrics.pop(key, None)
            self.metrics |= {key: self.evaluation[key] for key in _COPIED if key in self.evaluation}
            self.metrics["seconds"] |= self.evaluation.get("seconds", {})
        if parallel.rank() == 0 and self._has_begun:
            if self.evaluation.keys() & {"measured", "seconds"}:
                write_json(self._evaluation_file, self.evaluation)
            write_json(self.directory / METRICS, self.metrics)

    def finish(self) -> None:
        """Write the final metrics, and remove the files that only an unfinished run needs.

        With `save_weights=false` these are the weights too.
        """
        removed = UNFINISHED if self.config["save_weights"] else (*UNFINISHED, WEIGHTS)
        self.evaluation["finished"] = True
        self.metrics["status"] = "finished"
        self.metrics["sha256"] = {
            name: digest
            for name, digest in self.metrics["sha256"].items()
            if Path(name).parts[0] not in removed
        }
        self.save()
        if parallel.rank() == 0:
            self._write_config()
            self._remove(*removed)

    def read(self, name: str, load: Callable[[Path], Value]) -> Value | None:
        """Read a file of an earlier process; None: there is no such file.

        Raises DataError if the file has changed since it was written.
        """

        def read_here() -> Value | None:
            path = self.directory / name
            if not path.exists():
                return None
            digests = self.metrics["sha256"]
            if name in digests:
                check_sha256(self.directory, name, digests[name])
            else:  # the earlier process ended after the file and before `metrics.json`
                digests[name] = file_sha256(path)
            run_log.info("continuing with %s", name)
            return load(path)

        return parallel.on_main(read_here)

    def write(self, name: str, value: Value, save: Callable[[Path, Value], None]) -> None:
        """Write a file, and its sha256 into `metrics.json`."""

        def write_here() -> None:
            save(self.directory / name, value)
            self.metrics["sha256"][name] = file_sha256(self.directory / name)
            self.save()

        parallel.on_main(write_here)

    def write_history(self, lines: list[dict[str, Any]]) -> None:
        """Replace the history, and `history.jsonl`, by these lines."""
        super().write_history(lines)
        if parallel.rank() == 0:
            text = "".join(json.dumps(line) + "\n" for line in self.history)
            write_text(self.directory / HISTORY, text)

    def _remove(self, *names: str) -> None:
        for name in names:
            path = self.directory / name
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def run_directory(config: RunConfig) -> Path:
    """Return the directory of a run: `run_dir`, or `runs_dir/name-hash`."""
    return Path(config.run_dir or Path(config.runs_dir) / f"{config.name}-{config.hash}")
