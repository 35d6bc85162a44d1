"""`python -m permllm.export`, which is `permllm export`; it goes with version 1.1."""

import sys

from permllm.commands import call_old

if __name__ == "__main__":
    sys.exit(call_old("export"))
