"""The one entry: `python run.py` prunes the default model; `python run.py --help` lists the groups."""

import sys

from permllm.runtime.interruption import starting

if __name__ == "__main__":
    starting()

import hydra
from omegaconf import DictConfig

from permllm.cli import Session
from permllm.config import register_resolvers

SESSION = Session()
register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float:
    """One job of the command line; what it returns is what a search minimises."""
    return SESSION.job(composed)


if __name__ == "__main__":
    sys.exit(SESSION.of(main))
