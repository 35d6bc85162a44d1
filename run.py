"""`python run.py` prunes the default model, as `permllm run` does; `python run.py --help` lists the groups."""

import sys

from permllm.cli import run

if __name__ == "__main__":
    sys.exit(run())
