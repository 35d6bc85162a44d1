"""The command `python -m permllm.bench`, which lives in `permllm.export.bench`."""

import sys

from permllm.export.bench import main

if __name__ == "__main__":
    sys.exit(main())
