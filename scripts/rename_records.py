"""Give records and run directories of version 2.0 the present names of methods and amounts.

python scripts/rename_records.py experiments/*/*.jsonl runs/*

A file of records is written anew, of a run directory its `config.yaml`. Hashes of runs stay.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent.parent))

from permllm.command import run_tool
from permllm.store.files import CONFIG, read_yaml, write_text

METHODS = {
    "frontier/order": "lcp",
    "order-folded": "lcp-folded",
    "order-paper": "lcp-paper-short",
    "frontier/order-then-masks": "frontier/lcp-then-masks",
    "heuristic-masks": "masks-cp",
    "folded-masks": "masks-folded",
    "heuristic-weights": "weights-cp",
    "frontier/heuristic-lowrank": "frontier/lowrank-cp",
}
AMOUNTS = {
    "samples": "calibration_windows",
    "windows": "evaluation_windows",
    "text": "learning_windows",
}


def renamed(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run with the present names."""
    method = config.get("method")
    budget = config.get("budget") or {}
    return config | {
        "method": METHODS.get(method, method),
        "budget": {AMOUNTS.get(name, name): amount for name, amount in budget.items()},
    }


def main(words: list[str]) -> int:
    """Rename in all files and folders."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("places", nargs="+", type=Path, metavar="FILE.jsonl|DIR")
    for place in parser.parse_args(words).places:
        if place.is_dir():
            config = renamed(read_yaml(place / CONFIG))
            write_text(place / CONFIG, yaml.safe_dump(config, sort_keys=False))
            continue
        lines = []
        for text in place.read_text(encoding="utf-8").splitlines():
            line = json.loads(text)
            if "config" in line:
                line["config"] = renamed(line["config"])
            lines.append(f"{json.dumps(line)}\n")
        write_text(place, "".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(run_tool(lambda: main(sys.argv[1:])))
