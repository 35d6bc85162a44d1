"""`permllm results`: columns and rows, formats, gaps, the paper's numbers, unreadable runs."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import yaml

from permllm.cli import call
from permllm.errors import ConfigError
from permllm.report import read as reader
from permllm.report.printed import print_run
from permllm.report.published import Comparison, published
from permllm.report.read import collect
from permllm.report.render import as_text, print_sweep, table_cells, texts
from permllm.report.table import (
    DENSE_ROW,
    Table,
    choose,
    find,
    gap_of,
    main_metric,
    notes,
    row_names,
    table_of,
)
from permllm.store.files import read_json, read_lines, write_json
from permllm.store.sweep import Outcome
from tests.conftest import run_python
from tests.kept import (
    PERPLEXITY,
    THREE_RUNS,
    as_folder,
    evaluation,
    make_run,
    record,
    table_below,
)

IN_TABLE_6 = published("table6").query("metric == 'wikitext2_ppl'").set_index("setting")["value"]


def cells(
    table: Table,
    columns: str | None = None,
    metrics: str | None = None,
    paper: Comparison | None = None,
) -> pd.DataFrame:
    return texts(table, table_cells(table, choose(table, metrics), paper), columns)


def shown(folder: Path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(as_text(cells(table_below(folder)), "csv"))))


def noted(table: Table) -> list[str]:
    return notes(table, table.usual)


def row_of(table: Table, words: str) -> int:
    return find(table.labels, words, "--baseline")


def gaps(table: Table) -> dict[str, float]:
    found = table.means["gap closed"].dropna() if table.gaps else {}
    return {table.labels.at[row, "permutation"]: value for row, value in found.items()}


def test_columns_are_what_varies_and_seeds_become_mean_and_deviation(tmp_path: Path) -> None:
    for seed, value in enumerate([20.0, 22.0, 24.0]):
        make_run(tmp_path / f"a{seed}", value, seed=seed)
    make_run(tmp_path / "b", 30.0, block_size=128)
    header, *lines = shown(tmp_path)
    assert header[:3] == ["block_size", "seeds", PERPLEXITY]
    assert header[3:] == ["saliency retained", "output error", "seconds"]
    assert [line[:3] for line in lines[1:]] == [["64", "3", "22.00 ± 2.00"], ["128", "1", "30.00"]]
    assert lines[0][:3] == ["dense", "", "10.00"]
    assert lines[2][3:] == ["60.00%", "0.1500", "5"]


def test_an_evaluation_that_was_interrupted_hides_no_gap(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 40.0, permutation="none")
    texts = [{"wikitext2": {"dense": dense, "sparse": 20.0}} for dense in (10.0, 11.0)]
    other = evaluation(texts[1], limit=256)
    del other["finished"], other["perplexity"]["sparse"]
    other["perplexity"]["dense"]["wikitext2"]["tokens"] *= 2
    make_run(tmp_path / "b", 20.0, evaluation(texts[0]), other)
    header, *lines = shown(tmp_path)
    assert [line[1] for line in lines] == ["10.00", "40.00", "20.00"]
    assert [line[header.index("gap closed")] for line in lines] == ["", "0.00%", "50.00%"]


def test_runs_that_differ_where_no_column_looks_are_not_averaged(tmp_path: Path) -> None:
    for revision, value in (("a", 20.0), ("b", 30.0)):
        inputs = {"calibration.data_files": revision * 20}
        make_run(tmp_path / revision, value, model="mine", inputs=inputs)
    found = [row[:2] for row in shown(tmp_path)]
    assert found[0] == ["calibration.data_files (digest)", PERPLEXITY]
    assert found[1:] == [["dense", "10.00"], ["aaaaaaaa", "20.00"], ["bbbbbbbb", "30.00"]]


def test_records_from_before_allocations_are_uniform(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 40.0, permutation="none")
    line = record(20.0, permutation="none", allocation={"name": "sensitive", "share": 0.1})
    line["metrics"]["sparsity"]["of_model"] = 0.45
    as_folder(line, tmp_path / "b")
    table = table_below(tmp_path)
    found = cells(table).iloc[1:].set_index("allocation")
    assert found["zeros"].to_dict() == {"uniform": "50.00%", "sensitive": "45.00%"}
    assert found["dense weights"].to_dict() == {"uniform": "0.00%", "sensitive": "10.00%"}
    assert found["speed limit"].to_dict() == {"uniform": "2", "sensitive": "1.818"}
    assert found["gap closed"].to_dict() == {"uniform": "0.00%", "sensitive": "50.00%"}
    assert [*row_names(table.labels)] == ["sensitive", "uniform"]


def test_settings_that_differ_from_those_of_a_method_are_in_its_name(tmp_path: Path) -> None:
    mask: dict[str, Any] = {"name": "score", "steps": 10, "samples": 4}  # of a budget
    folds = {"name": "heuristic", "constraint": "foldable"}
    named = {
        "masks-folded": {"permutation": folds},
        "masks-folded, permutation.constraint=free": {
            "permutation": folds | {"constraint": "free"}
        },
        "masks-folded, reconstruction=obs, permutation=none": {
            "permutation": {"name": "none"},
            "reconstruction": {"name": "obs"},
        },
        "masks-folded, mask=lowrank": {"permutation": folds, "mask": {"name": "lowrank"}},
    }
    for place, settings in enumerate(named.values()):
        line = record(20.0, method="masks-folded")
        line["config"] |= {"mask": mask} | settings
        as_folder(line, tmp_path / str(place))
    table = table_below(tmp_path)
    assert {*table.labels["method"]} == {*named}
    plain = "method=masks-folded,permutation.constraint=foldable,mask=score"
    assert table.labels.at[row_of(table, plain), "method"] == "masks-folded"
    free = "method=masks-folded,permutation.constraint=free"
    assert table.labels.at[row_of(table, free), "method"] == [*named][1]


def test_columns_can_be_chosen(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 40.0, permutation="none", method="wanda")
    make_run(tmp_path / "b", 20.0, method="masks", mask={"name": "score", "steps": 10})
    table = table_below(tmp_path)
    assert list(cells(table, "method"))[:2] == ["method", PERPLEXITY]
    names = ("method=wanda", "permutation=none,mask=pruner")
    assert len({row_of(table, name) for name in names}) == 1
    make_run(tmp_path / "c", 19.0, method="masks", mask={"name": "score", "steps": 20})
    assert "method" not in shown(tmp_path)[0]
    assert list(cells(table, "permutation", "perplexity, acc_norm")) == ["permutation", PERPLEXITY]


def test_accuracies_have_their_errors_and_a_mean_over_tasks_with_items(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tasks = {"rte": 0.5, "piqa": 0.7, "a group": 0.0}
    line = record(0.0, evaluation({"wikitext2": {"dense": 10.0, "sparse": 20.0}}, tasks))
    for part in line["evaluations"][0]["tasks"].values():
        part["a group"]["n"] = None
    as_folder(line, tmp_path / "a")
    found = dict(zip(*[shown(tmp_path)[place] for place in (0, 2)], strict=True))
    assert found["rte acc (limited)"] == "50.00% ± 5.00%"
    assert found["average acc (limited)"] == "60.00% ± 3.54%"
    assert not [name for name in found if "acc_norm" in name]
    table = table_below(tmp_path)
    norms = cells(table, metrics="rte acc_norm")["rte acc_norm (limited)"]
    assert norms.tolist() == ["90.00%", "90.00%"]
    print_run(table.runs[0].metrics | {"seconds": {"prune": 61.0}}, tmp_path)
    printed = capsys.readouterr().out
    assert re.search("average acc, limited to 64 items +│ 60.00% ± 3.54%", printed)
    assert "1.0 min (prune 61.0 s)" in printed


def test_a_baseline_is_named_by_its_settings(tmp_path: Path) -> None:
    make_run(tmp_path / "none", 40.0, permutation="none")
    make_run(tmp_path / "lcp", 20.0)
    found = cells(table_below(tmp_path, baseline="permutation=none")).set_index("permutation")
    against = {"dense": "", "none": "", "lcp": "-50.0%"}
    assert found["against the baseline"].to_dict() == against
    make_run(tmp_path / "ria", 20.0, pruner={"name": "ria"})
    for text in ("block=3", "permutation=magic", "permutation=lcp", "permutation=none,pruner=ria"):
        with pytest.raises(ConfigError, match=f"--baseline {text}: "):
            row_of(table_below(tmp_path), text)


def test_settings_that_options_imply_are_no_columns_and_equal_rows_are_told_apart(
    tmp_path: Path,
) -> None:
    score: Any = {"name": "score", "steps": 10, "samples": 1}
    make_run(tmp_path / "a", 40.0, permutation="none")
    make_run(tmp_path / "b", 30.0, mask=score)
    columns = [*cells(table_below(tmp_path))]
    assert (columns[:3], columns[-1]) == (["permutation", "mask", PERPLEXITY], "seconds")
    make_run(tmp_path / "c", 20.0, mask=score | {"steps": 20, "samples": 5})
    table = table_below(tmp_path)
    columns = [*cells(table)]
    assert (columns[2], columns[-1]) == ("mask.samples", "mask.steps")
    assert [*cells(table, "mask", "perplexity")] == ["mask", "mask.samples", PERPLEXITY]
    names = ["pruner", "score, samples=1", "score, samples=5"]
    assert [*row_names(table.labels, "mask")] == names


def test_formats_hold_the_same_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", 20.0)
    make_run(tmp_path / "b", float("inf"), block_size=128)
    printed = {}
    for words in ("--format md", "--format latex", "--format json", "--json"):
        assert call("results", [str(tmp_path), *words.split()]) == 0
        printed[words] = capsys.readouterr().out
    assert printed["--format md"].splitlines()[2].startswith("| dense | 10.00 |")
    assert r"60.00\% & 0.1500" in printed["--format latex"]
    found = json.loads(printed["--json"])
    assert [row["metrics"][PERPLEXITY]["mean"] for row in found] == [20.0, None]
    assert found[0]["dense"][PERPLEXITY]["mean"] == 10.0
    assert found[0]["settings"] == {"block_size": "64"}
    assert found[0]["runs"] == [str(tmp_path / "a")]
    assert printed["--format json"] == printed["--json"]
    make_run(tmp_path / "c", 22.0, seed=1)
    assert call("results", [str(tmp_path), "--format", "csv"]) == 0
    lines = pd.read_csv(io.StringIO(capsys.readouterr().out), dtype={"block_size": str})
    line = lines[lines["metric"] == PERPLEXITY].set_index("block_size").loc["64"]
    assert (line["value"], line["error"]) == pytest.approx((21.0, 2**0.5))


def test_each_uncertainty_that_is_shown_names_its_source(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nats = np.random.default_rng(0).normal(3.0, 0.5, 20)
    for name, shift in (("none", 1.0), ("lcp", 0.5)):
        texts = {"wikitext2": {"dense": nats, "sparse": nats + shift}}
        make_run(tmp_path / name, 0.0, evaluation(texts), permutation=name)

    def said(*words: str) -> str:
        assert call("results", [str(tmp_path), *words]) == 0
        return capsys.readouterr().err

    compared = ("--compare", "permutation=lcp", "permutation=none")
    assert said("--metrics", "perplexity") == ""
    assert "0 % is 'none'" in said()
    for words in (("--baseline", "permutation=none"), compared):
        assert "Student" in said(*words)
    make_run(tmp_path / "more", 20.0, seed=1)
    assert "deviation over the seeds" in said()
    assert "standard error over the items" in said()


def test_the_base_of_a_gap_is_one_number_whatever_seeds_a_row_has(tmp_path: Path) -> None:
    base = {0: (150.0, 300.0), 1: (170.0, 360.0), 2: (158.0, 340.0)}
    dense = (23.0, 46.0)
    learned = {"same": (0, 1, 2), "fewer": (0, 1), "others": (7, 8), "single": (5,)}
    values = {seed: (50.0 + 3 * seed, 120.0 - 2 * seed) for seed in (0, 1, 2, 5, 7, 8)}

    def made(name: str, seed: int, sparse: tuple[float, float], **settings: Any) -> None:
        texts = {
            text: {"dense": dense[place], "sparse": sparse[place]}
            for place, text in enumerate(("wikitext2", "c4"))
        }
        make_run(tmp_path / f"{name}{seed}", 0.0, evaluation(texts), seed=seed, **settings)

    for seed, sparse in base.items():
        made("none", seed, sparse, permutation="none")
    for name, seeds in learned.items():
        for seed in seeds:
            made(name, seed, values[seed], permutation=name)
    table = table_below(tmp_path)
    start = np.log(np.array([*base.values()], np.float64)).mean(axis=0)
    whole = start - np.log(np.array(dense, np.float64))
    values |= {10 + seed: sparse for seed, sparse in base.items()}
    for name, seeds in [*learned.items(), ("none", (10, 11, 12))]:
        here = np.log(np.array([values[seed] for seed in seeds], np.float64))
        closed = ((start - here) / whole).mean(axis=1)
        row = row_of(table, f"permutation={name}")
        assert table.means.at[row, "gap closed"] == pytest.approx(closed.mean(), abs=1e-12)
        if len(seeds) > 1:
            deviation = closed.std(ddof=1)
            assert table.errors.at[row, "gap closed"] == pytest.approx(deviation, abs=1e-12)


def test_with_a_baseline_all_gaps_of_its_model_are_from_that_row(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 40.0, permutation="heuristic")
    make_run(tmp_path / "b", 20.0)
    make_run(tmp_path / "c", 20.0, permutation="other", model="another")
    assert "gap closed" not in table_below(tmp_path).usual
    found = gaps(table_below(tmp_path, baseline="permutation=heuristic"))
    assert found == pytest.approx({"heuristic": 0.0, "lcp": math.log(2) / math.log(4)})
    make_run(tmp_path / "d" / "none", 9.9, permutation="none")  # better than the dense model
    make_run(tmp_path / "d" / "lcp", 10.1)
    assert gaps(table_below(tmp_path / "d")) == {}


def test_the_gap_is_the_mean_over_the_texts_that_all_rows_have(tmp_path: Path) -> None:
    both = {"none": (40.0, 80.0), "lcp": (20.0, 20.0)}
    for name, (first, second) in both.items():
        sparse = {"wikitext2": first, "c4": second}
        texts = {text: {"dense": 10.0, "sparse": value} for text, value in sparse.items()}
        make_run(tmp_path / name, 0.0, evaluation(texts), permutation=name)
    table = table_below(tmp_path)
    alone = [math.log(2) / math.log(4), math.log(4) / math.log(8)]
    assert gaps(table)["lcp"] == pytest.approx(sum(alone) / 2)
    assert main_metric(table, table.usual) == "gap closed"
    names = [f"{text} gap closed (window 2048)" for text in ("wikitext2", "c4")]
    assert table.usual[:5] == [PERPLEXITY, "c4 perplexity (window 2048)", "gap closed", *names]
    found = table.means.loc[row_of(table, "permutation=lcp"), names].tolist()
    assert found == pytest.approx(alone)
    assert noted(table)[0] == f"gap closed: the mean over {PERPLEXITY}, c4 perplexity (window 2048)"
    make_run(tmp_path / "heuristic", 20.0, permutation="heuristic")
    table = table_below(tmp_path)
    assert gaps(table)["lcp"] == pytest.approx(alone[0])
    assert noted(table)[0] == f"gap closed: the mean over {PERPLEXITY}"
    assert main_metric(table, table.usual) == PERPLEXITY


def test_the_gap_of_a_run_reads_the_runs_beside_it_alone_and_each_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    make_run(home / "none", 40.0, permutation="none")
    lcp = make_run(home / "lcp", 20.0)
    make_run(home / "photos" / "deep" / "seed", 30.0, seed=1)
    (home / "broken").mkdir()
    (home / "broken" / "metrics.json").write_text("7")
    read = Mock(wraps=read_json)
    monkeypatch.setattr(reader, "read_json", read)
    for _ in range(3):
        assert gap_of(lcp) == {"gap_closed": pytest.approx(0.5)}
    files = [call.args[0] for call in read.call_args_list]
    assert not any("photos" in file.parts for file in files)
    assert files.count(home / "none" / "metrics.json") == 1


def test_measures_by_fp8_stand_beside_the_others_with_a_gap_of_their_own(tmp_path: Path) -> None:
    for name, sparse, rounded in (("none", 40.0, 44.0), ("lcp", 20.0, 22.0)):
        plain, fp8 = (
            evaluation({"wikitext2": {"dense": dense, "sparse": value}}, {"rte": 0.5})
            for dense, value in ((10.0, sparse), (11.0, rounded))
        )
        fp8["evaluation"]["weights"], fp8["evaluation_hash"] = "fp8", "1"
        make_run(tmp_path / name, 0.0, plain, fp8, permutation=name)
    table = table_below(tmp_path)
    row = table.means.loc[row_of(table, "permutation=lcp")]
    assert row[[PERPLEXITY, f"{PERPLEXITY} in fp8"]].tolist() == [20.0, 22.0]
    assert row[["gap closed", "gap closed in fp8"]].tolist() == pytest.approx([0.5, 0.5])
    assert table.means.at[DENSE_ROW, f"{PERPLEXITY} in fp8"] == 11.0
    assert {"rte acc", "rte acc in fp8"} <= {*table.usual}


def test_numbers_of_another_model_have_their_column(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 50.0, block_size=32)
    make_run(tmp_path / "b", 40.0, block_size=64)
    table = table_below(tmp_path, baseline="block_size=32")
    paper = Comparison("table6", ["smollm2-135m"])
    assert "llama-2-7b" in paper.notes[0]
    row = cells(table, paper=paper).iloc[2]
    assert row["against the baseline"] == "-20.0%"
    assert float(row[paper.heading]) == IN_TABLE_6["block_size=64"]


def test_a_run_that_the_paper_does_not_have_gets_no_number_of_it() -> None:
    settings = {"name": "lcp-paper", "sinkhorn_iterations": 5, "last_layers": None}
    changes: list[dict[str, Any]] = [
        {"block_size": 128},
        {"permutation": settings | {"sinkhorn_iterations": 0}},
        {"permutation": settings | {"last_layers": 6}},
        {"permutation": settings | {"constraint": "foldable"}},
        {"calibration": {"dataset": "pile"}},
        {"reconstruction": {"name": "distill"}},
        {"keep_dense": ["0"]},
    ]
    paper = Comparison("table1", ["llama-2-7b"])
    ours = record(model="llama-2-7b")["config"]
    wanted = "model == 'llama-2-7b' and method == 'permllm-wanda'"
    assert [paper.value(ours, PERPLEXITY)] == published("table1").query(wanted)["value"].tolist()
    assert paper.value(ours, "wikitext2 perplexity (window 256)") is None
    assert {paper.value(ours | changed, PERPLEXITY) for changed in changes} == {None}
    with pytest.raises(ConfigError, match="smollm2-135m"):
        Comparison("table1", ["llama-2-7b", "smollm2-135m"])


def keep(*places: Path, to: Path) -> int:
    return call("results", [*map(str, places), "--jsonl", str(to)])


def test_kept_records_are_read_like_the_folders_that_they_are_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in read_lines(THREE_RUNS / "records.jsonl"):
        as_folder(line, tmp_path / "folders" / line["run"])
    assert keep(tmp_path / "folders", to=tmp_path / "kept" / "records.jsonl") == 0
    assert keep(tmp_path / "folders", tmp_path / "kept", to=tmp_path / "both.jsonl") == 0
    assert (tmp_path / "both.jsonl").read_text() == (tmp_path / "kept/records.jsonl").read_text()
    (tmp_path / "both.jsonl").unlink()
    capsys.readouterr()
    tables = set()
    for place in ("folders", "kept", "kept/records.jsonl", "."):
        assert call("results", [str(tmp_path / place)]) == 0
        tables.add(capsys.readouterr().out)
    assert len(tables) == 1


def test_kept_records_name_no_folder_of_the_machine(tmp_path: Path) -> None:
    line = record(runs_dir=str(tmp_path), paths={"cache_dir": str(tmp_path)})
    task = str(tmp_path / "mine.yaml")
    line["config"] |= {
        "evaluation": {"tasks": {task: {}}},
        "inputs": {f"evaluation.tasks.{task}": "digest"},
    }
    line["environment"] = {"command": f"run.py --config-dir {tmp_path}", "seed": 0}
    as_folder(line, tmp_path / "run")
    assert keep(tmp_path / "run", to=tmp_path / "kept.jsonl") == 0
    assert str(tmp_path) not in (tmp_path / "kept.jsonl").read_text()
    (kept,) = read_lines(tmp_path / "kept.jsonl")
    assert kept["environment"] == {"seed": 0}
    assert [*kept["config"]["evaluation"]["tasks"]] == ["mine.yaml"]
    assert keep(tmp_path / "run", to=tmp_path / "kept.txt") == 1  # no command would read it


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("metrics.schema_version", 2, "schema_version=2: expected 3"),
        ("metrics.status", "running", "not finished (running); the same command continues it"),
        ("metrics.seconds", {"calibrate": "x"}, "not as a run leaves it: "),
        ("config.mask", "score", "not as a run leaves it: "),
    ],
)
def test_a_record_that_cannot_be_read_is_named_and_the_others_are_shown(
    name: str, change: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part, key = name.split(".")
    line = record(seed=1) | {"run": "bad"}
    line[part][key] = change
    folders, kept = tmp_path / "folders", tmp_path / "kept.jsonl"
    lines = [record() | {"run": "good"}, line]
    for one in lines:
        as_folder(one, folders / one["run"])
    kept.write_text("".join(json.dumps(one) + "\n" for one in lines))
    for place, where in ((folders, folders / "bad"), (kept, f"{kept}, line 2")):
        assert call("results", [str(place)]) == 0
        err = capsys.readouterr().err
        (run,) = collect([place]).runs
        assert run.directory.name.endswith("good")
        assert err.startswith(f"note: skipped {where}: ")
        assert said in err
        assert err.count("\n") == 1


def test_settings_that_were_cut_short_take_no_other_run_with_them(tmp_path: Path) -> None:
    make_run(tmp_path / "good")
    file = make_run(tmp_path / "bad", seed=1) / "config.yaml"
    config = record(seed=1)["config"]
    # The order in which a run writes them: `inputs` comes last.
    lines = [yaml.safe_dump({key: config[key]}) for key in config if key != "inputs"]
    for end in range(len(lines) + 1):
        file.write_text("".join(lines[:end]))
        assert [run.config["seed"] for run in collect([tmp_path]).runs] == [0]


@pytest.mark.parametrize(
    "name", ["metrics.json", "config.yaml", "evaluations/0.json", "history.jsonl"]
)
@pytest.mark.parametrize("content", [b"\x00\xff", b"7", b"[" * 100_000])
def test_a_file_of_garbage_takes_no_other_run_with_it(
    name: str, content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "good")
    (make_run(tmp_path / "bad", seed=1) / name).write_bytes(content)
    assert call("results", [str(tmp_path)]) == 0
    assert [run.config["seed"] for run in collect([tmp_path]).runs] == [0]
    (note,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / 'bad'}" in note


def test_a_place_without_runs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reasons = {"none": "expected a directory, or a file of records", "": "no finished run below"}
    for place, message in reasons.items():
        assert call("results", [str(tmp_path / place)]) == 1
        assert message in capsys.readouterr().err
    for name in ("a", "b"):
        make_run(tmp_path / name)
    assert call("results", [str(tmp_path)]) == 0
    assert "b has the same settings as" in capsys.readouterr().err


def test_the_runs_of_a_sweep_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = {"directory": str(make_run(tmp_path / "runs" / "a"))}
    failed = {"reason": "out of memory"}
    for number, job in enumerate((ran, failed)):
        words = {"overrides": [f"seed={number}"], "outcome": "x"}
        write_json(tmp_path / f"sweep/jobs/{number:04d}.json", job | words)
    assert call("results", [str(tmp_path / "sweep")]) == 0
    assert "skipped seed=1: out of memory" in capsys.readouterr().err
    write_json(tmp_path / "again/jobs/0000.json", ran | {"overrides": ["seed=1"], "outcome": "ran"})
    assert keep(tmp_path / "sweep", tmp_path / "again", to=tmp_path / "kept.jsonl") == 0


def test_gaps_of_all_pruners_are_from_wanda_by_default(tmp_path: Path) -> None:
    def made(name: str, perplexity: float, pruner: str, dataset: str = "c4", **how: Any) -> None:
        calibration = {"dataset": dataset}
        settings = {"name": pruner, "damping": 0.01} if pruner == "sparsegpt" else {"name": pruner}
        make_run(tmp_path / name, perplexity, pruner=settings, calibration=calibration, **how)

    made("wanda", 40.0, "wanda", permutation="none")
    made("sparsegpt", 20.0, "sparsegpt", permutation="none")
    made("sparsegpt lcp", 15.0, "sparsegpt")
    made("ria", 30.0, "ria", dataset="pile", permutation="none")
    made("ria lcp", 20.0, "ria", dataset="pile")
    made("other text", 20.0, "ria", dataset="own")
    made("some dense", 12.0, "wanda", keep_dense=["0"])
    made("other file", 12.0, "wanda", inputs={"calibration.data_files": "digest"})
    table = table_below(tmp_path)
    rows = {table.members(row)[0].directory.name: row for row in table.labels.index}
    found = {name: table.means.at[row, "gap closed"] for name, row in rows.items()}
    for name in ("other text", "some dense", "other file"):
        assert math.isnan(found.pop(name))
    expected = {"wanda": 0.0, "sparsegpt": math.log(2), "sparsegpt lcp": math.log(40 / 15)}
    expected = {name: value / math.log(4) for name, value in expected.items()}
    own = {"ria": 0.0, "ria lcp": math.log(1.5) / math.log(3)}
    assert found == pytest.approx(expected | own)


def test_a_sweep_ends_with_the_table_of_its_jobs_and_the_reasons_of_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [
        Outcome([f"seed={seed}"], "ran", directory=str(make_run(tmp_path / str(seed), seed=seed)))
        for seed in range(2)
    ]
    jobs.append(Outcome(["seed=2"], "failed", "out of memory"))
    print_sweep(jobs, tmp_path)
    printed = capsys.readouterr().out
    assert re.search("lcp +│ +2 +│ +20.00", printed)
    assert "failed seed=2: out of memory\n2 ran, 1 failed\npermllm results " in printed


def test_a_dense_model_that_runs_do_not_share_is_noted(tmp_path: Path) -> None:
    for seed, dense in enumerate((10.0, 10.0, 11.0)):
        texts = {"wikitext2": {"dense": dense, "sparse": 20.0}}
        make_run(tmp_path / str(seed), 0.0, evaluation(texts), seed=seed)
        table = table_below(tmp_path)
        assert (DENSE_ROW in table.means.index) == (seed < 2)
        assert len(noted(table)) == (seed == 2)


def test_seeds_are_averaged_over_what_all_of_them_have(tmp_path: Path) -> None:
    for seed in range(3):
        texts = {"wikitext2": {"dense": 10.0, "sparse": 20.0 + seed}}
        tasks = None if seed == 1 else {"rte": 0.5}
        make_run(tmp_path / str(seed), 0.0, evaluation(texts, tasks), seed=seed)
    table = table_below(tmp_path)
    assert cells(table)[PERPLEXITY].tolist()[-1] == "21.00 ± 1.00"
    assert cells(table)["rte acc (limited)"].tolist()[-1] == ""


def test_the_same_run_twice_has_the_evaluations_of_both(tmp_path: Path) -> None:
    one = evaluation({"wikitext2": {"dense": 10.0, "sparse": 20.0}})
    two = evaluation({"c4": {"dense": 11.0, "sparse": 22.0}})
    make_run(tmp_path / "a", 0.0, one)
    make_run(tmp_path / "b", 0.0, two)
    found = collect([tmp_path])
    table = table_of(found.runs)
    assert len(found.runs) == len(found.notes) == 1
    values = table.means.loc[0].dropna()
    assert {20.0, 22.0} <= set(values)
    changed = read_json(tmp_path / "b" / "metrics.json") | {"sha256": {"masks": "another"}}
    write_json(tmp_path / "b" / "metrics.json", changed)
    assert 22.0 not in set(table_below(tmp_path).means.loc[0])


def test_a_baseline_is_compared_with_rows_of_its_model_alone(tmp_path: Path) -> None:
    for model in ("smollm2-135m", "qwen2.5-7b"):
        for permutation in ("none", "lcp"):
            make_run(
                tmp_path / f"{model}-{permutation}", 20.0, permutation=permutation, model=model
            )
    found = table_below(tmp_path, baseline="model=smollm2-135m,permutation=none")
    column = "against the baseline"
    shown = table_cells(found)
    rows = shown[shown["column"].str.endswith(column)].query("value.notna()")["row"]
    assert {found.labels.at[row, "model"] for row in rows} == {"smollm2-135m"}


def test_the_dense_model_has_its_number_where_some_runs_lack_the_text(tmp_path: Path) -> None:
    both = {text: {"dense": 10.0, "sparse": 20.0} for text in ("wikitext2", "c4")}
    make_run(tmp_path / "a", 0.0, evaluation({"wikitext2": both["wikitext2"]}), permutation="none")
    make_run(tmp_path / "b", 0.0, evaluation(both))
    table = table_below(tmp_path)
    (column,) = [name for name in table.usual if "c4" in name and "perplexity" in name]
    assert table.means.at[DENSE_ROW, column] == 10.0


def test_a_row_has_the_name_of_one_of_its_runs(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 20.0, seed=0)
    make_run(tmp_path / "b", 21.0, seed=1, method="order")
    assert [*table_below(tmp_path).labels["method"]] == ["order"]


def test_a_table_needs_nothing_that_takes_long_to_import(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 20.0)
    code = (
        "import sys; from permllm.cli import main\n"
        f"assert main(['results', {str(tmp_path)!r}]) == 0\n"
        "heavy = 'torch transformers wandb matplotlib scipy lm_eval'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert run_python("-c", code, cwd=tmp_path, fresh=True).stdout.splitlines()[-1] == "[]"


def test_a_perplexity_that_is_not_finite_has_no_gap(tmp_path: Path) -> None:
    make_run(tmp_path / "none", 40.0, permutation="none")
    make_run(tmp_path / "heuristic", 20.0, permutation="heuristic")
    make_run(tmp_path / "lcp", math.inf)
    assert gaps(table_below(tmp_path)) == pytest.approx({"none": 0.0, "heuristic": 0.5})


def test_records_of_other_names_are_named_where_a_folder_has_no_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "runs" / "a")
    kept = tmp_path / "kept"
    assert keep(tmp_path / "runs", to=kept / "more.jsonl") == 0
    capsys.readouterr()
    assert call("results", [str(kept)]) == 1
    assert "more.jsonl" in capsys.readouterr().err
    assert call("results", [str(tmp_path / "runs"), str(kept)]) == 0
    assert f"note: {kept} has no records.jsonl; name one of more.jsonl" in capsys.readouterr().err
    assert keep(tmp_path / "runs", to=kept / "records.jsonl") == 0
    assert collect([kept]).notes == []
    (tmp_path / "runs" / "a" / "metrics.json").unlink()  # an interrupted run has its history alone
    with pytest.raises(ConfigError) as refused:
        collect([tmp_path / "runs" / "a"])
    assert "jsonl" not in str(refused.value)
