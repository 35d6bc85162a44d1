"""Command `python run.py`, the same as `permllm run`; `--help` lists the groups."""

import sys

from permllm.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command())
