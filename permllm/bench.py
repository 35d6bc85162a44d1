"""The command `python -m permllm.bench`, which lives in `permllm.export.bench`."""

import sys

from permllm.runtime.interruption import starting

if __name__ == "__main__":
    starting()

    from permllm.export.bench import main

    sys.exit(main())
