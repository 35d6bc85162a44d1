"""Command `permllm export`, whose arguments are in `permllm.cli`."""

from __future__ import annotations

import argparse

from transformers.utils.logging import set_verbosity_error

from permllm.export.checkpoint import Request, export_run
from permllm.runtime.terminal import Answer


def work(options: argparse.Namespace) -> Answer:
    """Write a checkpoint and return its sizes."""
    set_verbosity_error()  # what its warnings are about is an error here
    request = Request(options.form, options.dtype, options.shard_gb)
    summary = export_run(options.run, request, options.to, options.dense)
    said = (
        f"{options.to}: {summary['bytes'] / 1e6:.1f} MB ({summary['form']}, {summary['dtype']}), "
        f"{summary['gathers']} gathers, {summary['seconds']:.1f} s"
    )
    return Answer(summary, lambda: print(said))
