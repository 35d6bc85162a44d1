"""`python -m permllm.results`, which is `permllm results`; it goes with version 1.1."""

import runpy
import sys

if __name__ == "__main__":
    print("note: python -m permllm.results is `permllm results` from version 1.0 on", file=sys.stderr)
    sys.argv[1:1] = ["results"]
    runpy.run_module("permllm", run_name="__main__")
