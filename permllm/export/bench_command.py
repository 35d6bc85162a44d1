"""Command `permllm bench`, whose arguments are in `permllm.cli`."""

from __future__ import annotations

import argparse
from typing import Any

from rich.markup import escape
from rich.table import Table
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from permllm.errors import ConfigError, check_whole
from permllm.export.bench import LAYER_COLUMNS, measure
from permllm.runtime.terminal import Answer, terminal


def work(options: argparse.Namespace) -> Answer:
    """Measure a checkpoint and return the figures."""
    disable_progress_bar()
    set_verbosity_error()
    for name in ("prompt", "new_tokens", "layer_tokens", "repeats"):
        check_whole(f"--{name.replace('_', '-')}", getattr(options, name), 1)
    for size in options.batch_sizes:
        check_whole("--batch-sizes", size, 1)
    if not options.folder.is_dir():
        raise ConfigError(f"{options.folder} is not a folder")
    report = measure(
        options.folder,
        options.against,
        batch_sizes=options.batch_sizes,
        prompt=options.prompt,
        new_tokens=options.new_tokens,
        layer_tokens=options.layer_tokens,
        repeats=options.repeats,
        device=options.device,
        dtype=options.dtype,
    )
    return Answer(report, lambda: _show(report))


def _show(report: dict[str, Any]) -> None:
    console = terminal()
    table = Table(
        title=f"{escape(report['checkpoint'])}, {report['dtype']}, prompt of {report['prompt']} tokens",
        title_justify="left",
    )
    for heading in ("variant", "batch", "prefill, tokens/s", "decode, tokens/s", "prefill, memory"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in report["speed"]:
        peak = f"{row['prefill_bytes'] / 1e6:.0f} MB" if row["prefill_bytes"] is not None else ""
        prefill, decode = (
            f"{row['prefill_tokens_a_second']:.1f}",
            f"{row['decode_tokens_a_second']:.1f}",
        )
        table.add_row(row["variant"], str(row["batch"]), prefill, decode, peak)
    console.print(table)
    columns = [name for name in LAYER_COLUMNS if report["layers"][0][name] is not None]
    table = Table(
        title=f"first decoder layer at {report['layers'][0]['tokens']} tokens, ms",
        title_justify="left",
    )
    for heading in (
        "group",
        "size",
        *[name.removesuffix("_s").replace("_", " ") for name in columns],
    ):
        table.add_column(heading, justify="left" if heading == "group" else "right")
    for row in report["layers"]:
        cells = [f"{row[name] * 1e3:.3f}" for name in columns]
        table.add_row(row["group"], f"{row['rows']} x {row['channels']}", *cells)
    console.print(table)
    for name, size in report["file_bytes"].items():
        console.print(f"{name}: {size / 1e6:.1f} MB on disk")
    for name, seconds in report["loading_s"].items():
        console.print(
            f"{name}: loaded in {seconds:.2f} s, weights of {report['weight_bytes'][name] / 1e6:.1f} MB in memory"
        )
    console.print(f"{report['gathers']} gathers; {report['note']}")
