"""Common part of the scripts measure.py: read settings, print and draw results, keep records.

python experiments/table3/measure.py model=llama-2-7b --to experiments/table3/records.jsonl
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from permllm.command import run_tool
from permllm.errors import ConfigError, DataError, first_line
from permllm.report.plots import picture
from permllm.runtime.devices import resolve_device, seed_everything
from permllm.settings.composition import composed, message_of
from permllm.settings.config import RunConfig, read_config
from permllm.settings.identity import digest_of
from permllm.store.environment import environment
from permllm.store.files import SCHEMA_VERSION, write_text

# Prefix of a script's own settings on the command line.
_OWN = "measure."


def main(
    script: str,
    settings: type,
    measure: Callable[[RunConfig, Any, torch.device], dict[str, Any]],
    lines: Callable[[dict[str, Any]], list[str]],
    draw: Callable[[dict[str, Any], Any], None],
) -> int:
    """Run a measurement with the settings of the command line, and return the exit code.

    Args:
        script: path of the measure.py.
        settings: dataclass of the script's own settings, `measure.NAME=VALUE`.
        measure: function that returns results as plain values, for the settings of run.py, the own
            settings and the device.
        lines: function that returns the results as lines of Markdown.
        draw: function that draws the results into matplotlib's axes.
    """
    description = sys.modules["__main__"].__doc__
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "words", nargs="*", metavar="KEY=VALUE", help="settings of run.py, and measure.KEY=VALUE"
    )
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FILE.jsonl",
        help="add a record to this file, and write a picture into its folder",
    )
    options = parser.parse_intermixed_args()

    def work() -> int:
        config, own = settings_of(options.words, settings)
        device = resolve_device(config.model.device)
        seed_everything(config.seed, config.deterministic)
        computed_with = environment(config.seed, device)
        started = time.perf_counter()
        found = measure(config, own, device)
        seconds = time.perf_counter() - started
        print("\n".join(lines(found)))
        if options.to is not None:
            digest = digest_of(config.identity | {"measure": asdict(own)})
            name = f"{config.model.name}-{Path(script).parent.name}"
            metrics = {
                "schema_version": SCHEMA_VERSION,
                "status": "finished",
                "name": name,
                "config_hash": digest,
            }
            metrics |= {"seconds": {"measure": seconds}, "study": found}
            line = {
                "run": f"{name}-{digest}",
                "config": config.resolved | {"measure": asdict(own)},
                "metrics": metrics,
            }
            command = computed_with["command"].replace(str(options.to), options.to.name)
            add_record(options.to, line | {"environment": computed_with | {"command": command}})
            draw_picture(
                options.to.with_name(f"{name}-{digest}.png"), lambda axes: draw(found, axes)
            )
        return 0

    return run_tool(work)


def settings_of(words: list[str], settings: type) -> tuple[RunConfig, Any]:
    """Return the settings of run.py, and an object of the script's own dataclass.

    Args:
        words: settings as they were typed.
        settings: the dataclass.

    Raises:
        ConfigError: a setting does not exist, or its value is not valid.
    """
    config = read_config(composed([word for word in words if not word.startswith(_OWN)]))
    own = OmegaConf.from_dotlist(
        [word.removeprefix(_OWN) for word in words if word.startswith(_OWN)]
    )
    try:
        return config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(settings), own))
    except OmegaConfBaseException as error:
        raise ConfigError(message_of(error)) from error


def add_record(file: Path, line: dict[str, Any]) -> None:
    """Add a record to a file of records, and replace one of the same name.

    Raises:
        DataError: the file cannot be read, or a line of it is damaged.
    """
    try:
        kept = (
            [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
            if file.exists()
            else []
        )
        by_name = {other["run"]: other for other in kept} | {line["run"]: line}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{file} is not a file of records: {first_line(error)}") from error
    write_text(file, "".join(json.dumps(by_name[name]) + "\n" for name in sorted(by_name)))
    print(f"record    {file}, {line['run']}")


def draw_picture(file: Path, draw: Callable[[Any], None]) -> None:
    """Draw a picture and write it to a file.

    Raises:
        ConfigError: the picture cannot be written.
    """
    with picture(file) as pyplot:
        _, axes = pyplot.subplots(figsize=(7, 4.5))
        draw(axes)
    print(f"picture   {file}")


def check_whole(key: str, value: Any, least: int) -> None:
    """Raise ConfigError unless `value` is a whole number of at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{key}={value!r}: expected a whole number of at least {least}")


def clock(work: Callable[[], Any], device: torch.device, calls: int = 1) -> float:
    """Return the mean seconds of a call over `calls` calls, from an idle to an idle device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(calls):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / calls
