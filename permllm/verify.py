"""The command `python -m permllm.verify`, which lives in `permllm.export.verify`."""

import sys

from permllm.runtime.interruption import starting

if __name__ == "__main__":
    starting()

    from permllm.export.verify import main

    sys.exit(main())
