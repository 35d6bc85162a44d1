"""Command `permllm`. Hydra parses `permllm run`; argparse parses every other command.

The module of a command is imported on demand. It has `work(options) -> Answer`, and also
`arguments(parser)` if its import is fast. Only this file turns errors into exit codes and answers
into JSON. Exit codes:

- 0: success;
- 1: an error that the user can fix, as one line on stderr, or an answer that is no;
- 2: the command line is wrong, or `permllm verify` cannot read the checkpoint;
- 128 plus the number of the signal that ended the command.
"""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import math
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permllm.command import Answer, run_tool, silence
from permllm.errors import (
    SHORT_ERRORS,
    DataError,
    InUseError,
    PermLLMError,
    everything_wanted,
    one_line,
)
from permllm.runtime.signals import CONTINUES, ending_signals, exit_code, what_happened
from permllm.runtime.version import __version__
from permllm.store.launched import first, take_gpu

if TYPE_CHECKING:
    from omegaconf import DictConfig

# transformers imports torchao where it is installed. Beside a torch for CPUs it warns that its
# kernels for GPUs are missing.
for _noisy in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_noisy).setLevel(logging.ERROR)

# Commands with their line in --help and their module.
COMMANDS = {
    "run": ("prune a model, or sweep over many (permllm run --help)", "permllm.job"),
    "results": ("make one table of many runs, or one file", "permllm.report.results_command"),
    "report": ("write a page or a picture of many runs", "permllm.report.report_command"),
    "export": ("write a run's pruned model as a checkpoint", "permllm.export.write"),
    "verify": ("check that a checkpoint is whole and N:M", "permllm.export.verify"),
    "bench": ("measure the speed and size of a checkpoint", "permllm.export.bench"),
}
# Packages whose errors come from the processes of a launcher.
_LAUNCHERS = ("submitit", "joblib", "loky")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command `permllm WORDS` and return its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == ["run"]:
        sys.argv = ["permllm run", *words[1:]]  # Hydra reads it
        return run()
    if words and words[0] in COMMANDS:
        return call(words[0], words[1:])
    parser = argparse.ArgumentParser(
        prog="permllm",
        description="Learnable channel permutation for N:M sparse large language models.",
        epilog="permllm COMMAND --help describes a command. All commands but run take --json.",
    )
    parser.add_argument("--version", action="version", version=f"permllm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (meaning, _) in COMMANDS.items():
        commands.add_parser(name, help=meaning)
    parser.parse_args(words or ["--help"])  # exits with help, the version, or an error
    return 2


def call(name: str, words: Sequence[str]) -> int:
    """Run a command other than `run` with its words and return its exit code."""
    return run_tool(lambda: _answered(name, words), failed=2 if name == "verify" else 1)


def _answered(name: str, words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=f"permllm {name}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module = None if name in _ARGUMENTS else import_module(COMMANDS[name][1])
    parser.description = inspect.getdoc(module or _ARGUMENTS[name])
    (module.arguments if module else _ARGUMENTS[name])(parser)
    parser.add_argument("--json", action="store_true", help="print the answer as JSON instead")
    options = parser.parse_args(words)
    try:
        answer: Answer = import_module(COMMANDS[name][1]).work(options)
    except (PermLLMError, OSError) as error:
        if options.json:
            print(json.dumps({"error": one_line(error)}))
        raise
    if options.json:
        from permllm.settings.config import finite

        print(json.dumps(finite(answer.value), indent=2, allow_nan=False, default=str))
    else:
        answer.show()
    return answer.code


def _export(parser: argparse.ArgumentParser) -> None:
    """Write the pruned model of a run as a checkpoint: permllm export runs/RUN --to DIR."""
    forms = ("folded", "gathered", "simulate")
    add = parser.add_argument
    add("run", type=Path, help="run directory")
    add("--to", type=Path, required=True, help="new or empty folder")
    add("--form", choices=forms, help="default: the first form that the permutations allow")
    add("--dtype", help="dtype of the weights (default: that of the run)")
    add("--shard-gb", type=float, default=5.0, help="largest size of a file in GB (default: 5)")
    add("--serve", choices=("vllm",), help="also write the settings of this server")


def _verify(parser: argparse.ArgumentParser) -> None:
    """Check that a checkpoint is complete and N:M as it is stored, and compare its logits.

    Every linear of the decoder layers must be N:M, or dense if the export says so. An export in the
    form simulate is N:M in permuted order only, so the zeros of its rows are counted instead.

    With --against CHECKPOINT the logits of the two are compared: a folded or gathered export should
    match a simulate export of the same run; the difference from the dense model is the effect of
    pruning.

    Exit codes: 0: everything holds; 1: something does not; 2: the checkpoint is damaged.
    """
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="checkpoint")
    add("--pattern", help="N:M of every linear (default: that of the export, else 2:4)")
    add("--against", type=Path, metavar="CHECKPOINT", help="checkpoint to compare logits with")


def _bench(parser: argparse.ArgumentParser) -> None:
    """Measure the speed and size of a checkpoint: prefill, decoding, gathers, loading, bytes.

    With --against DENSE the dense model is measured too. On a GPU with sparse tensor cores, 2:4
    linears in half precision run on these cores, and 6:8 linears as three 2:4 windows. Both
    cuSPARSELt, with its fastest algorithm, and CUTLASS are measured. The output names what is
    missing for them.
    """
    add = parser.add_argument
    add("folder", type=Path, metavar="DIR", help="checkpoint")
    add("--against", type=Path, metavar="DENSE", help="checkpoint of the dense model")
    add("--batch-sizes", type=int, nargs="+", default=[1, 8], help="sequences in a batch")
    add("--prompt", type=int, default=256, help="tokens in each sequence")
    add("--new-tokens", type=int, default=16, help="tokens that are decoded one by one")
    add("--seconds", type=float, default=1.0, help="shortest duration of a measurement")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the checkpoint's")


# Arguments of the commands whose modules take seconds to import.
_ARGUMENTS = {"export": _export, "verify": _verify, "bench": _bench}


def run() -> int:
    """Run the job or the sweep of the command line (`sys.argv`) and return the exit code."""
    if sys.platform == "win32":
        print("error: a job needs Linux or macOS; on Windows use WSL", file=sys.stderr)
        return 1
    return SESSION.of(_hydra)


def _hydra() -> None:
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from permllm.settings.composition import HYDRA_MAIN, conf_directory, refusal, register_resolvers

    if not first():
        os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported
    register_resolvers()
    # Hydra copies its only store for each line of --help, which would take most of the time.
    ConfigStore.__deepcopy__ = lambda store, _: store  # type: ignore[attr-defined]
    start = hydra.main(**HYDRA_MAIN, config_path=str(conf_directory()), config_name="config")(job)
    if everything_wanted():
        start()
        return
    # With the variable Hydra raises its errors instead of printing them.
    os.environ |= {"HYDRA_FULL_ERROR": "1", SHORT_ERRORS: "1"}
    try:
        start()
    except (HydraException, OmegaConfBaseException) as error:
        raise SystemExit(f"error: {_with_extra(refusal(error))}" if first() else 1) from error
    except ValueError as error:  # Hydra has no error of its own for GROUP=null
        if not _module_that_raised(error).startswith("hydra."):
            raise
        null = " ".join(word for word in sys.argv[1:] if "null" in word)
        raise SystemExit(f"error: {null}: {error}") from error


def _module_that_raised(error: Exception) -> str:
    """Return the name of the module whose code raised an error."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__"))


def _of_a_launcher(error: Exception) -> bool:
    """Tell if a launcher's package defines or raises an error, such as submitit without SLURM."""
    modules = (type(error).__module__, _module_that_raised(error))
    return any(module.partition(".")[0] in _LAUNCHERS for module in modules)


def _with_extra(message: str) -> str:
    """Return Hydra's error, or for a missing launcher or sweeper the extra that installs it."""
    missing = re.search(r"'hydra/(launcher|sweeper)/(joblib|submitit_\w+|optuna)'", message)
    if missing is None or "Could not find" not in message:
        return message
    return f"hydra/{missing[1]}={missing[2]} is not installed: pip install -e '.[sweep]'"


def job(composed: DictConfig) -> float:
    """Run one job of the command line and return the number that a search minimises."""
    return SESSION.job(composed)


class Session:
    """Jobs of one command: a single job, or those of a sweep, perhaps in a launcher's processes."""

    def __init__(self) -> None:
        self._failed = False

    def of(self, main: Callable[[], Any]) -> int:
        """Run Hydra's main function, print the table of a sweep, and return the exit code."""
        try:
            with ending_signals():
                main()
            code = self.close()
            sys.stdout.flush()
            if "permllm.runtime.parallel" in sys.modules:  # a job has begun
                sys.modules["permllm.runtime.parallel"].stop()
            return code
        except BrokenPipeError:
            silence()
            return 141
        except KeyboardInterrupt as error:
            code = exit_code(error)
            message = f"{what_happened(error)}: "
        except SystemExit as stop:
            if stop.code:  # some jobs may have finished before a launcher failed
                self.close()
            raise
        except Exception as error:
            if everything_wanted() or not _of_a_launcher(error):
                raise
            # A launcher's process was killed or ran out of time. Its last lines may say why.
            code = 1
            message = f"error: {type(error).__name__}: {str(error).strip()}\n"
        if first():
            print(f"{message}{CONTINUES}", file=sys.stderr)
        self.close()
        return code

    def job(self, composed: DictConfig) -> float:
        """Run one job and return its `objective`, which is infinite if the job failed.

        An error that the user can fix is one line on stderr and does not stop the other jobs.
        Under torchrun all ranks run each job together. Rank 0 prints and keeps its outcome.
        """
        take_gpu()  # before anything uses a GPU
        import datasets
        import transformers

        from permllm.runtime import parallel
        from permllm.settings.composition import register_resolvers

        register_resolvers()  # a launcher's process starts here
        transformers.logging.set_verbosity_error()
        datasets.logging.set_verbosity_error()  # without network it warns each time
        warnings.filterwarnings("ignore", category=FutureWarning)
        for name in ("httpx", "httpx2", "huggingface_hub"):  # huggingface_hub 2 uses httpx2
            logging.getLogger(name).setLevel(logging.ERROR)
        parallel.start()
        if not first():
            logging.getLogger("permllm").setLevel(logging.ERROR)  # rank 0 prints the messages
        with ending_signals():  # in a launcher's process too
            return self._run(composed)

    def _run(self, composed: DictConfig) -> float:
        """Run a job and keep its outcome."""
        import torch

        from permllm.job import run
        from permllm.pruning.methods import compare_with_choices
        from permllm.runtime import parallel
        from permllm.settings.config import read_config
        from permllm.store import sweep
        from permllm.store.directory import is_finished, run_directory

        try:
            if sweep.sweeping() and first():
                sweep.outcome_file().unlink(missing_ok=True)  # the same sweep may have run before
            with parallel.in_step():
                config = parallel.on_main(lambda: read_config(sweep.place(composed)))
                compare_with_choices(config)
                skipped = not config.force and is_finished(
                    run_directory(config), config.evaluation_identity
                )
                result = run(config)
                value = math.inf if result is None else parallel.share(objective(result[0]))
            if result is not None:
                self._end("skipped" if skipped else "ran", directory=str(result[1]))
            return value
        except KeyboardInterrupt as error:
            self._end("failed", f"{what_happened(error)}: {CONTINUES}")
            raise
        except SystemExit:  # from `in_step`
            self._end("failed", f"one rank failed alone: {CONTINUES}")
            raise
        except InUseError as error:  # only in a sweep, because a single run waits
            self._end("skipped", one_line(error))
        except (PermLLMError, torch.OutOfMemoryError, OSError) as error:
            if everything_wanted():
                raise
            if first():
                print(f"error: {one_line(error)}", file=sys.stderr)
            self._end("failed", one_line(error))
        except Exception as error:
            if first():
                if not sweep.sweeping():
                    raise
                traceback.print_exc()  # a defect needs its traceback, and the other jobs go on
            self._end("failed", f"{type(error).__name__}: {one_line(error)}")
        return math.inf

    def close(self) -> int:
        """Print the tables of a sweep of several jobs, in rank 0, and return the exit code."""
        from permllm.store import sweep

        folders = sweep.STARTED if first() else []
        jobs = [job for folder in folders for job in sweep.kept(folder)]
        if len(jobs) > 1:
            from permllm.report.read import collect
            from permllm.report.render import print_comparison, print_jobs
            from permllm.report.table import Table

            finished = [Path(job.directory) for job in jobs if job.directory]
            if len(finished) > 1 and len(runs := collect(finished).runs) > 1:
                print_comparison(Table(runs))
            labels = sweep.labels([job.overrides for job in jobs])
            print_jobs(
                [
                    (label, job.outcome, job.reason or job.directory or "")
                    for label, job in zip(labels, jobs, strict=True)
                ]
            )
        return int(self._failed or any(job.outcome == "failed" for job in jobs))

    def _end(self, outcome: str, reason: str = "", directory: str | None = None) -> None:
        """Keep the outcome of a job of a sweep, in rank 0."""
        from permllm.store import sweep

        if not first():
            return
        self._failed = self._failed or outcome == "failed"
        if sweep.sweeping():
            try:
                sweep.keep(sweep.Outcome(sweep.overrides(), outcome, reason, directory))
            except DataError as error:  # the other jobs go on although the disk is full
                print(f"error: {error}", file=sys.stderr)


def objective(metrics: dict[str, Any]) -> float:
    """Return the number that a search minimises: the perplexity of the sparse model.

    With several texts it is their geometric mean, without a text 1 - mean accuracy, and without a
    task too infinity.
    """
    from permllm.report.measures import average_accuracy

    texts = metrics.get("perplexity", {}).get("sparse", {})
    perplexities = [float(values["value"]) for values in texts.values()]
    if perplexities:
        return math.prod(perplexities) ** (1 / len(perplexities))
    _, accuracy, _ = average_accuracy(metrics.get("tasks", {}).get("sparse", {}))
    return math.inf if math.isnan(accuracy) else 1 - accuracy


# The jobs of this process.
SESSION = Session()
