"""`python run.py` prunes the default model, as `permllm run` does; `python run.py --help` lists the groups."""

import sys

from permllm.runtime.interruption import starting

if __name__ == "__main__":
    starting()

    from permllm.cli import run

    sys.exit(run())
