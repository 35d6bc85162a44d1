"""The command `python -m permllm.verify`, which lives in `permllm.export.verify`."""

import sys

from permllm.export.verify import main

if __name__ == "__main__":
    sys.exit(main())
