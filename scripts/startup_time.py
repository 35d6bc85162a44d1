"""How long a command takes to begin, beside the import that it cannot do without: medians of runs in turn.

    python scripts/startup_time.py

Each is an interpreter of its own, in an empty folder. `permllm results` reads the records that lie in experiments/quickstart.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMANDS = {
    "import pandas": ["-c", "import pandas"],
    "permllm results": ["-m", "permllm", "results", str(ROOT / "experiments" / "quickstart")],
    "import torch": ["-c", "import torch"],
    "python run.py --help": [str(ROOT / "run.py"), "--help"],
    "completion of python run.py": [str(ROOT / "run.py"), "-sc", "query=bash"],
}


def seconds_of(words: list[str], folder: str) -> float:
    """Wall time of `python WORDS`."""
    variables = os.environ | {"PYTHONPATH": str(ROOT), "COMP_LINE": "python run.py pruner=", "COMP_POINT": "21"}
    started = time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=folder, env=variables, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for words in COMMANDS.values():  # what is not in the page cache yet
            seconds_of(words, folder)
        for _ in range(options.repeats):
            for name, words in COMMANDS.items():
                found[name].append(seconds_of(words, folder))
    for name, every in found.items():
        print(f"{name:<30} {statistics.median(every):.2f} s ({min(every):.2f} to {max(every):.2f})")


if __name__ == "__main__":
    main()
