"""Command `permllm verify`, whose arguments are in `permllm.cli`."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from permllm.config import NMPattern
from permllm.errors import printable
from permllm.export.stock import stock_perplexity
from permllm.export.verify import Report, verify
from permllm.runtime.terminal import Answer, terminal

_SHOWN = 20
# How far, of it, the perplexity of stock transformers may be from the run's: products may be summed
# in another order.
_NEAR = {"float64": 1e-4, "float32": 1e-4, "bfloat16": 2e-2, "float16": 2e-2}


def work(options: argparse.Namespace) -> Answer:
    """Verify a checkpoint and return the report."""
    disable_progress_bar()
    set_verbosity_error()  # what its warnings are about is in the report
    report = verify(
        options.folder,
        NMPattern.parse(options.pattern) if options.pattern else None,
        options.against,
    )
    values = asdict(report) | {"passed": report.passed}
    if options.stock:
        values["stock"] = stock = stock_perplexity(options.folder, options.stock)
        if not stock["relative_difference"] <= _NEAR[stock["dtype"]]:
            report.problems.append(
                f"stock transformers finds another perplexity than the run {stock['run']}"
            )
            values |= {"problems": report.problems, "passed": report.passed}
    return Answer(
        values,
        lambda: _show(options.folder, report, values.get("stock")),
        0 if report.passed else 1,
    )


def _show(folder: Path, report: Report, stock: dict[str, Any] | None) -> None:
    console = terminal()
    table = Table(
        title=f"{escape(str(folder))}: {report.pattern} in stored order", title_justify="left"
    )
    for heading in ("weight", "N:M", "shape", "zeros", "violations", "-0.0", "not finite"):
        table.add_column(heading, justify="left" if heading == "weight" else "right")
    for layer in report.layers:
        counted = (
            f"M does not divide {layer.shape[1]}"
            if layer.violations is None
            else str(layer.violations)
        )
        cells = [counted, str(layer.negative_zeros), str(layer.nan)]
        cells = [
            layer.pattern,
            f"{layer.shape[0]} x {layer.shape[1]}",
            f"{layer.zeros:.2%}",
            *cells,
        ]
        table.add_row(escape(printable(layer.name)), *cells)
    console.print(table)
    weights = sum(math.prod(layer.shape) for layer in report.layers)
    zeros = sum(layer.zeros * math.prod(layer.shape) for layer in report.layers) / max(weights, 1)
    bad = sum(layer.violations or 0 for layer in report.layers)
    console.print(
        f"{len(report.layers)} weights, {zeros:.2%} zeros, {bad} violations, {report.bytes / 1e6:.1f} MB on disk"
    )
    if report.dense:
        console.print(
            f"dense, as it says: {', '.join(escape(printable(name)) for name in report.dense)}"
        )
    if report.difference is not None:
        found = report.difference
        console.print(
            f"logits: relative difference {found['relative']:.2e}, largest {found['largest']:.2e}, KL {found['kl']:.2e} nats, "
            f"the same next token at {found['agreement']:.2%}"
        )
    if stock is not None:
        values = f"{stock['perplexity_of_the_run']:.3f}, with stock transformers {stock['perplexity_stock']:.3f}"
        console.print(
            f"perplexity of the run {values}: relative difference {stock['relative_difference']:.1e}"
        )
    without = "not compared: no permllm.json states their sha256"
    console.print(f"contents {'compared with their sha256' if report.checksums else without}")
    if report.passed:
        console.print("passed")
        return
    more = len(report.problems) - _SHOWN
    console.print(f"FAILED: this is not a {report.pattern} checkpoint:")
    for problem in report.problems[:_SHOWN]:
        console.print(f"- {escape(printable(problem))}")
    if more > 0:
        console.print(f"- and {more} more")
