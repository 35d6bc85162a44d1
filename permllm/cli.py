"""Command `permllm`. Hydra parses `permllm run`; argparse parses every other command.

The module of a command is imported on demand. It has `work(options) -> Answer`, and also
`arguments(parser)` if its import is fast. The docstring of `arguments` is the help. `run_tool`
turns errors into lines and exit codes:

- 0: success;
- 1: an error that the user can fix, as one line on stderr, or an answer that is no;
- 2: the command line is wrong, or `permllm verify` cannot read the checkpoint;
- 128 plus the number of the signal that ended the command.
"""

from __future__ import annotations

import argparse
import inspect
import logging
import math
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from permllm.command import Answer, as_json, exit_on_error, is_first_rank, run_tool, tell
from permllm.errors import SHORT_ERRORS, ConfigError, InUseError, one_line, tracebacks_wanted
from permllm.runtime.signals import CONTINUES, ending_signals
from permllm.runtime.version import __version__

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from permllm.job import JobResult

# Commands with their line in --help and their module.
COMMANDS = {
    "run": ("prune a model, or sweep over many (permllm run --help)", "permllm.job"),
    "results": ("make one table of many runs, or one file", "permllm.report.results_command"),
    "report": ("write a page or a picture of many runs", "permllm.report.report_command"),
    "export": ("write a run's pruned model as a checkpoint", "permllm.export.export_command"),
    "verify": ("check that a checkpoint is whole and N:M", "permllm.export.verify"),
}
# Packages whose errors come from the processes of a launcher.
_LAUNCHERS = ("submitit", "joblib", "loky")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command `permllm WORDS` and return its exit code."""
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == ["run"]:
        sys.argv = ["permllm run", *words[1:]]  # Hydra reads it
        return run_command()
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
    parser = argparse.ArgumentParser(
        prog=f"permllm {name}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments = _ARGUMENTS.get(name) or import_module(COMMANDS[name][1]).arguments
    parser.description = inspect.getdoc(arguments)
    arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the answer as JSON instead")
    options = parser.parse_args(words)

    def work() -> int:
        answer: Answer = import_module(COMMANDS[name][1]).work(options)
        if options.json:
            print(as_json(answer.value))
        else:
            answer.show()
        return answer.code

    return run_tool(work, failed=2 if name == "verify" else 1, in_json=options.json)


def _export(parser: argparse.ArgumentParser) -> None:
    """Write the pruned model of a run as a checkpoint: permllm export runs/RUN --to DIR."""
    from permllm.settings.config import ExportConfig

    forms = ("folded", "gathered", "simulate")
    add = parser.add_argument
    add("run", type=Path, help="directory of a run, with metrics.json")
    add("--to", type=Path, required=True, help="new or empty folder")
    first = "default: the first form that the permutations allow"
    add("--form", choices=forms, default="none", help=first)
    add("--dtype", help="dtype of the weights (default: that of the run)")
    size = "largest size of a file in GB (default: %(default)g)"
    add("--shard-gb", type=float, default=ExportConfig.shard_gb, help=size)
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


# Arguments of the commands whose modules take seconds to import.
_ARGUMENTS = {"export": _export, "verify": _verify}


def run_command() -> int:
    """Run the job or the sweep of the command line (`sys.argv`) and return the exit code."""
    if not tracebacks_wanted():  # with the variable Hydra raises its errors and does not print them
        os.environ |= {"HYDRA_FULL_ERROR": "1", SHORT_ERRORS: "1"}
    with ending_signals():
        return run_tool(_run_hydra)


def _run_hydra() -> int:
    """Start Hydra, which calls `job`, and return the exit code. Print the table of a sweep."""
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from permllm.settings.composition import HYDRA_MAIN, message_of, register_resolvers
    from permllm.settings.options import conf_directory
    from permllm.store import sweep

    if not is_first_rank():
        os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported
    os.environ.pop(sweep.FOLDER_VARIABLE, None)
    register_resolvers()
    sys.argv[1:] = sorted(sys.argv[1:], key=_is_option)  # argparse asks for the settings first
    # Hydra warns of a package without settings, and goes on without its options.
    warnings.filterwarnings("error", message="provider=hydra.searchpath")
    start = hydra.main(**HYDRA_MAIN, config_path=str(conf_directory()), config_name="config")(job)
    failed = False
    try:
        start()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(message_of(error)) from error
    except UserWarning as error:
        raise ConfigError(str(error).removeprefix("provider=")) from error
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        package = frame.f_globals["__name__"].partition(".")[0]
        if isinstance(error, ValueError) and package == "hydra":  # GROUP=null
            raise ConfigError(f"{' '.join(sys.argv[1:])}: {error}") from error
        if tracebacks_wanted() or package not in _LAUNCHERS:
            raise
        # A launcher's process was killed or ran out of time. Its last lines may say why.
        print(f"error: {type(error).__name__}: {error}\n{CONTINUES}", file=sys.stderr)
        failed = True
    finally:
        if sweep.FOLDER_VARIABLE in os.environ and is_first_rank():
            from permllm.report.render import print_sweep

            folder = Path(os.environ[sweep.FOLDER_VARIABLE])
            jobs = sweep.read_outcomes(folder)
            failed |= any(job.outcome == "failed" for job in jobs)
            if len(jobs) > 1:
                print_sweep(jobs, folder)
    if "permllm.runtime.parallel" in sys.modules:  # a job has begun
        sys.modules["permllm.runtime.parallel"].stop()
    return int(failed)


def _is_option(word: str) -> bool:
    """Tell if a word of `permllm run` is no setting: an option of Hydra or its value."""
    return word.startswith("-") or not ("=" in word or word.startswith("~"))


def job(composed: DictConfig) -> float:
    """Run one job of the command line and return its `objective`, which a search minimises.

    A job of a sweep that fails has an infinite objective, and the other jobs go on. Under torchrun
    all ranks run each job together.

    Raises:
        SystemExit: a single job failed by an error that the user can fix, or was interrupted.
    """
    from permllm.settings.composition import register_resolvers, sweeping

    register_resolvers()  # a launcher's process starts here
    with ending_signals():  # in a launcher's process too
        if sweeping():
            return _job_of_sweep(composed)

        def single() -> None:
            _job(composed)

        exit_on_error(single)
        return math.nan  # nothing reads it


def _job(composed: DictConfig) -> JobResult | None:
    """Run one job; return its result, None after plan=true."""
    import datasets
    import transformers

    from permllm.job import run as run_job
    from permllm.runtime import parallel
    from permllm.settings.composition import job_config

    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()  # without network it warns each time
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    # huggingface_hub warns of each retry; its version 2 uses httpx2.
    for name in ("huggingface_hub", "httpx", "httpx2"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not is_first_rank():
        logging.getLogger("permllm").setLevel(logging.ERROR)  # rank 0 prints the messages
    parallel.start()
    with parallel.failing_together():
        return run_job(parallel.on_main(lambda: job_config(composed)))


def _job_of_sweep(composed: DictConfig) -> float:
    """Run a job of a sweep, write its outcome, and return its objective."""
    from permllm.report.metrics import objective
    from permllm.report.printed import print_job
    from permllm.runtime import parallel
    from permllm.store import sweep

    sweep.take_gpu()  # before anything uses a GPU
    sweep.remove_outcome()  # the same sweep may have run before
    try:
        result = _job(composed)
    except InUseError as error:
        sweep.write_outcome("skipped", one_line(error))
    except Exception as error:
        sweep.write_outcome("failed", tell(error))
    except BaseException as error:  # an interruption, or one rank that failed alone
        sweep.write_outcome("failed", one_line(error))
        raise
    else:
        if result is not None:
            outcome = "skipped" if result.skipped else "ran"
            sweep.write_outcome(outcome, directory=result.directory)
            if is_first_rank():
                name = sweep.job_name() + " (skipped)" * result.skipped
                print_job(name, result.metrics, result.directory)
            return parallel.broadcast(objective(result.metrics))
    return math.inf
