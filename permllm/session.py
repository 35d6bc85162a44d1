"""The jobs of a command: each is run, its errors are one line, and the command ends with a table and an exit code."""

from __future__ import annotations

import logging
import math
import statistics
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from omegaconf import DictConfig

from permllm.config import read_config, register_resolvers
from permllm.errors import DataError, InUseError, PermLLMError, everything_wanted, one_line
from permllm.helping import assist
from permllm.nodes import check_names
from permllm.record import sweep
from permllm.record.evaluations import mean_accuracy
from permllm.record.outcomes import Job
from permllm.record.store import is_finished, run_directory
from permllm.results.collect import collect
from permllm.results.summary import summarise
from permllm.results.table import print_comparison, print_jobs
from permllm.runner import run
from permllm.runtime import parallel
from permllm.runtime.interruption import CONTINUES, exit_code, is_interruption, scheduler_signals, started, what_happened
from permllm.runtime.watch import FAILED, INTERRUPTED

# Packages whose errors are those of a launcher's processes.
_LAUNCHERS = ("submitit", "joblib", "loky")


class Session:
    """The jobs of one command: one, or those of a sweep, which a launcher may run in other processes."""

    def __init__(self) -> None:
        self._failed = False

    def of(self, main: Callable[[], Any]) -> int:
        """Run what Hydra made of the command line, and end it: the exit code."""
        started()
        try:
            with scheduler_signals():
                main()
        except KeyboardInterrupt as error:  # between jobs, or while those of other processes were waited for
            if parallel.rank() == 0:
                print(f"{what_happened(error)}: {CONTINUES}", file=sys.stderr)
            self.close()
            parallel.stop(INTERRUPTED)
            return exit_code(error)
        except SystemExit as stop:
            # Hydra refuses the command line, or a launcher gives up although some jobs have finished.
            if stop.code == 1:
                self.close()
            raise
        except Exception as error:
            if everything_wanted() or type(error).__module__.partition(".")[0] not in _LAUNCHERS:
                raise
            # One of its processes was killed, or ran out of its time: the others have left what they did. Only the last lines
            # of such a message may say why.
            print(f"error: {type(error).__name__}: {str(error).strip()}\n{CONTINUES}", file=sys.stderr)
            self.close()
            return 1
        code = self.close()
        parallel.stop()
        return code

    def job(self, composed: DictConfig) -> float:
        """Run one job. A failure that a person can mend is one line on stderr, and does not stop the other jobs.

        Under torchrun that holds for all processes, which go through the jobs together as the first one says
        (`permllm.runtime.parallel`). Only where one of them fails alone in the middle of learning, all end.

        Returns:
            What a search minimises (`objective`), in all processes; infinite for a job that failed: a sampler then avoids it.

        Raises:
            SystemExit: with code 130, 143 or 129 where Ctrl-C, SIGTERM or SIGHUP stops it, after a table of what was done
                before; with code 1 where the processes have lost each other.
        """
        register_resolvers()  # a launcher's process has begun with this
        transformers.logging.set_verbosity_error()
        warnings.filterwarnings("ignore", category=FutureWarning)
        for name in ("httpx", "httpx2", "huggingface_hub"):  # the middle one is what huggingface_hub 2 speaks through
            logging.getLogger(name).setLevel(logging.ERROR)
        if sweep.sweeping():
            sweep.share_cores()
            if parallel.several() and sweep.launched_elsewhere():
                text = (
                    "torchrun's processes go through the jobs of a sweep together, one after the other: hydra/launcher=basic"
                )
                self._done("failed", text)
                print(f"error: {text}", file=sys.stderr)
                return math.inf
        parallel.start()
        try:
            with scheduler_signals():  # in a launcher's process too
                value = self._assist() if parallel.rank() else self._lead(composed)
            if parallel.rank():
                return value
            if parallel.out_of_step():
                self.close()
                print(f"the other processes are in the middle of a step and end too: {CONTINUES}", file=sys.stderr)
                raise SystemExit(1)
            parallel.tell(parallel.OVER, value)
            return value
        except BaseException as error:
            parallel.stop(INTERRUPTED if isinstance(error, SystemExit) and is_interruption(error.code) else FAILED)
            raise

    def _assist(self) -> float:
        """A job in a process beside the first, which writes no outcome and prints nothing that the first one prints."""
        logging.getLogger("permllm").setLevel(logging.WARNING)
        try:
            return assist()
        except KeyboardInterrupt as error:
            raise SystemExit(exit_code(error)) from None
        except (PermLLMError, torch.OutOfMemoryError, OSError) as error:
            print(f"error: the process of rank {parallel.rank()}: {one_line(error)}: {CONTINUES}", file=sys.stderr)
            raise SystemExit(1) from error

    def _lead(self, composed: DictConfig) -> float:
        """A job in the only process, or in the first of several."""
        try:
            config = read_config(sweep.place_record(composed))
            check_names(config)
            skipped = not config.force and is_finished(run_directory(config), config.evaluation_identity)
            result = run(config)
            if result is None:
                return math.inf
            metrics, directory = result
            self._done("skipped" if skipped else "ran", directory=str(directory))
            return objective(metrics)
        except KeyboardInterrupt as error:
            self._done("failed", f"{what_happened(error)}: the same command continues it")
            print(f"{what_happened(error)}: {CONTINUES}", file=sys.stderr)
            self.close()
            raise SystemExit(exit_code(error)) from None
        except InUseError as error:
            if not sweep.sweeping():
                self._failed = True
                print(f"error: {error}", file=sys.stderr)
            self._done("skipped", one_line(error))
        except (PermLLMError, torch.OutOfMemoryError, OSError) as error:
            if everything_wanted():
                raise
            text = one_line(error)
            self._done("failed", text)
            print(f"error: {text}", file=sys.stderr)
        except Exception as error:
            if not sweep.sweeping():
                raise
            # An error of ours must be seen whole, and still not take the other jobs with it.
            traceback.print_exc()
            self._done("failed", f"{type(error).__name__}: {one_line(error)}")
        return math.inf

    def close(self) -> int:
        """Print the comparison where there is one to make, and what became of each job of several; the exit code.

        Under torchrun the first process does that for all.
        """
        if parallel.rank():
            return 0
        jobs = sweep.outcomes()
        if len(jobs) > 1:
            shared = set.intersection(*(set(job.overrides) for job in jobs))
            labels = [" ".join(word for word in job.overrides if word not in shared) for job in jobs]
            finished = [Path(job.directory) for job in jobs if job.directory]
            runs = collect(finished).runs if finished else []
            if len(runs) > 1:
                print_comparison(summarise(runs))
            outcomes = [(job.outcome, job.reason or job.directory or "") for job in jobs]
            print_jobs([(label, *outcome) for label, outcome in zip(labels, outcomes, strict=True)])
        return 1 if self._failed or any(job.outcome == "failed" for job in jobs) else 0

    def _done(self, outcome: str, reason: str = "", directory: str | None = None) -> None:
        self._failed = self._failed or outcome == "failed"
        if sweep.sweeping():
            try:
                sweep.keep(Job(sweep.overrides(), outcome, reason, directory))
            except DataError as error:
                # A full disk must not take the other jobs with it.
                print(f"error: {error}", file=sys.stderr)


def objective(metrics: dict[str, Any]) -> float:
    """The sparse model's perplexity, of several texts the geometric mean, else 1 less its mean accuracy, else infinite."""
    found = [float(values["value"]) for values in metrics.get("perplexity", {}).get("sparse", {}).values()]
    if found:
        return found[0] if len(found) == 1 else math.exp(statistics.fmean(map(math.log, found)))
    accuracy = mean_accuracy(metrics.get("zero_shot", {}).get("sparse", {}))
    return math.inf if math.isnan(accuracy) else 1 - accuracy


# Of this process.
SESSION = Session()
