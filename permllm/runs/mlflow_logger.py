"""A run's numbers in MLflow: a database in the runs folder, or what `MLFLOW_TRACKING_URI` names."""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from permllm.errors import ConfigError, first_line
from permllm.runs.files import write_text

log = logging.getLogger(__name__)

# In the run directory: the id of its MLflow run.
MLFLOW_ID = ".mlflow-id"
DATABASE = "mlflow.db"
# What MLflow takes.
_LONGEST_KEY = 250
_LONGEST_VALUE = 6000
# Settings that may be others when a finished run is evaluated again.
_EVALUATION = "evaluation."
_NOT_IN_A_KEY = re.compile(r"[^\w./: -]")
# Chosen where nobody has: it sends nothing about its use, and a server that is down costs seconds, not minutes.
_VARIABLES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}


class MlflowLogger:
    """`permllm.runs.loggers.RunLogger`. A server that goes away costs the rest of the curves, never the run."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client: Any = client
        self._run_id = run_id
        # MLflow keeps every value of a step: a step that a continued run does again must not be sent again.
        self._last = {prefix: self._last_step(prefix) for prefix in ("lcp/", "pass/")}

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of one training step."""
        self._send("lcp/", values, step)

    def log_pass(self, values: Mapping[str, Any], number: int) -> None:
        """Numbers of one epoch."""
        self._send("pass/", values, number)

    def summary(self, values: Mapping[str, Any], earlier: Iterable[str] = ()) -> None:
        """Final values: numbers as metrics, words and what is not finite as tags below `final/`.

        MLflow removes no metric: the values of an earlier evaluation stay, and the tag `of_earlier_evaluations` names them.
        """
        from mlflow.entities import RunTag

        self._batch(values, 0)
        words = [RunTag(key_of(f"final/{key}"), str(value)) for key, value in values.items() if not _finite(value)]
        words.append(RunTag("of_earlier_evaluations", ", ".join(earlier)[:_LONGEST_VALUE]))
        self.asked(lambda: self._client.log_batch(self._run_id, tags=words))

    def finish(self, failed: bool) -> None:
        """The run's state."""
        self.asked(lambda: self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED"))

    def asked(self, work: Any) -> Any:
        """Do what asks the store; after its first failure nothing more."""
        if self._client is None:
            return None
        try:
            return work()
        except Exception as error:  # of a database, of a connection, of MLflow
            log.warning("MLflow does not answer (%s): it gets nothing more of this run", first_line(error))
            self._client = None
            return None

    def _send(self, prefix: str, values: Mapping[str, Any], step: int) -> None:
        if step > self._last[prefix]:
            self._batch({f"{prefix}{key}": value for key, value in values.items()}, step)

    def _batch(self, values: Mapping[str, Any], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        found = [Metric(key_of(key), float(value), now, step) for key, value in values.items() if _finite(value)]
        if found:
            self.asked(lambda: self._client.log_batch(self._run_id, metrics=found))

    def _last_step(self, prefix: str) -> int:
        def last() -> int:
            names = [name for name in self._client.get_run(self._run_id).data.metrics if name.startswith(prefix)]
            return max((m.step for name in names for m in self._client.get_metric_history(self._run_id, name)), default=-1)

        found = self.asked(last)
        return -1 if found is None else int(found)


def key_of(name: str) -> str:
    """A name as MLflow takes it."""
    return _NOT_IN_A_KEY.sub("_", name)[:_LONGEST_KEY]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@contextmanager
def open_mlflow(
    home: Path, directory: Path, *, project: str, name: str, tags: Mapping[str, str], settings: Mapping[str, Any], force: bool
) -> Iterator[MlflowLogger | None]:
    """The logger of a run, which a continued run finds again; None where the store does not answer.

    Args:
        home: folder of the database, where `MLFLOW_TRACKING_URI` names no other store.
        directory: of the run.
        project: the experiment.
        name: of the MLflow run.
        tags: what runs are found by.
        settings: flat.
        force: a new MLflow run although there is one.

    Raises:
        ConfigError: MLflow, or what its database needs, is missing.
    """
    os.environ.update({key: value for key, value in _VARIABLES.items() if key not in os.environ})
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise ConfigError(_MISSING) from error
    for part in ("mlflow", "alembic"):
        logging.getLogger(part).setLevel(logging.WARNING)  # the tables that they make are no news
    home.mkdir(parents=True, exist_ok=True)
    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(home / DATABASE).resolve()}"
    try:
        # Two jobs of a sweep that make the tables at once break them.
        with FileLock(home / f".{DATABASE}.lock"):
            client = MlflowClient(tracking_uri=store)
            experiment = _experiment(client, project, home)
        run_id = _continued(client, directory / MLFLOW_ID, force)
        if run_id is None:
            run_id = client.create_run(experiment, run_name=name, tags=dict(tags)).info.run_id
            _log_settings(client, run_id, settings)
            write_text(directory / MLFLOW_ID, run_id + "\n")
        _tag_evaluation(client, run_id, settings)
        client.update_run(run_id, status="RUNNING")
    except ModuleNotFoundError as error:
        raise ConfigError(_MISSING) from error
    except Exception as error:  # of a database, of a connection, of MLflow
        log.warning("MLflow cannot be reached at %s (%s): this run is in its record alone", store, first_line(error))
        yield None
        return
    logger, failed = MlflowLogger(client, run_id), True
    try:
        yield logger
        failed = False
    finally:
        logger.finish(failed)


_MISSING = "logger=mlflow needs mlflow-skinny, sqlalchemy and alembic: pip install -e '.[mlflow]'"


def _experiment(client: Any, project: str, home: Path) -> str:
    found = client.get_experiment_by_name(project)
    if found is not None:
        return str(found.experiment_id)
    # Nothing is kept there, but without a place MLflow makes a folder where the command runs.
    return str(client.create_experiment(project, (home / "mlartifacts").resolve().as_uri()))


def _continued(client: Any, file: Path, force: bool) -> str | None:
    """The MLflow run that a run directory has, where the store has it."""
    from mlflow.exceptions import MlflowException

    if force or not file.is_file():
        return None
    known = file.read_bytes().decode("ascii", errors="replace").strip()
    try:
        return str(client.get_run(known).info.run_id)
    except MlflowException:
        log.warning("%s names no run of this MLflow: the run goes on in a new one", file)
        return None


def _log_settings(client: Any, run_id: str, settings: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [
        Param(key_of(key), str(value)[:_LONGEST_VALUE]) for key, value in settings.items() if not key.startswith(_EVALUATION)
    ]
    client.log_batch(run_id, params=params)  # which sends as many at once as the store takes


def _tag_evaluation(client: Any, run_id: str, settings: Mapping[str, Any]) -> None:
    """Say how the model is evaluated now: another evaluation is the same MLflow run, whose parameters stay."""
    from mlflow.entities import RunTag

    tags = [RunTag(key_of(key), str(value)[:_LONGEST_VALUE]) for key, value in settings.items() if key.startswith(_EVALUATION)]
    names = {tag.key for tag in tags}
    for name in client.get_run(run_id).data.tags:
        if name.startswith(_EVALUATION) and name not in names:
            client.delete_tag(run_id, name)
    client.log_batch(run_id, tags=tags)
