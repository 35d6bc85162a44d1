"""Make the tables of documents anew from the records that the comments above them name.

    python scripts/readme_tables.py README.md experiments/*/README.md

With --check nothing is written, and the exit code is 1 where a document is stale.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from permllm.runs.files import write_text
from permllm.runtime.terminal import run_tool
from scripts.views import with_views


def main(words: list[str]) -> int:
    """Write what is stale, or name it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.md")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(words)
    return run_tool(lambda: _written(options.files, options.check))


def _written(files: list[Path], check: bool) -> int:
    stale = {file: text for file in files if (text := with_views(file)) != file.read_text(encoding="utf-8")}
    for file, text in stale.items():
        if not check:
            write_text(file, text)
        print(f"{file} is {'stale' if check else 'new'}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
