"""Records: what is kept and what a run writes is as the forms say, and one that is not takes no other one with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from permllm import runner
from permllm.config import read_config
from permllm.errors import DataError
from permllm.record import files
from permllm.record.files import read_json, read_yaml
from permllm.record.schema import Environment, FinishedRun, Metrics, Pass, Settings, validated
from tests.conftest import ROOT
from tests.test_config import composed

RECORDS = sorted(file.parent for file in (ROOT / "experiments").rglob("metrics.json"))
TINY = ("model=tiny", "logger=none", "calibration=builtin", "calibration.samples=4", "calibration.length=32")


def test_every_kept_record_is_as_the_forms_say() -> None:
    assert len(RECORDS) > 80
    for record in RECORDS:
        metrics = read_json(record / "metrics.json", Metrics)
        read_yaml(record / "config.yaml", Settings)
        read_json(record / "environment.json", Environment)
        assert "study" in metrics or read_json(record / "metrics.json", FinishedRun)
        if (record / "history.jsonl").is_file():
            for line in (record / "history.jsonl").read_text().splitlines():
                validated(str(record), json.loads(line), Pass)


def test_a_run_is_as_the_forms_say_at_every_write(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = files.write_atomically

    def checked(path: Path, content: Any) -> None:
        write(path, content)
        forms = {"metrics.json": Metrics, "environment.json": Environment}
        if path.name in forms:
            validated(str(path), json.loads(path.read_text()), forms[path.name])
            written.append(path.name)

    monkeypatch.setattr(files, "write_atomically", checked)
    overrides = ("permutation.passes=1", "evaluation.zero_shot.tasks=[]", "export=gathered", f"run_dir={tmp_path}/run")
    runner.run(read_config(composed(*TINY, *overrides)))
    assert len(written) > 6
    read_json(tmp_path / "run" / "metrics.json", FinishedRun)
    read_yaml(tmp_path / "run" / "config.yaml", Settings)
    for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines():
        validated("history.jsonl", json.loads(line), Pass)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"schema_version": 1, "status": "running", "name": "a", "config_hash": "0", "seconds": []}',
            "seconds: input should",
        ),
        ('{"schema_version": 1, "status": "\\ud800"}', "is not readable JSON: 'utf-8' codec"),
        ("[" * 100_000, "is not readable JSON: maximum recursion"),
        ("1" * 5000, "is not readable JSON: Exceeds the limit"),
        ("[]", "input should be a valid dictionary"),
        ("\xff", "is not readable JSON"),
    ],
)
def test_garbage_in_place_of_metrics_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "metrics.json"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match=message) as raised:
        read_json(file, Metrics)
    assert str(raised.value).startswith(str(file))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: 2026-01-01", "name: input was not a valid JSON value"),
        ("name: !!set {a, b}", "name: input was not a valid JSON value"),
        ("1: a", "1.*: input should be a valid string"),
        ("name: &a x\nmodel: *a", r"refers to another part of itself: \*a"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", r"refers to another part of itself: \*a"),
        ("name: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ('name: "\\ud800"', "'utf-8' codec"),
        ("name: [", "is not readable YAML"),
        ("[" * 5000, "is not readable YAML"),
        ("? [a, {b: c}]\n: d", "is not readable YAML"),
        ("", "input should be a valid dictionary"),
    ],
)
def test_garbage_in_place_of_settings_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(DataError, match=message) as raised:
        read_yaml(file, Settings)
    assert str(raised.value).startswith(str(file))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300
