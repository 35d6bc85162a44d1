"""`python -m permllm COMMAND`, for who has not the command `permllm` on the path."""

import sys

from permllm.commands import main

if __name__ == "__main__":
    sys.exit(main())
