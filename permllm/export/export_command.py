"""Command `permllm export`: write a run as a checkpoint, or its masks alone."""

import argparse
from dataclasses import fields

from transformers.utils.logging import set_verbosity_error

from permllm.command import Answer, refuse
from permllm.export.masks import write_masks
from permllm.export.serve import COMMAND
from permllm.export.write import MASKS_ALONE, export_run
from permllm.settings.config import ExportConfig
from permllm.settings.values import validated


def work(options: argparse.Namespace) -> Answer:
    """Run the command `permllm export`."""
    set_verbosity_error()  # warnings of transformers are errors here
    if options.form == MASKS_ALONE:
        refuse(options, ["dtype", "serve", "dense"], "--form masks has no weights")
        summary = write_masks(options.run, options.to)
        content = "masks and permutations, no weights"
    else:
        values = {field.name: getattr(options, field.name) for field in fields(ExportConfig)}
        settings = validated(ExportConfig, values, "export")
        summary = export_run(options.run, settings, options.to, dense=options.dense)
        content = "{form}, {dtype}, {gathers} gathers".format(**summary)
    lines = [f"{options.to}: {summary['bytes'] / 1e6:.1f} MB ({content})"]
    if options.serve:
        lines.append(f"serve it in {options.to} by: {COMMAND}")
    return Answer(summary, lambda: print("\n".join(lines)))
