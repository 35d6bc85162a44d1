"""What Hydra starts: the job of a command line, and the end of the command. A command that runs no job imports little."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from permllm.config import HYDRA_MAIN, conf_directory, register_resolvers
from permllm.nodes import register
from permllm.runtime.interruption import started
from permllm.runtime.slurm import adopt_step
from permllm.usage import reported

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
    if any(word.split("=")[0] in _QUESTIONS for word in sys.argv[1:]):
        started()
        reported(job)
        return 0
    from permllm.session import SESSION

    return SESSION.of(lambda: reported(job))
