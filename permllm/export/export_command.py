"""Command `permllm export`: write a run as a checkpoint."""

import argparse
from dataclasses import fields

from transformers.utils.logging import set_verbosity_error

from permllm.command import Answer
from permllm.export.serve import COMMAND
from permllm.export.write import export_run
from permllm.settings.config import ExportConfig
from permllm.settings.values import validated


def work(options: argparse.Namespace) -> Answer:
    """Run the command `permllm export`."""
    set_verbosity_error()  # warnings of transformers are errors here
    values = {field.name: getattr(options, field.name) for field in fields(ExportConfig)}
    settings = validated(ExportConfig, values, "export")
    summary = export_run(options.run, settings, options.to)
    content = "{form}, {dtype}, {gathers} gathers".format(**summary)
    lines = [f"{options.to}: {summary['bytes'] / 1e6:.1f} MB ({content})"]
    if options.serve:
        lines.append(f"serve it in {options.to} by: {COMMAND}")
    return Answer(summary, lambda: print("\n".join(lines)))
