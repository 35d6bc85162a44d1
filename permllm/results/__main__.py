"""The command `python -m permllm.results`, which lives in `permllm.results.command`."""

import sys

from permllm.runtime.interruption import starting

if __name__ == "__main__":
    starting()

    from permllm.results.command import main

    sys.exit(main())
