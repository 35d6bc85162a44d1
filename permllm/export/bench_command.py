"""Prefill and decoding of a checkpoint, the cost of its gathers, loading, sizes.

With --against DENSE the dense model is measured beside it, interleaved. On a GPU with sparse tensor cores every pruned
linear of a 2:4 model in half precision runs on them; elsewhere a sparse matrix product has no faster kernel than a dense one,
which the output says.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from permllm.errors import ConfigError, check_whole
from permllm.export.bench import LAYER_COLUMNS, measure
from permllm.runtime.answer import Answer
from permllm.runtime.terminal import terminal


def arguments(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="checkpoint")
    parser.add_argument("--against", type=Path, metavar="DENSE", help="checkpoint of the dense model")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each sequence")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens decoded one by one")
    parser.add_argument("--layer-tokens", type=int, default=2048, help="rows of the products that are timed one by one")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the checkpoint")


def work(options: argparse.Namespace) -> Answer:
    """The figures."""
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
        title=f"{escape(report['checkpoint'])}, {report['dtype']}, prompt of {report['prompt']} tokens", title_justify="left"
    )
    for heading in ("variant", "batch", "prefill, tokens/s", "decode, tokens/s", "prefill, memory"):
        table.add_column(heading, justify="left" if heading == "variant" else "right")
    for row in report["speed"]:
        peak = f"{row['prefill_bytes'] / 1e6:.0f} MB" if row["prefill_bytes"] is not None else ""
        prefill, decode = f"{row['prefill_tokens_a_second']:.1f}", f"{row['decode_tokens_a_second']:.1f}"
        table.add_row(row["variant"], str(row["batch"]), prefill, decode, peak)
    console.print(table)
    columns = [name for name in LAYER_COLUMNS if report["layers"][0][name] is not None]
    table = Table(title=f"first decoder layer at {report['layers'][0]['tokens']} tokens, ms", title_justify="left")
    for heading in ("group", "size", *[name.removesuffix("_s").replace("_", " ") for name in columns]):
        table.add_column(heading, justify="left" if heading == "group" else "right")
    for row in report["layers"]:
        cells = [f"{row[name] * 1e3:.3f}" for name in columns]
        table.add_row(row["group"], f"{row['rows']} x {row['channels']}", *cells)
    console.print(table)
    for name, size in report["file_bytes"].items():
        console.print(f"{name}: {size / 1e6:.1f} MB on disk")
    for name, seconds in report["loading_s"].items():
        console.print(f"{name}: loaded in {seconds:.2f} s, weights of {report['weight_bytes'][name] / 1e6:.1f} MB in memory")
    console.print(f"{report['gathers']} gathers; {report['note']}")
