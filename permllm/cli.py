"""What Hydra starts: the job of a command line, and the end of the command. A command that runs no job imports little."""

from __future__ import annotations

import os
import sys

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig

from permllm.config import HYDRA_MAIN, conf_directory, register_resolver, register_resolvers
from permllm.nodes import register
from permllm.runtime.interruption import started
from permllm.runtime.slurm import adopt_step
from permllm.usage import completions, help_text, reported

# Groups that every job has an option of.
_NEEDED = (
    "model",
    "pruner",
    "permutation",
    "temperature",
    "mask",
    "reconstruction",
    "calibration",
    "evaluation",
    "export",
    "logger",
)
# Hydra answers these itself.
_QUESTIONS = ("-h", "--help", "--hydra-help", "--version", "-c", "--cfg", "-i", "--info", "-sc", "--shell-completion")


@hydra.main(**HYDRA_MAIN, config_path=str(conf_directory()), config_name="config")
def job(composed: DictConfig) -> float:
    """One job of the command line; what it returns is what a search minimises."""
    from permllm.session import SESSION

    return SESSION.job(composed)


def main() -> int:
    """Run what Hydra makes of the command line, and end it: the exit code."""
    if sys.platform == "win32":
        print("error: a job needs Linux or macOS; on Windows that is WSL", file=sys.stderr)
        return 1
    adopt_step()
    register_resolvers()
    register()
    register_resolver("help_text", help_text)
    if sys.argv[1:] and set(sys.argv[1:]) <= {"-h", "--help"}:
        print(help_text())
        return 0
    if sys.argv[1:] in (["-sc", "query=bash"], ["-sc", "query=zsh"]):
        found = completions(os.environ["COMP_LINE"])
        if found is not None:
            print(" ".join(found))
            return 0
    if any(word.split("=")[0] in _QUESTIONS for word in sys.argv[1:]):
        started()
        reported(job)
        return 0
    if group := _group_without_option(sys.argv[1:]):
        started()
        print(f"error: {group}=null: every job needs one of its options, which --help lists", file=sys.stderr)
        return 1
    from permllm.session import SESSION

    return SESSION.of(lambda: reported(job))


def _group_without_option(words: list[str]) -> str | None:
    """The group that a command line takes the option of, which ends in Hydra's own traceback; None where it takes none."""
    try:
        for override in OverridesParser.create().parse_overrides([word for word in words if not word.startswith("-")]):
            if override.key_or_group in _NEEDED and not override.is_delete():
                values = override.sweep_iterator() if override.is_sweep_override() else [override.value()]
                if None in values:
                    return override.key_or_group
    except HydraException:
        pass  # Hydra says better what is wrong, and knows the options of a glob
    return None
