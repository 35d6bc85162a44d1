"""The command `permllm`. Each of its commands is a module that is imported when it is asked for.

A module has `arguments(parser)`, which adds to an `argparse.ArgumentParser`, and `work(options) -> Answer`; its docstring is
the description in `--help`. Errors, exit codes and `--json` are of this file alone:

- 0: done; 1: an error that a person can mend, as one line on stderr, or an answer that is no;
- 2: the command line is wrong, or what a module's `FAILED` says of its errors;
- 128 and the number of the signal that ended it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import hydra
from omegaconf import DictConfig

from permllm.config import finite
from permllm.errors import PermLLMError, one_line
from permllm.pruning.composition import HYDRA_MAIN, conf_directory, register_resolvers, reported
from permllm.runtime.answer import Answer
from permllm.runtime.interruption import starting
from permllm.runtime.slurm import adopt_step
from permllm.runtime.tool import run_tool
from permllm.runtime.version import __version__

COMMANDS = {
    "run": "prune a model, or sweep over many: its settings are Hydra's (permllm run --help)",
    "results": "make one table of many runs, or keep them in one file",
    "report": "write a page, or a picture of quality over minutes, of many runs",
    "export": "write the pruned model of a run as a checkpoint",
    "verify": "prove that a checkpoint is whole and N:M as it is stored",
    "bench": "measure a checkpoint: prefill, decoding, gathers, loading, sizes",
}
# Of the commands but `run`.
_MODULES = {
    "results": "permllm.runs.results_command",
    "report": "permllm.runs.report_command",
    "export": "permllm.export.export_command",
    "verify": "permllm.export.verify_command",
    "bench": "permllm.export.bench_command",
}
# Hydra answers these itself.
_QUESTIONS = ("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-i", "--info", "-sc", "--shell-completion")
_EPILOG = "permllm COMMAND --help describes one. All but run take --json: the answer as JSON on stdout."


def main(words: Sequence[str] | None = None) -> int:
    """The command `permllm WORDS`; the exit code."""
    starting()
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == ["run"]:
        sys.argv = ["permllm run", *words[1:]]  # which Hydra reads
        return run()
    if words[:1] == ["-sc"]:  # the completion of a shell: eval "$(permllm -sc install=bash)"
        return _completion(words)
    if words and words[0] in COMMANDS:
        return call(words[0], words[1:])
    parser = argparse.ArgumentParser(
        prog="permllm",
        description="Learnable channel permutation for N:M sparse large language models.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"permllm {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, meaning in COMMANDS.items():
        commands.add_parser(name, help=meaning)
    parser.parse_args(words or ["--help"])  # ends here: with the help, the version, or what is wrong
    return 2


def _completion(words: list[str]) -> int:
    """Hydra's completion knows the words of `permllm run`; before those stands the name of a command. The exit code."""
    _, *typed = os.environ.get("COMP_LINE", "permllm run ").split(" ")
    if typed[:1] != ["run"] or typed == ["run"]:
        print(" ".join(name for name in COMMANDS if name.startswith(typed[0])) if len(typed) == 1 else "")
        return 0
    os.environ["COMP_LINE"] = " ".join(["permllm", *typed[1:]])
    sys.argv = ["permllm", *words]
    return run()


def call(name: str, words: Sequence[str]) -> int:
    """One command; the exit code.

    Args:
        name: one of `COMMANDS`, but `run`.
        words: what was typed after it.
    """
    module = import_module(_MODULES[name])
    parser = argparse.ArgumentParser(
        prog=f"permllm {name}", description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    module.arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the answer as JSON instead")
    options = parser.parse_args(words)
    return run_tool(lambda: _answered(module.work, options), failed=getattr(module, "FAILED", 1))


def _answered(work: Callable[[argparse.Namespace], Answer], options: argparse.Namespace) -> int:
    """Do the work of a command and print its answer; the exit code."""
    try:
        answer = work(options)
    except (PermLLMError, OSError) as error:
        if options.json:
            print(json.dumps({"error": one_line(error)}))
        raise
    if options.json:
        print(_json(answer.value))
    else:
        answer.show()
    return answer.code


def _json(value: Any) -> str:
    """JSON as every reader takes it: without NaN and infinity, which become null."""
    return json.dumps(finite(value), indent=2, allow_nan=False, default=str)


@hydra.main(**HYDRA_MAIN, config_path=str(conf_directory()), config_name="config")
def job(composed: DictConfig) -> float:
    """One job of the command line; what it returns is what a search minimises."""
    from permllm.job import SESSION

    return SESSION.job(composed)


def run() -> int:
    """Run what Hydra makes of the command line, and end it: the exit code."""
    if sys.platform == "win32":
        print("error: a job needs Linux or macOS; on Windows that is WSL", file=sys.stderr)
        return 1
    adopt_step()
    register_resolvers()
    if any(word.split("=")[0] in _QUESTIONS for word in sys.argv[1:]):
        return run_tool(lambda: reported(job) or 0)
    from permllm.job import SESSION

    return SESSION.of(lambda: reported(job))
