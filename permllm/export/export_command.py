"""Write the pruned model of a run as a checkpoint: permllm export runs/RUN --form folded --to DIR."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.utils.logging import set_verbosity_error

from permllm.config import DTYPES
from permllm.export.checkpoint import Request, export_run
from permllm.export.fold import FORMS
from permllm.runtime.answer import Answer


def arguments(parser: argparse.ArgumentParser) -> None:
    """What may be typed."""
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--to", type=Path, required=True, help="folder to write; must be new or empty")
    parser.add_argument("--form", choices=FORMS, default="folded")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: that of the run)")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest file, 10^9 bytes (default: 5)")
    parser.add_argument("--dense", type=Path, help="folder of the dense model, if it has moved since the run")


def work(options: argparse.Namespace) -> Answer:
    """The checkpoint, and its sizes."""
    set_verbosity_error()  # what its warnings are about is an error here
    request = Request(options.form, options.dtype, options.shard_gb)
    summary = export_run(options.run, request, options.to, options.dense)
    said = (
        f"{options.to}: {summary['bytes'] / 1e6:.1f} MB ({summary['form']}, {summary['dtype']}), "
        f"{summary['gathers']} gathers, {summary['seconds']:.1f} s"
    )
    return Answer(summary, lambda: print(said))
