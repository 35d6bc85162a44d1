"""Matplotlib, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from permllm.errors import ConfigError, first_line


def load_pyplot(option: str) -> Any:
    """Return matplotlib's pyplot without a screen. Raises ConfigError, which names the option, where it is missing."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(f"{option} needs matplotlib: pip install -e '.[plot]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False  # a record's texts are no formulas
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, option: str, file: Path, dpi: int = 150) -> None:
    """Write a figure and close it. Raises ConfigError where the file cannot be written, or its suffix is no picture's."""
    try:
        figure.set_layout_engine("constrained")
        # A legend beside the axes is part of the picture.
        figure.savefig(file, dpi=dpi, bbox_inches="tight")
    except (OSError, ValueError) as error:
        raise ConfigError(f"{option} {file}: {first_line(error)}") from error
    finally:
        load_pyplot(option).close(figure)
