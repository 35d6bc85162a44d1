"""The one entry: `python run.py` prunes the default model; `python run.py --help` lists the groups."""

import os
import signal
import sys


def _interrupted(*_: object) -> None:
    os.write(2, b"interrupted: nothing had begun\n")
    os._exit(130)


# Importing takes seconds, in which Ctrl-C would show what is being imported.
EARLY = __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler
if EARLY:
    signal.signal(signal.SIGINT, _interrupted)

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from permllm.cli import Session  # noqa: E402
from permllm.config import register_resolvers  # noqa: E402

SESSION = Session()
register_resolvers()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(composed: DictConfig) -> float:
    """One job of the command line; what it returns is what a search minimises."""
    return SESSION.job(composed)


if __name__ == "__main__":
    if EARLY:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(SESSION.of(main))
