"""Records: what is kept and what a run writes is as the forms say, and one that is not takes no other one with it."""

from __future__ import annotations

import copy
import io
import json
import math
import struct
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from permllm import job
from permllm.cli import call
from permllm.config import read_config
from permllm.errors import DataError
from permllm.runs import files
from permllm.runs.files import file_checksum, read_json, read_yaml, write_record
from permllm.runs.render import FORMATS
from permllm.runs.schema import Environment, FinishedRun, Metrics, Object, Pass, Scores, Settings, validated
from tests.kept import EXPERIMENTS, THREE_RUNS, as_folder, lines_of
from tests.runs.test_table import make_run
from tests.test_config import composed

RECORDS = sorted(EXPERIMENTS.rglob("*.jsonl"))
TINY = ("model=tiny", "logger=none", "calibration=builtin", "calibration.samples=4", "calibration.seqlen=32")


def test_every_kept_record_is_as_the_forms_say() -> None:
    lines = [line for file in RECORDS for line in lines_of(file)]
    assert len(lines) > 80
    for line in lines:
        if "study" in line["metrics"]:  # a script that measures, with settings of its own
            validated(line["run"], line["metrics"], Metrics)
        else:
            validated(line["run"], line["metrics"], FinishedRun)
            validated(line["run"], line["config"], Settings)
        validated(line["run"], line["environment"], Environment)
        validated(line["run"], line.get("history", []), list[Pass])


def test_a_run_is_as_the_forms_say_at_every_write(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    write = files.write_atomically

    def checked(path: Path, content: Any) -> None:
        write(path, content)
        forms = {"metrics.json": Metrics, "environment.json": Environment, "scores.json": Scores}
        if path.name in forms:
            validated(str(path), json.loads(path.read_text()), forms[path.name])
            written.append(path.name)

    monkeypatch.setattr(files, "write_atomically", checked)
    overrides = ("permutation.epochs=1", "evaluation.zero_shot.tasks=[]", "export=gathered", f"run_dir={tmp_path}/run")
    job.run(read_config(composed(*TINY, *overrides)))
    assert len(written) > 6
    read_json(tmp_path / "run" / "metrics.json", FinishedRun)
    read_yaml(tmp_path / "run" / "config.yaml", Settings)
    for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines():
        validated("history.jsonl", json.loads(line), Pass)


GARBAGE_METRICS = [
    '{"schema_version": 2, "status": "running", "name": "a", "config_hash": "0", "seconds": []}',
    "[" * 100_000,
    "[]",
    "\xff",
]
GARBAGE_SETTINGS = [
    "name: 2026-01-01",
    "1: a",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    "name: !!python/object/apply:os.system [true]",
    "name: [",
    "",
]


@pytest.mark.parametrize(
    ("name", "text"),
    [*(("metrics.json", text) for text in GARBAGE_METRICS), *(("config.yaml", text) for text in GARBAGE_SETTINGS)],
    ids=lambda part: part[:20],
)
def test_garbage_in_place_of_a_record_is_one_line(tmp_path: Path, name: str, text: str) -> None:
    file = tmp_path / name
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError) as raised:
        read_json(file, Metrics) if name == "metrics.json" else read_yaml(file, Settings)
    assert str(raised.value).startswith(str(file))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


# Of each of three records the files with what a reader of the table uses; the long parts are cut.
TRIPLE = [
    {
        "metrics.json": {
            key: dict(list(value.items())[:2]) if key in ("retained_saliency", "output_error", "moved_channels") else value
            for key, value in record["metrics"].items()
        },
        "config.yaml": record["config"],
        "environment.json": record["environment"],
        "history.jsonl": record.get("history", []),
    }
    for record in lines_of(THREE_RUNS / "records.jsonl")
]
FILES = sorted(TRIPLE[0])
MARKUP = "</script><b>|$\\frac{[/red]\n\x1b[31m\u2028"
STRANGE: list[Any] = [None, True, 0, -1, 1.5, math.nan, math.inf, 10**400, "x", MARKUP, [], [1, "a", [2]], {}, {"value": "x"}]
IN_YAML: list[Any] = [*STRANGE, date(2026, 1, 1), {1: 2}]
KEYS = [MARKUP, "x_bytes", "x (limited)", ""]
MODES = [
    *(("--format", name) for name in FORMATS),
    ("--baseline", "permutation=none"),
    ("--paper", "2", "--baseline", "permutation=heuristic"),
]
WRITTEN = [("--to", "{}/page.html"), ("--to", "{}/minutes.png"), ("--curves", "{}/curves.png")]


def places(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of each part of a nested value; the empty one first."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [before, *(place for key, part in parts for place in places(part, (*before, key)))]


@st.composite
def changed_files(draw: st.DrawFn) -> tuple[int, str, Any]:
    """Which record, which of its files, and what that holds now: one place has another value, another key, or is gone."""
    number = draw(st.integers(0, 2))
    name = draw(st.sampled_from(FILES))
    content = copy.deepcopy(TRIPLE[number][name])
    strange = draw(st.sampled_from(IN_YAML if name == "config.yaml" else STRANGE))
    place = draw(st.sampled_from(places(content)))
    if not place:
        return number, name, strange
    parent = content
    for key in place[:-1]:
        parent = parent[key]
    what = draw(st.sampled_from(["value", "value", "value", "gone", "key", "added"]))
    if what == "value" or isinstance(parent, list):
        parent[place[-1]] = strange
    elif what == "added":
        parent[draw(st.sampled_from(KEYS))] = strange
    else:
        value = parent.pop(place[-1])
        if what == "key":
            parent[draw(st.sampled_from(KEYS))] = value
    return number, name, content


def write_record_file(file: Path, content: Any) -> None:
    if file.name == "history.jsonl":
        entries = content if isinstance(content, list) else [content]
        file.write_text("\n".join(map(json.dumps, entries)))
    else:
        file.write_text(yaml.dump(content) if file.suffix == ".yaml" else json.dumps(content))


def write_triple(folder: Path) -> None:
    for number, record in enumerate(TRIPLE):
        (folder / f"run{number}").mkdir(parents=True, exist_ok=True)
        for name, content in record.items():
            write_record_file(folder / f"run{number}" / name, content)


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triple")
    write_triple(folder)
    return folder


def results(folder: Path, *options: str, command: str = "results") -> tuple[int, str, list[str]]:
    """A command here: exit code, output and the lines of what it says beside; raises what it raises."""
    with (
        tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="") as out,  # a command may close what it writes to
        redirect_stdout(out),  # type: ignore[type-var]
        redirect_stderr(io.StringIO()) as err,
    ):
        code = call(command, [str(folder), *(option.format(folder) for option in options)])
        out.flush()
        return code, Path(out.name).read_bytes().decode(), err.getvalue().splitlines()


def check_shown(folder: Path, number: int, *options: str) -> None:
    """All that a table of three records may do where one of them was changed."""
    code, out, said = results(folder, *options)
    skipped = [line for line in said if line.startswith(f"note: skipped {folder / f'run{number}'}: ")]
    assert all(line.startswith(("note: ", "error: ")) for line in said), said
    assert all(len(line) < 800 for line in said), said
    if code != 0:  # the row that was to be the baseline has another name now, or none
        assert said[-1].startswith(("error: --baseline", "error: --paper")), said
        assert (code, out) == (1, "")
        return
    rows = json.loads(results(folder, "--format", "json")[1])
    runs = {Path(run).name: row for row in rows for run in row["runs"]}
    assert set(runs) == {"run0", "run1", "run2"} - ({f"run{number}"} if skipped else set())
    for other in {0, 1, 2} - {number}:
        perplexity = TRIPLE[other]["metrics.json"]["perplexity"]["sparse"]["boolq-passages"]["value"]
        assert runs[f"run{other}"]["measures"]["boolq-passages perplexity (window 256)"]["mean"] == perplexity


@settings(max_examples=20, deadline=None, derandomize=True)
@given(change=changed_files(), mode=st.sampled_from(MODES))
def test_a_record_that_is_not_as_it_should_be_is_skipped_and_all_others_are_shown(
    triple: Path, change: tuple[int, str, Any], mode: tuple[str, ...]
) -> None:
    number, name, content = change
    file = triple / f"run{number}" / name
    try:
        write_record_file(file, content)
        check_shown(triple, number, *mode)
    finally:
        write_record_file(file, TRIPLE[number][name])


@settings(max_examples=5, deadline=None, derandomize=True)
@given(change=changed_files(), written=st.sampled_from(WRITTEN[:2]))
def test_a_page_and_pictures_are_written_of_what_is_left(
    triple: Path, change: tuple[int, str, Any], written: tuple[str, str]
) -> None:
    number, name, content = change
    file = triple / f"run{number}" / name
    try:
        write_record_file(file, content)
        code, _, said = results(triple, *written, command="report")
        assert code == 0, said
    finally:
        write_record_file(file, TRIPLE[number][name])


@pytest.mark.parametrize("text", ["{", "\x00\xff"])
@pytest.mark.parametrize("name", FILES)
def test_a_file_of_garbage_takes_no_other_record_with_it(tmp_path: Path, name: str, text: str) -> None:
    write_triple(tmp_path)
    (tmp_path / "run1" / name).write_bytes(text.encode("latin-1"))
    check_shown(tmp_path, 1)
    assert results(tmp_path, *WRITTEN[0], command="report")[0] == 0


@pytest.mark.parametrize("name", ["masks.safetensors", "permutations.safetensors"])
def test_tensors_of_garbage_cost_a_picture_and_nothing_else(tmp_path: Path, name: str) -> None:
    write_triple(tmp_path)
    for number, content in enumerate((b"", struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 1 << 60) + b"{}")):
        (tmp_path / f"run{number}" / name).write_bytes(content)
    assert results(tmp_path, *WRITTEN[0], command="report")[0] == 0
    assert (tmp_path / "page.html").read_text().count(f"{name} has no readable safetensors header") == 2
    code, _, said = results(tmp_path, "--masks", "{}/masks.png", command="report")
    assert code == 1
    assert said[-1].startswith("error: ")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        '{"overrides": [], "outcome": "flew"}',
        '{"overrides": [], "outcome": "ran", "directory": 5}',
    ],
)
def test_an_outcome_of_a_sweep_that_is_garbage_is_left_out(tmp_path: Path, text: str) -> None:
    write_triple(tmp_path)
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "0000.json").write_text(text)
    code, out, _ = results(tmp_path)
    assert (code, len(out.splitlines())) == (0, 6)


def test_numbers_and_texts_at_the_edge_are_shown(triple: Path) -> None:
    file = triple / "run1" / "metrics.json"
    metrics = copy.deepcopy(TRIPLE[1]["metrics.json"])
    metrics["perplexity"]["sparse"]["boolq-passages"]["value"] = math.inf
    metrics["output_error"] = {"a": 1e308, "b": 1e308}
    for tasks in metrics["zero_shot"].values():
        tasks[MARKUP] = tasks.pop("rte")
    metrics["name"] = MARKUP
    try:
        write_record_file(file, metrics)
        for written in WRITTEN:
            assert results(triple, *written, command="report")[0] == 0
        for format in ("md", "latex"):
            code, out, said = results(triple, "--format", format)
            assert (code, said) == (0, [])
            assert "inf" in out
            assert "\x1b" not in out
            assert "\u2028" not in out
        assert len(results(triple, "--format", "md")[1].splitlines()) == 6
    finally:
        write_record_file(file, TRIPLE[1]["metrics.json"])


def test_seeds_are_averaged_over_what_all_of_them_have(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path / f"run{seed}", 20.0 + seed, seed=seed, acc=0.5)
    file = tmp_path / "run1" / "metrics.json"
    metrics = json.loads(file.read_text())
    del metrics["zero_shot"]
    write_record_file(file, metrics)
    code, out, said = results(tmp_path, "--format", "csv")
    assert code == 0
    assert "21.00 ± 1.00" in out
    assert "rte" not in out
    assert said[-1].startswith("note: rte acc: left out of a row of 3 seeds, of which some lack it")


def test_records_are_compared_with_their_checksums(tmp_path: Path) -> None:
    write_triple(tmp_path)
    for number in range(2):
        folder = tmp_path / f"run{number}"
        files = {name: file_checksum(folder / name) for name in ("config.yaml", "environment.json")}
        write_record(folder / "metrics.json", TRIPLE[number]["metrics.json"] | {"files": files})
    assert results(tmp_path)[2] == []
    file = tmp_path / "run0" / "config.yaml"
    file.write_text(file.read_text().replace("seed: 0", "seed: 1"))
    assert "config.yaml is corrupt: it is not what the run left" in results(tmp_path)[2][0]
    file = tmp_path / "run1" / "metrics.json"
    file.write_text(file.read_text().replace('"violations": 0', '"violations": 1'))
    assert "metrics.json is corrupt: its content is not what was written" in results(tmp_path)[2][1]


def test_a_checksum_is_of_what_a_reader_has(tmp_path: Path) -> None:
    write_record(tmp_path / "x.json", {"layers": {9: (1, 2), 10: float("inf")}, "name": "ä"})
    assert read_json(tmp_path / "x.json", Object) == {"layers": {"9": [1, 2], "10": float("inf")}, "name": "ä"}


def keep(*places: Path | str, to: Path) -> int:
    """`permllm results PLACES --jsonl TO`: the exit code."""
    return call("results", [*map(str, places), "--jsonl", str(to)])


def test_kept_records_are_read_like_the_folders_that_they_are_of(tmp_path: Path) -> None:
    for line in lines_of(THREE_RUNS / "records.jsonl"):
        as_folder(line, tmp_path / "folders")
    assert keep(tmp_path / "folders", to=tmp_path / "kept" / "records.jsonl") == 0
    code, table, said = results(tmp_path / "folders")
    assert code == 0
    assert results(tmp_path / "kept")[:2] == results(tmp_path / "kept" / "records.jsonl")[:2] == (0, table)
    assert said == []
    # In a folder that holds both, a run is there once.
    assert results(tmp_path)[1] == table


def test_the_file_is_replaced_and_a_name_in_it_is_of_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kept.jsonl"
    for name, value in (("a", 20.0), ("b", 30.0)):
        make_run(tmp_path / name, value, block_size=int(value))
    assert keep(tmp_path / "a", tmp_path / "b", to=file) == 0
    assert [line["run"] for line in lines_of(file)] == ["a", "b"]
    monkeypatch.chdir(tmp_path / "b")
    assert keep(".", to=file) == 0
    assert [line["run"] for line in lines_of(file)] == ["b"]
    make_run(tmp_path / "elsewhere" / "b", 40.0, block_size=32)
    (tmp_path / "none.jsonl").touch()
    assert keep(tmp_path / "b", tmp_path / "elsewhere", to=file) == 1
    assert keep(tmp_path / "none.jsonl", to=file) == 1
    assert [line["run"] for line in lines_of(file)] == ["b"]


def test_folders_of_the_machine_are_not_kept(tmp_path: Path) -> None:
    line = next(iter(lines_of(THREE_RUNS / "records.jsonl")))
    line["config"]["paths"] = {"runs_dir": "/data/runs", "cache_dir": "C:/cache", "wandb_dir": "offline"}
    line["config"] |= {"runs_dir": "/data/runs", "run_dir": "/data/x"}
    typed = "run.py seed=0 paths.cache_dir=/data/cache run_dir=/data/x paths.wandb_dir=offline 'sparsity_of={down_proj: 4:8}'"
    line["environment"]["command"] = f"{typed} hydra.run.dir=/data/y hydra.sweep.dir=/data/z"
    as_folder(line, tmp_path / "folders")
    assert keep(tmp_path / "folders", to=tmp_path / "kept.jsonl") == 0
    (kept,) = lines_of(tmp_path / "kept.jsonl")
    assert kept["config"]["paths"] == {"runs_dir": "runs", "cache_dir": None, "wandb_dir": "offline"}
    assert (kept["config"]["runs_dir"], kept["config"]["run_dir"]) == ("runs", None)
    assert kept["environment"]["command"] == "run.py seed=0 paths.wandb_dir=offline 'sparsity_of={down_proj: 4:8}'"
    assert "/data" not in (tmp_path / "kept.jsonl").read_text()


def test_scores_are_kept_too(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", 20.0)
    scores = {"evaluations": {"0": {"perplexity": {"sparse": {"x": [1.5, 2.5]}}}}}
    write_record(folder / "scores.json", scores)
    assert keep(folder, to=tmp_path / "kept" / "records.jsonl") == 0
    (line,) = lines_of(tmp_path / "kept" / "records.jsonl")
    assert line["scores"] == scores


def test_what_is_not_finished_is_not_kept(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", 20.0)
    assert keep(tmp_path, to=tmp_path / "x.json") == 1
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"status": "running"}))
    assert keep(tmp_path, to=tmp_path / "x.jsonl") == 1
    assert not list(tmp_path.glob("x.*"))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(place=st.integers(0, 10**9), bit=st.integers(0, 7))
def test_a_bit_that_flips_in_a_line_costs_that_line_at_most(place: int, bit: int) -> None:
    text = bytearray((THREE_RUNS / "records.jsonl").read_bytes())
    text[place % len(text)] ^= 1 << bit
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "records.jsonl").write_bytes(text)
        code, out, said = results(Path(folder))
    # A new line in the middle of one makes two of it; a line that ends no more takes the next one with it.
    assert code == 0
    assert 4 <= len(out.splitlines()) <= 5
    assert all(line.startswith("note: skipped ") and "records.jsonl, line " in line for line in said)
    assert 1 <= len(said) <= 2
