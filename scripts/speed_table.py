"""Write the tables of experiments/lcp_speed/README.md from the JSON files beside it, which scripts/benchmark_lcp.py made.

python scripts/speed_table.py
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from permllm.record.files import with_block

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "experiments" / "lcp_speed"
BEGIN, END = "<!-- table -->\n", "<!-- /table -->"


def tables() -> str:
    """One table of steps and one of the heuristic for each file."""
    parts = []
    for file in sorted(RECORDS.glob("*.json")):
        result = json.loads(file.read_text(encoding="utf-8"))
        hardware, versions = result["hardware"], result["versions"]
        processor = hardware["gpu"]["name"] if "gpu" in hardware else hardware["processor"]
        parts.append(
            f"{processor}, {hardware['threads']} threads, torch {versions['torch']}; medians of {result['repeats']} repeats "
            f"(`{file.name}`)\n"
        )
        if result["rows"]:
            parts.append(_steps(result["rows"]))
        if "heuristic" in result:
            parts.append(_heuristic(result["heuristic"]))
    return "\n".join(parts)


def _steps(rows: list[dict[str, Any]]) -> str:
    columns = ("layer", "tokens", "B", "products", "plain s", "LCP s", "LCP / plain")
    columns += ("recomputed s", "dense s", "dense / LCP", "hardening", "peak")
    lines = [_line(columns), _line(["---"] * len(columns))]
    for row in rows:
        cells = [row["shape"], str(row["tokens"]), str(row["block_size"]), row["compute_dtype"]]
        cells += [f"{row['plain_s']:.3f}", f"{row['lcp_s']:.3f}", f"{row['lcp_over_plain']:.2f}", f"{row['checkpoint_s']:.3f}"]
        cells += [f"{row['dense_s']:.2f}", f"{row['dense_over_lcp']:.1f}"] if row["dense_s"] else ["-", "-"]
        cells += [f"{row['harden_s'] / row['lcp_s']:.1%}", f"{row['peak_bytes'] / 1e9:.1f} GB"]
        lines.append(_line(cells))
    return "\n".join([*lines, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _heuristic(row: dict[str, Any]) -> str:
    return (
        f"Heuristic scores of one position, {row['rows']} x {row['channels']}: {row['ours_s']:.2f} s; the loop over groups "
        f"{row['loop_s']:.0f} s ({row['loop_groups_timed']} of {row['loop_groups_scaled_to']} groups timed, scaled), "
        f"{row['loop_over_ours']:.0f} times as long; largest relative difference {row['relative_difference']:.0e}.\n"
    )


def with_tables(document: str) -> str:
    """The document with its tables generated anew."""
    return with_block(document, BEGIN, END, tables())


def main() -> None:
    """Rewrite experiments/lcp_speed/README.md."""
    document = RECORDS / "README.md"
    document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
