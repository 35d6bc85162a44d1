"""A study measures something about a model or its layers that is not one pruned model: a job with a record like any other."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch

from permllm.calibration.dense import Pruner
from permllm.config import RunConfig
from permllm.errors import ConfigError
from permllm.record.environment import environment
from permllm.record.files import write_record
from permllm.record.job_log import job_log
from permllm.record.names import ENVIRONMENT, LOG, METRICS, PICTURE
from permllm.record.schema import check_form, validated
from permllm.record.store import RunRecord, run_directory
from permllm.runtime.devices import resolve_device
from permllm.runtime.plotting import load_pyplot, save_figure
from permllm.runtime.seeding import seed_everything
from permllm.validation import check_contract

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudyInputs:
    """What a study works from.

    Attributes:
        config: of the job.
        pruner: the base pruner of the config.
        device: where to compute.
    """

    config: RunConfig
    pruner: Pruner
    device: torch.device


class Study(Protocol):
    """Measures, and shows what it measured.

    Attributes:
        form: of the results, as in `permllm.record.schema`: those of a record are compared with it.
    """

    form: ClassVar[type]

    def measure(self, inputs: StudyInputs) -> dict[str, Any]:
        """The results, as plain values."""

    def lines(self, results: dict[str, Any]) -> list[str]:
        """The results as Markdown, line by line."""

    def draw(self, results: dict[str, Any], axes: Any) -> None:
        """Draw them into matplotlib's axes."""


def run_study(config: RunConfig, study: Study, pruner: Pruner) -> tuple[dict[str, Any], Path]:
    """Run a study, or take the finished record; print its table and draw its picture, where matplotlib is there.

    Returns:
        The metrics, with the results under `study`, and the directory.

    Raises:
        ConfigError: the study lacks what it will be asked for.
    """
    key = f"study={config.study.get('_target_')}"
    check_contract(key, study, (), ("measure", "lines", "draw"))
    check_form(f"{key}: form", getattr(study, "form", None))
    record = RunRecord(run_directory(config), config, config.force)
    with record.opened():
        if record.finished:
            log.info("%s is finished already; force=true runs it again", record.directory)
        else:
            device = resolve_device(config.model.device)
            seed_everything(config.seed)
            write_record(record.path(ENVIRONMENT), environment(config.seed, device))
            with job_log(record.path(LOG)):
                with record.stage("measure", device):
                    record.metrics["study"] = study.measure(StudyInputs(config, pruner, device))
                record.finish()
        results: dict[str, Any] = dict(validated(f"{record.path(METRICS)}: study", record.metrics.get("study"), study.form))
        print("\n".join(study.lines(results)))
        if picture(study, results, record.path(PICTURE)):
            print(f"picture   {record.path(PICTURE)}")
        print(f"files     {record.directory}")
    return record.metrics, record.directory


def picture(study: Study, results: dict[str, Any], file: Path) -> bool:
    """Draw the results into a file; False where matplotlib is not installed."""
    try:
        pyplot = load_pyplot("the picture")
    except ConfigError as error:
        log.info("%s", error)
        return False
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    study.draw(results, axes)
    save_figure(figure, "the picture", file)
    return True
