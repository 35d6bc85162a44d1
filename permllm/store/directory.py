"""Run directory. A file that exists is complete; a run resumes after its last file."""

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

from permllm.errors import ConfigError, DataError, InUseError, one_line
from permllm.runtime import parallel
from permllm.runtime.memory import peak_host_memory, peak_memory, return_freed_memory
from permllm.runtime.signals import what_happened
from permllm.settings.config import RunConfig, flatten
from permllm.settings.identity import digest_of, identity_of
from permllm.store.environment import command_line
from permllm.store.files import (
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

log = logging.getLogger(__name__)
# Logger of the file `run.log` alone, because a terminal has progress bars instead.
noted = logging.getLogger("permllm.noted")
noted.setLevel(logging.INFO)
noted.propagate = False

Value = TypeVar("Value")

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
        # Seconds of the stages inside the running stage; None: no stage runs.
        self._inside: float | None = None

    def save(self) -> None:
        """Write the metrics."""

    def loaded(self, name: str, load: Callable[[Path], Value]) -> Value | None:
        """Read a file of an earlier process; None: there is no such file."""
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
        """Read a file of an earlier process, or else compute and save it.

        All ranks get the value of rank 0.
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
        """Record the seconds and the peak memory of a stage, also if it is interrupted.

        The seconds of a stage inside another one count only for the inner stage. The outer stage
        saves the metrics.
        """
        outer = self._inside
        self._inside = 0.0
        if outer is None:
            return_freed_memory()  # it would count in the peak of this stage
        start = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - start
            record = self.evaluation if name.startswith("evaluate") else self.metrics
            seconds = record.setdefault("seconds", {})
            seconds[name] = seconds.get(name, 0.0) + took - self._inside
            self._inside = None if outer is None else outer + took
            for key, peak in (
                ("peak_memory_bytes", peak_memory(device)),
                ("peak_host_memory_bytes", peak_host_memory()),
            ):
                self.metrics[key] = max(peak, self.metrics.get(key, 0))
            if outer is None:
                noted.info("%s: %.1f s", name, seconds[name])
                self.save()


class RunDirectory(Record):
    """Record of a run in its directory, which is made if it is missing.

    Attributes:
        finished: True: every stage and the evaluation were finished when the directory was opened.
    """

    directory: Path

    def __init__(self, directory: Path, config: RunConfig) -> None:
        super().__init__()
        self.directory = directory
        self.finished = False
        self._written: set[str] = set()  # files of this process
        self.config: dict[str, Any] = json.loads(json.dumps(config.resolved))
        evaluation = json.loads(json.dumps(config.evaluation_identity))
        digest = digest_of(evaluation)
        self.evaluation = {"evaluation": evaluation, "evaluation_hash": digest}
        self._evaluation_file = directory / EVALUATIONS / f"{digest}.json"
        self.metrics |= {
            "schema_version": SCHEMA_VERSION,
            "status": "running",
            "name": config.name,
            "config_hash": config.hash,
        }

    @contextmanager
    def opened(self, force: bool = False, wait: bool = True) -> Iterator[None]:
        """Lock the directory, and read the results of earlier processes.

        The directory is removed again if the run fails by its settings or its text before it has a
        result.

        Args:
            force: True: remove earlier results first.
            wait: True: wait while another process uses the run; False: raise InUseError.

        Raises:
            ConfigError: the directory belongs to another run.
            DataError: a file cannot be read.
        """
        is_new = parallel.rank() == 0 and not self.directory.exists()
        with ExitStack() as held:

            def lock_and_read() -> tuple[Any, ...]:
                held.enter_context(self._locked(wait))
                self._check_config()
                if force:
                    self._remove(METRICS, *RESULTS, *OF_LOGGERS)
                self._read()
                done = is_finished(self.directory, self.evaluation["evaluation"])
                return self.metrics, self.evaluation, self.history, done

            try:
                self.metrics, self.evaluation, self.history, self.finished = parallel.on_main(
                    lock_and_read
                )
                yield
            except InUseError:
                raise
            except (ConfigError, DataError):
                if is_new and not any((self.directory / name).exists() for name in RESULTS):
                    shutil.rmtree(self.directory, ignore_errors=True)
                raise

    @contextmanager
    def _locked(self, wait: bool) -> Iterator[None]:
        """Lock the directory. A process with another evaluation of the same run always waits."""
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
            same.release()  # `with same` has acquired it a second time
            self.directory.mkdir(exist_ok=True)  # the other process may have removed it
            yield

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
        both = earlier.keys() | identity.keys()
        differing = sorted(key for key in both if earlier.get(key) != identity.get(key))
        if differing == ["compute_dtype"] and self._meant_by_auto() == identity["compute_dtype"]:
            self.config["compute_dtype"] = earlier["compute_dtype"]
        elif differing:
            differ = "differ" if len(differing) > 1 else "differs"
            raise ConfigError(
                f"{file} is of another run, whose {', '.join(differing[:5])} {differ}: choose "
                "another run_dir"
            )

    def _meant_by_auto(self) -> str | None:
        """Return the dtype that `compute_dtype=auto` meant in the run; None: it has no metrics."""
        file = self.directory / METRICS
        return read_json(file).get("compute_dtype") if file.exists() else None

    def _read(self) -> None:
        write_text(self.directory / CONFIG, yaml.safe_dump(self.config, sort_keys=False))
        file = self.directory / METRICS
        if file.exists():
            self.metrics = read_json(file)
            if self.metrics.get("schema_version") != SCHEMA_VERSION:
                raise DataError(f"{file}: of another schema_version; force=true runs it again")
            if self.metrics["status"] == "finished":
                self._remove(*UNFINISHED)  # the process may have ended before it removed them
        self.history = read_lines(self.directory / HISTORY)
        if self._evaluation_file.exists():
            self.evaluation = read_json(self._evaluation_file)
            ended = self.metrics["status"] == "finished" and self.evaluation.get("finished")
            if ended and self.metrics.get("evaluation") != self.evaluation["evaluation"]:
                self._show_evaluation()
                self.save()

    @property
    def pruned(self) -> bool:
        """True: the model is pruned, so that only its evaluation may be missing."""
        return "sparsity" in self.metrics

    def check_products(self, dtype: torch.dtype) -> None:
        """Record the dtype of matrix products, which a run keeps to its end.

        Raises ConfigError if an earlier process of the run used another one: `compute_dtype=auto`
        depends on the machine.
        """
        products = str(dtype).removeprefix("torch.")
        before = self.metrics.setdefault("compute_dtype", products)
        if before != products:
            raise ConfigError(
                f"compute_dtype={self.config['compute_dtype']}: {self.directory} began with "
                f"products in {before}, and here they would be in {products}: add "
                f"compute_dtype={before} run_dir={self.directory} to continue it, or force=true to "
                "run it again"
            )

    def has(self, group: str) -> bool:
        """Tell if the run has the result of a group, `permutation` or `mask`."""
        file = self.directory / {"permutation": PERMUTATIONS, "mask": MASKS}[group]
        return self.pruned or parallel.on_main(file.exists)

    def save(self) -> None:
        """Write the evaluation and `metrics.json`.

        The `metrics.json` of a finished run keeps the earlier evaluation until the new one is
        finished.
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
        """Write the final metrics, and remove the files that only an unfinished run needs."""
        self.evaluation["finished"] = True
        self._show_evaluation()
        self.metrics["status"] = "finished"
        digests = self.metrics.setdefault("sha256", {})
        self.metrics["sha256"] = {
            name: digest for name, digest in digests.items() if name.split("/")[0] not in UNFINISHED
        }
        self.save()
        if parallel.rank() == 0:
            self._remove(*UNFINISHED)

    def loaded(self, name: str, load: Callable[[Path], Value]) -> Value | None:
        """Read a file of an earlier process; None: there is no such file.

        Raises DataError if the file has changed since it was written.
        """

        def read() -> Value | None:
            path = self.directory / name
            stated = self.metrics.setdefault("sha256", {})
            if not path.exists():
                return None
            if name in stated:
                check_sha256(self.directory, name, stated[name])
            else:  # the earlier process ended after the file and before `metrics.json`
                stated[name] = file_sha256(path)
            if name not in self._written:
                noted.info("continuing with %s", name)
            return load(path)

        return parallel.on_main(read)

    def keep(self, name: str, value: Value, save: Callable[[Path, Value], None]) -> None:
        """Write a file, and its sha256 into `metrics.json`."""

        def write() -> None:
            save(self.directory / name, value)
            self._written.add(name)
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
        raise DataError(f"{path} has changed since the run wrote it; force=true runs it again")


def is_finished(directory: Path, evaluation: Mapping[str, Any]) -> bool:
    """Tell if a directory has a finished run with this evaluation."""
    try:
        metrics = read_json(directory / METRICS)
        complete = all((directory / name).is_file() for name in metrics.get("sha256", {}))
        if not complete or metrics.get("status") != "finished":
            return False
        if evaluation == metrics.get("evaluation"):
            return True
        other = read_json(directory / EVALUATIONS / f"{digest_of(evaluation)}.json")
        return bool(other.get("finished"))
    except DataError:
        return False


@contextmanager
def job_log(file: Path) -> Iterator[None]:
    """Append the command, all messages, and the error of a job that fails to a file."""
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # On a full disk the record raises the error that the user sees.
    handler.handleError = lambda record: None  # type: ignore[method-assign]
    loggers = (logging.getLogger(), noted)
    for logger in loggers:
        logger.addHandler(handler)
    try:
        noted.info("command: %s", command_line())
        yield
        noted.info("finished")
    except BaseException as error:
        reason = what_happened(error) if isinstance(error, KeyboardInterrupt) else one_line(error)
        noted.error("ended: %s", reason or type(error).__name__)
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
        handler.close()
