"""`python -m permllm.export`, which is `permllm export`; it goes with version 1.1."""

import runpy
import sys

if __name__ == "__main__":
    print("note: python -m permllm.export is `permllm export` from version 1.0 on", file=sys.stderr)
    sys.argv[1:1] = ["export"]
    runpy.run_module("permllm", run_name="__main__")
