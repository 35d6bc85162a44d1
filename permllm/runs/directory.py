"""The run directory: a file that exists is complete, and a run continues after its last file."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from filelock import FileLock, Timeout

from permllm.config import RunConfig, flatten
from permllm.errors import ConfigError, DataError, InUseError, one_line
from permllm.runs.environment import command_line
from permllm.runs.files import (
    CONFIG,
    EVALUATIONS,
    HISTORY,
    MASKS,
    METRICS,
    OF_LOGGERS,
    PERMUTATIONS,
    RESULTS,
    SCHEMA_VERSION,
    UNFINISHED,
    file_sha256,
    read_json,
    read_lines,
    read_yaml,
    write_json,
    write_text,
)
from permllm.runtime import parallel
from permllm.runtime.identity import digest_of, identity_of
from permllm.runtime.memory import peak_host_memory, peak_memory, return_freed_memory
from permllm.runtime.terminal import what_happened

log = logging.getLogger(__name__)
# Goes into the file `run.log` alone: a terminal has progress bars for it.
noted = logging.getLogger("permllm.noted")
noted.setLevel(logging.INFO)
noted.propagate = False

Value = TypeVar("Value")

# `metrics.json` repeats these keys of the evaluation that was asked for last.
_COPIED = ("evaluation", "evaluation_hash", "perplexity", "tasks", "evaluated_texts")


class Record:
    """Metrics, history and files of a job. This one keeps them in memory, `RunDirectory` on disk.

    All ranks call its methods: rank 0 alone reads and writes files, and the others have what it
    read.

    Attributes:
        directory: of the files; None: no file is kept.
        metrics: content of `metrics.json`.
        evaluation: results of the evaluation that is asked for: `perplexity`, `tasks`, `scores`,
            `seconds`.
        history: an entry for each epoch of learning.
    """

    directory: Path | None = None

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {"seconds": {}}
        self.evaluation: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []
        # Seconds of the stages inside of the one that runs; None: none runs.
        self._inside: float | None = None

    def save(self) -> None:
        """Write the metrics as they are now."""

    def loaded(self, name: str, load: Callable[[Path], Value]) -> Value | None:
        """Read a file that an earlier process finished; None: there is none."""
        return None

    def keep(self, name: str, value: Value, save: Callable[[Path, Value], None]) -> None:
        """Write a file."""

    def kept(
        self,
        name: str,
        compute: Callable[[], Value],
        save: Callable[[Path, Value], None],
        load: Callable[[Path], Value],
    ) -> Value:
        """Read a file if an earlier process finished it, otherwise compute and save it.

        All ranks have rank 0's value.
        """
        value = self.loaded(name, load)
        if value is None:
            value = parallel.share(compute())
            self.keep(name, value, save)
        return value

    def write_history(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Replace the history by these lines."""
        self.history = [dict(line) for line in lines]

    @contextmanager
    def stage(self, name: str, device: torch.device) -> Iterator[None]:
        """Time a stage, note the peak of memory, and save the metrics, also when it is interrupted.

        The seconds of a stage inside of another one count for the inner one alone. The outer one
        saves.
        """
        outer, self._inside = self._inside, 0.0
        if outer is None:
            return_freed_memory()  # or this stage's peak would include the memory of the last one
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            record = self.evaluation if name.startswith("evaluate") else self.metrics
            seconds = record.setdefault("seconds", {})
            seconds[name] = seconds.get(name, 0.0) + took - self._inside
            self._inside = None if outer is None else outer + took
            peaks = {"peak_memory_bytes": peak_memory(device)}
            peaks["peak_host_memory_bytes"] = peak_host_memory()
            self.metrics |= {
                key: max(peak, self.metrics.get(key, 0)) for key, peak in peaks.items()
            }
            if outer is None:
                noted.info("%s: %.1f s", name, seconds[name])
                self.save()


class RunDirectory(Record):
    """Directory of a run, made when missing; a directory with another config is refused.

    Attributes:
        finished: every stage was done when it was opened, the evaluation that is asked for too.
    """

    directory: Path

    def __init__(self, directory: Path, config: RunConfig) -> None:
        super().__init__()
        self.directory, self.finished = directory, False
        self.config: dict[str, Any] = json.loads(json.dumps(config.resolved))
        asked = json.loads(json.dumps(config.evaluation_identity))
        self.evaluation = {"evaluation": asked, "evaluation_hash": digest_of(asked)}
        self._evaluation_file = directory / EVALUATIONS / f"{digest_of(asked)}.json"
        self.metrics |= {"schema_version": SCHEMA_VERSION, "status": "running"}
        self.metrics |= {"name": config.name, "config_hash": config.hash}

    @contextmanager
    def opened(self, force: bool = False, wait: bool = True) -> Iterator[None]:
        """Hold the directory, and read what an earlier process left.

        A run that ends by its settings or its text before it has any result leaves no directory.

        Args:
            force: remove earlier results first.
            wait: for another process that is at work on the same run; False raises InUseError.

        Raises:
            ConfigError: the directory belongs to another run. DataError: a file is unreadable.
        """
        made = parallel.rank() == 0 and not self.directory.exists()
        with ExitStack() as held:

            def read() -> tuple[dict[str, Any], dict[str, Any], list[dict[str, Any]], bool]:
                held.enter_context(self._locked(wait))
                self._check_config(force)
                if force:
                    self._remove(METRICS, *RESULTS, *OF_LOGGERS)
                self._read()
                done = is_finished(self.directory, self.evaluation["evaluation"])
                return self.metrics, self.evaluation, self.history, done

            try:
                self.metrics, self.evaluation, self.history, self.finished = parallel.on_main(read)
                yield
            except InUseError:
                raise
            except (ConfigError, DataError):
                if made and not any((self.directory / name).exists() for name in RESULTS):
                    shutil.rmtree(self.directory, ignore_errors=True)
                raise

    @contextmanager
    def _locked(self, wait: bool) -> Iterator[None]:
        """Hold the directory.

        A process that evaluates the same run in another way waits in any case.
        """
        same = FileLock(self.directory / f".lock-{self.evaluation['evaluation_hash']}")
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            same.acquire(timeout=0)
        except Timeout as error:
            if not wait:
                raise InUseError(f"{self.directory} is in use by another process") from error
            log.info("%s: waiting for another process that runs the same", self.directory)
            same.acquire()
        with same, FileLock(self.directory / ".lock"):
            same.release()  # it is held twice now
            self.directory.mkdir(exist_ok=True)  # the process before may have removed it
            yield

    def _check_config(self, force: bool) -> None:
        file = self.directory / CONFIG
        if not file.is_file():
            if any(not entry.name.startswith(".") for entry in self.directory.iterdir()):
                raise ConfigError(f"run_dir={self.directory} is not empty and holds no {CONFIG}")
            return
        try:
            present, asked = (flatten(identity_of(one)) for one in (read_yaml(file), self.config))
        except DataError:
            if force:
                return
            raise
        both = present.keys() | asked.keys()
        if differing := sorted(key for key in both if present.get(key) != asked.get(key)):
            keys = ", ".join(differing[:5])
            raise ConfigError(f"{file} is of another run: {keys} differ; choose another run_dir")

    def _read(self) -> None:
        write_text(self.directory / CONFIG, yaml.safe_dump(self.config, sort_keys=False))
        file = self.directory / METRICS
        if file.exists():
            self.metrics = read_json(file)
            if self.metrics.get("schema_version") != SCHEMA_VERSION:
                raise DataError(f"{file}: of another schema_version; force=true runs it again")
            if self.metrics["status"] == "finished":
                self._remove(*UNFINISHED)  # the process before may have ended between the two
        self.history = read_lines(self.directory / HISTORY)
        if self._evaluation_file.exists():
            self.evaluation = read_json(self._evaluation_file)
            shown = self.metrics.get("evaluation") == self.evaluation["evaluation"]
            ended = self.metrics["status"] == "finished" and self.evaluation.get("finished")
            if ended and not shown:
                self._show_evaluation()
                self.save()

    @property
    def pruned(self) -> bool:
        """The model was pruned; its evaluation is left."""
        return "sparsity" in self.metrics

    def has(self, group: str) -> bool:
        """Return whether the result of this group, `permutation` or `mask`, is there."""
        file = self.directory / {"permutation": PERMUTATIONS, "mask": MASKS}[group]
        return self.pruned or parallel.on_main(file.exists)

    def save(self) -> None:
        """Write the evaluation and `metrics.json`.

        A finished run that is evaluated in another way shows the earlier evaluation until the new
        one is finished.
        """
        if self.metrics["status"] != "finished":
            self._show_evaluation()
        if parallel.rank() == 0:
            if self.evaluation.keys() & {"perplexity", "tasks"}:
                write_json(self._evaluation_file, self.evaluation)
            write_json(self.directory / METRICS, self.metrics)

    def _show_evaluation(self) -> None:
        for key in _COPIED:
            self.metrics.pop(key, None)
        self.metrics |= {key: self.evaluation[key] for key in _COPIED if key in self.evaluation}
        self.metrics["seconds"] |= self.evaluation.get("seconds", {})

    def finish(self) -> None:
        """Write the last metrics, and remove what only an unfinished run needs."""
        self.evaluation["finished"] = True
        self._show_evaluation()
        self.metrics["status"] = "finished"
        digests = self.metrics.setdefault("sha256", {})
        for name in [name for name in digests if name.split("/")[0] in UNFINISHED]:
            del digests[name]
        self.save()
        if parallel.rank() == 0:
            self._remove(*UNFINISHED)

    def loaded(self, name: str, load: Callable[[Path], Value]) -> Value | None:
        """Read a file that an earlier process finished; None: there is none.

        Raises DataError where the file is not what was written.
        """

        def read() -> Value | None:
            path, stated = self.directory / name, self.metrics.setdefault("sha256", {})
            if not path.exists():
                return None
            if name in stated:
                check_sha256(self.directory, name, stated[name])
            else:  # the process before ended between the file and `metrics.json`
                stated[name] = file_sha256(path)
            noted.info("continuing with %s", name)
            return load(path)

        return parallel.on_main(read)

    def keep(self, name: str, value: Value, save: Callable[[Path, Value], None]) -> None:
        """Write a file, and its sha256 into `metrics.json`."""

        def write() -> None:
            save(self.directory / name, value)
            self.metrics.setdefault("sha256", {})[name] = file_sha256(self.directory / name)
            self.save()

        parallel.on_main(write)

    def write_history(self, lines: Sequence[Mapping[str, Any]]) -> None:
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


def check_sha256(directory: Path, name: str, digest: str) -> None:
    """Raise DataError, which names the file, unless a file of a run directory has this sha256."""
    path = directory / name
    if not path.is_file():
        raise DataError(f"{path} is missing; force=true runs it again")
    if file_sha256(path) != digest:
        raise DataError(f"{path} has another sha256 than the run wrote; force=true runs it again")


def is_finished(directory: Path, evaluation: Mapping[str, Any] | None = None) -> bool:
    """Return whether a directory holds a finished run, with this evaluation (None: with any)."""
    try:
        metrics = read_json(directory / METRICS)
        there = all((directory / name).is_file() for name in metrics.get("sha256", {}))
        if not there or metrics.get("status") != "finished":
            return False
        if evaluation in (None, metrics.get("evaluation")):
            return True
        other = read_json(directory / EVALUATIONS / f"{digest_of(evaluation)}.json")
        return bool(other.get("finished"))
    except DataError:
        return False


@contextmanager
def job_log(file: Path) -> Iterator[None]:
    """Append to a file what is logged inside, the command, and why the job ended unfinished."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # A full disk is the record's to tell.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    loggers = (logging.getLogger(), noted)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        noted.info("command: %s", command_line())
        yield
        noted.info("finished")
    except BaseException as error:
        said = what_happened(error) if isinstance(error, KeyboardInterrupt) else one_line(error)
        noted.error("ended: %s", said or type(error).__name__)
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
