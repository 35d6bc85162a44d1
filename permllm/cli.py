"""What `run.py` hands to Hydra: run a job, report errors as one line, and end with a table and an exit code."""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from permllm import parallel
from permllm.config import read_config
from permllm.errors import PermLLMError
from permllm.results.record import is_finished
from permllm.results.table import print_comparison, print_jobs
from permllm.runner import run


@dataclass
class Job:
    """What became of one job.

    Attributes:
        overrides: what was typed for it.
        outcome: `ran`, `skipped` (it was finished already) or `failed`.
        reason: why it failed.
        metrics: of a finished run.
        directory: of a finished run.
    """

    overrides: list[str]
    outcome: str
    reason: str = ""
    metrics: dict[str, Any] | None = None
    directory: Path | None = None


class Session:
    """The jobs of one command: one, or those of a sweep."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def job(self, composed: DictConfig) -> None:
        """Run one job. A failure that a person can mend is one line on stderr, and does not stop the other jobs.

        Raises:
            SystemExit: with code 130 where Ctrl-C stops it, after a table of what was done before.
        """
        transformers.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=FutureWarning)
        for name in ("httpx", "huggingface_hub"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            config = read_config(composed)
            skipped = not config.force and is_finished(config.directory())
            result = run(config)
            if result is not None:
                self.jobs.append(Job(_overrides(), "skipped" if skipped else "ran", "", *result))
        except KeyboardInterrupt:
            self.jobs.append(Job(_overrides(), "failed", "interrupted: the same command continues it"))
            print("interrupted: the same command continues where it stopped", file=sys.stderr)
            self.close()
            raise SystemExit(130) from None
        except (PermLLMError, torch.OutOfMemoryError, OSError) as error:
            if os.environ.get("HYDRA_FULL_ERROR") == "1":
                raise
            text = _one_line(error)
            self.jobs.append(Job(_overrides(), "failed", text))
            print(f"error: {text}", file=sys.stderr)
            if parallel.world_size() > 1:
                # The other processes wait for this one; torchrun ends them all.
                raise SystemExit(1) from error
        except Exception as error:
            if not _sweeping():
                raise
            # An error of ours must be seen whole, and still not take the other jobs with it.
            traceback.print_exc()
            self.jobs.append(Job(_overrides(), "failed", f"{type(error).__name__}: {_one_line(error)}"))

    def close(self) -> int:
        """Print the comparison where there is one to make, and what became of each job of several; the exit code."""
        if len(self.jobs) > 1:
            shared = set.intersection(*(set(job.overrides) for job in self.jobs))
            labels = [" ".join(word for word in job.overrides if word not in shared) for job in self.jobs]
            finished = [
                (label or job.metrics["name"], job.metrics, job.directory)
                for label, job in zip(labels, self.jobs, strict=True)
                if job.metrics is not None and job.directory is not None
            ]
            if len(finished) > 1:
                print_comparison(finished)
            print_jobs([(label, job.outcome, job.reason) for label, job in zip(labels, self.jobs, strict=True)])
        return 1 if any(job.outcome == "failed" for job in self.jobs) else 0


def _sweeping() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _overrides() -> list[str]:
    """What was typed for this job, without what a sweep itself needs; nothing outside of Hydra."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def _one_line(error: BaseException) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is not enough: lower permutation.batch_size or calibration.batch_size, or see plan=true"
    return " ".join(str(error).split())
