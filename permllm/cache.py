"""`python -m permllm.cache`, which is `permllm cache`; it goes with version 1.1."""

import sys

from permllm.commands import call_old

if __name__ == "__main__":
    sys.exit(call_old("cache"))
