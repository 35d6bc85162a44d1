"""Differences between rows: the gap that a row closes, and intervals against computations of their own, in float64."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from scipy import stats

from permllm.cli import call
from permllm.config import digest_of, evaluation_of
from permllm.errors import ConfigError
from permllm.runs import cost, frame
from permllm.runs.compare import Paired, paired
from permllm.runs.files import write_record
from permllm.runs.published import Comparison, published
from permllm.runs.read import collect
from permllm.runs.render import cells, comparison, find_row, main_measure, records, take_baseline
from permllm.runs.table import Summary, row_labels, summarise
from tests.conftest import run_python
from tests.runs.test_table import make_run

PERPLEXITY = "wikitext2 perplexity (window 2048)"
WINDOW = 2048
TASKS = ("rte", "piqa")


def scored_run(
    folder: Path, nats: NDArray[np.float64], acc: dict[str, NDArray[np.int64]], text: str = "digest", **settings: Any
) -> Path:
    """A run whose windows have these nats a token, and whose tasks these scores."""
    make_run(folder, math.exp(nats.mean()), **settings)
    config, metrics = {}, json.loads((folder / "metrics.json").read_text())
    losses = (nats * (WINDOW - 1)).tolist()
    for values in metrics["perplexity"].values():
        values["wikitext2"]["tokens"] = len(nats) * (WINDOW - 1)
    one = {"acc_norm": None, "stderr": 0.05, "limited": False, "split": None}
    tasks = {task: one | {"acc": float(scores.mean()), "n": len(scores)} for task, scores in acc.items()}
    metrics["zero_shot"] = {"dense": tasks, "sparse": tasks}
    metrics["texts"] = {"perplexity": text}
    config["evaluation"] = {"perplexity": {"dataset": "wikitext2", "window": WINDOW}, "zero_shot": {"tasks": list(acc)}}
    metrics["evaluation"] = evaluation_of(config)
    items = {task: {"items": list(range(len(of))), "digest": task, "acc": of.tolist()} for task, of in acc.items()}
    scores = {"perplexity": {"sparse": {"wikitext2": losses}}, "zero_shot": {"sparse": items}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    write_record(folder / "scores.json", {"evaluations": {digest_of(metrics["evaluation"]): scores}})
    return folder


def drawn(seed: int, windows: int = 60, items: int = 90, shift: float = 0.0) -> tuple[Any, Any]:
    generator = np.random.default_rng(seed)
    nats = np.abs(generator.normal(3.0 + shift, 0.4, windows))
    acc = {task: generator.integers(0, 2, items + 10 * place) for place, task in enumerate(TASKS)}
    return nats, acc


def between(folder: Path, name: str) -> Paired | str:
    summary = summarise(collect([folder]).runs)
    return paired(*(find_row(summary, f"permutation={which}", "--compare") for which in ("lcp", "none")), name)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, tuple[Any, Any], tuple[Any, Any]]:
    ours, theirs = drawn(0), drawn(1, shift=0.2)
    scored_run(tmp_path / "lcp", *ours)
    scored_run(tmp_path / "none", *theirs, permutation="none")
    return tmp_path, ours, theirs


def test_an_interval_is_scipys(two: Any) -> None:
    folder, ours, theirs = two
    samples = {PERPLEXITY: (ours[0], theirs[0])} | {f"{task} acc": (ours[1][task], theirs[1][task]) for task in TASKS}
    for name, (first, second) in samples.items():
        found = between(folder, name)
        assert isinstance(found, Paired)
        expected = stats.bootstrap(
            (first.astype(np.float64), second.astype(np.float64)),
            lambda a, b, axis: np.mean(a, axis=axis) - np.mean(b, axis=axis),
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=20_000,
            rng=np.random.default_rng(5),
        ).confidence_interval
        width = expected.high - expected.low
        assert found.difference == pytest.approx(float(np.mean(first) - np.mean(second)), abs=1e-12)
        # Ends of resampled intervals differ by what 10,000 resamples are worth.
        assert found.low == pytest.approx(expected.low, abs=0.04 * width)
        assert found.high == pytest.approx(expected.high, abs=0.04 * width)
        assert found == between(folder, name)


def test_the_items_of_each_task_are_resampled_on_their_own(two: Any) -> None:
    folder, ours, theirs = two
    found = between(folder, "average acc")
    assert isinstance(found, Paired)
    parts = [ours[1][task].astype(np.float64) - theirs[1][task] for task in TASKS]
    assert found.difference == pytest.approx(np.mean([part.mean() for part in parts]), abs=1e-12)
    error = math.sqrt(sum(part.var() / len(part) for part in parts)) / len(parts)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.05)
    assert found.over == "190 items"


def test_seeds_are_paired_and_averaged(tmp_path: Path) -> None:
    differences = []
    for seed in range(3):
        ours, theirs = drawn(10 + seed), drawn(20 + seed, shift=0.3)
        scored_run(tmp_path / f"lcp{seed}", *ours, seed=seed)
        scored_run(tmp_path / f"none{seed}", *theirs, permutation="none", seed=seed)
        differences.append(ours[0] - theirs[0])
    found = between(tmp_path, PERPLEXITY)
    assert isinstance(found, Paired)
    mean = np.mean(differences, axis=0)
    assert found.difference == pytest.approx(mean.mean(), abs=1e-12)
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * mean.std() / math.sqrt(len(mean)), rel=0.1)
    assert (found.over, found.whole) == ("60 windows, seeds 0, 1, 2", True)
    # Of a seed that only one of the two rows has, nothing is taken.
    scored_run(tmp_path / "lcp3", *drawn(13), seed=3)
    part = between(tmp_path, PERPLEXITY)
    assert part == replace(found, whole=False, over="60 windows, seeds 0, 1, 2 alone")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("nothing kept", "windows were not kept"),
        ("fewer windows", "not the same windows"),
        ("another seed", "no seed in common"),
    ],
)
def test_what_is_not_the_same_has_no_interval(tmp_path: Path, change: str, reason: str) -> None:
    nats, acc = drawn(0)
    scored_run(tmp_path / "lcp", nats, acc)
    windows = nats[: 40 if change == "fewer windows" else None] + 0.1
    other = scored_run(tmp_path / "none", windows, acc, permutation="none", seed=int(change == "another seed"))
    if change == "nothing kept":
        (other / "scores.json").unlink()
    summary = summarise(collect([tmp_path]).runs)
    first, second = summary.rows
    name = next(name for name in summary.measures if name in first.measures and name in second.measures)
    if change == "fewer windows":  # which are columns of their own
        assert "acc" in name
        second.measures[PERPLEXITY] = next(m for n, m in second.measures.items() if n.startswith(PERPLEXITY))
        first.measures[PERPLEXITY] = next(m for n, m in first.measures.items() if n.startswith(PERPLEXITY))
    assert paired(first, second, PERPLEXITY) == reason


def test_the_command_compares_two_rows(two: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder, ours, theirs = two
    words = [str(folder), "--compare", "permutation=lcp", "permutation=none"]
    assert call("results", words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| measure | permutation=lcp | permutation=none | difference | 95 % interval | over |"
    change = math.expm1(ours[0].mean() - theirs[0].mean())
    cells_ = next(line for line in lines if line.startswith(f"| {PERPLEXITY}")).strip("| ").split(" | ")
    assert cells_[3] == f"{change * 100:+.1f}%"
    low, high = (float(word.rstrip("%")) for word in cells_[4].split(" to "))
    assert low < change * 100 < high
    assert cells_[5] == "60 windows"
    assert call("results", [*words, "--json"]) == 0
    found = {line["measure"]: line for line in json.loads(capsys.readouterr().out)}
    assert found[PERPLEXITY]["difference"] == pytest.approx(change)
    assert found["rte acc"]["over"] == "90 items"
    assert call("results", [str(folder), "--compare", "permutation=lcp", "permutation=ria"]) == 1
    assert "error: --compare permutation=ria" in capsys.readouterr().err


def test_the_column_against_the_baseline_has_the_interval(two: Any) -> None:
    folder, *_ = two
    summary = summarise(collect([folder]).runs)
    header, rows = cells(summary, take_baseline(summary, "permutation=none"))
    found = between(folder, PERPLEXITY)
    assert isinstance(found, Paired)
    difference, low, high = (100 * value for value in found.shown())
    (row,) = (row for row in rows if row[0] == "lcp")
    assert row[header.index("against the baseline")] == f"{difference:+.1f}% [{low:+.1f}, {high:+.1f}]"
    found_by_row = {
        line["settings"]["permutation"]: line for line in records(summary, take_baseline(summary, "permutation=none"))
    }
    changes = {method: line["against_baseline"][main_measure(summary)] for method, line in found_by_row.items()}
    assert changes["lcp"]["interval"] == pytest.approx((low / 100, high / 100))
    assert changes["none"]["interval"] is None


def test_where_there_is_no_interval_a_note_says_why(two: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder, *_ = two
    words = [str(folder), "--baseline", "permutation=none"]
    assert call("results", words) == 0
    assert "no interval" not in capsys.readouterr().err
    (folder / "lcp" / "scores.json").unlink()
    assert call("results", words) == 0
    answer = capsys.readouterr()
    assert "note: no interval for 1 of 1 rows: windows were not kept\n" in answer.err
    assert "[" not in answer.out


def gaps(summary: Summary) -> dict[str, float]:
    return {row.labels["permutation"]: row.measures["gap closed"].mean for row in summary.rows if "gap closed" in row.measures}


def test_the_gap_is_that_between_the_unpermuted_model_and_the_dense_one(tmp_path: Path) -> None:
    for seed, (start, value) in enumerate([(40.0, 20.0), (50.0, 24.0)]):
        make_run(tmp_path / f"none{seed}", start, permutation="none", seed=seed)
        make_run(tmp_path / f"lcp{seed}", value, seed=seed)
    summary = summarise(collect([tmp_path]).runs)
    start, here = (math.log(40) + math.log(50)) / 2, (math.log(20) + math.log(24)) / 2
    expected = {"none": 0.0, "lcp": (start - here) / (start - math.log(10))}
    assert gaps(summary) == pytest.approx(expected)
    rows = {row.labels["permutation"]: row.measures["gap closed"] for row in summary.rows}
    # Of each seed its own distance from the unpermuted model, which is none for that one.
    own = np.log([40 / 20, 50 / 24]) / (start - math.log(10))
    assert (rows["lcp"].deviation, rows["none"].deviation) == (pytest.approx(np.std(own, ddof=1)), 0.0)
    header, _ = cells(summary)
    assert header.index("gap closed") == header.index(PERPLEXITY) + 1
    assert summary.notes == []


def test_the_gap_is_to_the_dense_models_of_all_seeds(tmp_path: Path) -> None:
    for seed, dense in enumerate((10.0, 5.0)):
        for name, value in (("none", 40.0), ("lcp", 20.0)):
            folder = make_run(tmp_path / f"{name}{seed}", value, permutation=name, seed=seed)
            metrics = json.loads((folder / "metrics.json").read_text())
            metrics["perplexity"]["dense"]["wikitext2"]["value"] = dense
            (folder / "metrics.json").write_text(json.dumps(metrics))
    expected = math.log(2) / (math.log(40) - (math.log(10) + math.log(5)) / 2)
    assert gaps(summarise(collect([tmp_path]).runs))["lcp"] == pytest.approx(expected)


def test_an_unpermuted_model_that_is_better_than_the_dense_one_leaves_no_gap(tmp_path: Path) -> None:
    make_run(tmp_path / "none", 9.9, permutation="none")
    make_run(tmp_path / "lcp", 10.1)  # worse, and still no hundred per cent
    summary = summarise(collect([tmp_path]).runs)
    assert gaps(summary) == {}
    assert "gap closed" not in summary.measures


def test_a_row_has_the_unpermuted_model_of_the_same_statistics_where_there_is_one(tmp_path: Path) -> None:
    for statistics, start in (("sequential", 40.0), ("dense", 80.0)):
        calibration = {"dataset": "c4", "data_files": None, "statistics": statistics}
        make_run(tmp_path / f"none, {statistics}", start, permutation="none", calibration=calibration)
        make_run(tmp_path / f"heuristic, {statistics}", 20.0, permutation="heuristic", calibration=calibration)
    summary = summarise(collect([tmp_path]).runs)
    found = {row.runs[0].directory.name: row.measures["gap closed"].mean for row in summary.rows}
    expected = {"heuristic, sequential": math.log(2) / math.log(4), "heuristic, dense": math.log(4) / math.log(8)}
    assert found == pytest.approx(expected | {"none, sequential": 0.0, "none, dense": 0.0})


def set_model(run: Path, model: dict[str, Any]) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(config | {"model": model}))


def test_a_baseline_is_no_other_model_of_the_same_name(tmp_path: Path) -> None:
    for revision in ("a", "b"):
        model = {"name": "mine", "source": "hub", "hub_name": "one/mine", "revision": revision, "device": "cpu"}
        set_model(make_run(tmp_path / f"lcp, {revision}", 20.0), model)
    set_model(make_run(tmp_path / "none, b", 40.0, permutation="none"), model)
    summary = summarise(collect([tmp_path]).runs)
    assert "model.revision" in summary.settings
    take_baseline(summary, "permutation=none")
    found = {row.runs[0].directory.name for row in summary.rows if "gap closed" in row.measures}
    assert found == {"lcp, b", "none, b"}


def test_a_text_that_was_measured_in_two_ways_counts_once(tmp_path: Path) -> None:
    for name, values in {"none": (40.0, 80.0), "lcp": (20.0, 20.0)}.items():
        folder = make_run(tmp_path / name, values[0], permutation=name)
        metrics = json.loads((folder / "metrics.json").read_text())
        other = {
            which: {"wikitext2": {"value": value, "window": 256, "tokens": 100}}
            for which, value in (("dense", 10.0), ("sparse", values[1]))
        }
        how = {"perplexity": {"dataset": "wikitext2", "seqlen": 256}}
        metrics["other_evaluations"] = [{"evaluation": how, "evaluation_hash": digest_of(how), "finished": True}]
        metrics["other_evaluations"][0]["perplexity"] = other
        (folder / "metrics.json").write_text(json.dumps(metrics))
    summary = summarise(collect([tmp_path]).runs)
    assert gaps(summary)["lcp"] == pytest.approx(math.log(2) / math.log(4))  # of the evaluation that stands at the top
    other_window = "wikitext2 perplexity (window 256)"
    said = f"gap closed: the mean over {PERPLEXITY}, without {other_window}, of a text that is in it already"
    assert summary.notes == [said]
    assert {"wikitext2 gap closed (window 2048)", "wikitext2 gap closed (window 256)"} <= set(summary.measures)


def test_the_papers_average_stands_beside_one_of_the_same_tasks_alone(tmp_path: Path) -> None:
    paper = Comparison(published("table2"), "llama-2-7b")
    five = ["hellaswag", "arc_easy", "arc_challenge", "openbookqa", "rte"]
    one = {"acc": 0.5, "acc_norm": None, "stderr": 0.05, "n": 32, "limited": False, "split": None}
    for count in (2, 5):
        folder = make_run(tmp_path / str(count), 20.0, permutation="none", model="llama-2-7b", seed=count)
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics["zero_shot"] = dict.fromkeys(("dense", "sparse"), dict.fromkeys(five[:count], one))
        (folder / "metrics.json").write_text(json.dumps(metrics))
        (row,) = summarise(collect([folder]).runs).rows
        assert (paper.value(row, "average acc") is None) == (count == 2)


def test_a_picture_says_which_rows_it_leaves_out(two: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "other", 30.0, permutation="heuristic", acc=0.5)
    assert call("report", [str(tmp_path), "--to", str(tmp_path / "a.png"), "--measure", "piqa acc"]) == 0
    assert "note: the picture is of piqa acc, and leaves out what lacks it: heuristic\n" in capsys.readouterr().err


def test_the_dense_model_of_two_machines_is_one(tmp_path: Path) -> None:
    for name, value in (("none", 10.0), ("lcp", 10.0004), ("other", 10.2)):
        folder = make_run(tmp_path / name, 20.0, permutation=name)
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics["perplexity"]["dense"]["wikitext2"]["value"] = value
        (folder / "metrics.json").write_text(json.dumps(metrics))
    near = summarise(collect([tmp_path / "none", tmp_path / "lcp"]).runs)
    assert near.dense[PERPLEXITY].mean == 10.0
    assert not summarise(collect([tmp_path]).runs).dense


def test_the_gap_of_a_row_has_the_baseline_of_its_own_pruner(tmp_path: Path) -> None:
    ria = {"pruner": {"name": "ria"}}
    make_run(tmp_path / "a", 40.0, permutation="none")
    make_run(tmp_path / "b", 20.0)
    make_run(tmp_path / "c", 60.0, permutation="none", **ria)
    make_run(tmp_path / "d", 30.0, **ria)
    make_run(tmp_path / "e", 15.0, permutation="none", reconstruction={"name": "distill"})
    summary = summarise(collect([tmp_path]).runs)
    found = {row.runs[0].directory.name: row.measures["gap closed"].mean for row in summary.rows}
    share = {name: math.log(start / value) / math.log(start / 10) for name, start, value in
             [("a", 40, 40), ("b", 40, 20), ("c", 60, 60), ("d", 60, 30), ("e", 40, 15)]}  # fmt: skip
    assert found == pytest.approx(share)
    # They compare within a pruner alone, so that nothing is drawn by them.
    assert cost.measures(summary) == [PERPLEXITY, "gap closed"]
    assert set(cost.methods(summary)) == {"wanda, none", "wanda, lcp", "ria, none", "ria, lcp", "wanda, none, distill"}
    (note,) = summary.notes
    assert "those of ria and wanda do not compare" in note
    take_baseline(summary, "pruner=ria,permutation=none")
    assert cost.measures(summary) == ["gap closed", PERPLEXITY]


def test_a_value_may_be_a_list(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 20.0, keep_dense=["0", "-1"])
    make_run(tmp_path / "b", 30.0, keep_dense=["0", "-1"], permutation="none")
    make_run(tmp_path / "c", 30.0)
    summary = summarise(collect([tmp_path]).runs)
    row = find_row(summary, "keep_dense=0, -1,permutation=lcp", "--baseline")
    assert row.runs[0].directory.name == "a"


@pytest.mark.parametrize("setting", ["model.device", "name"])
def test_what_makes_no_result_parts_neither_seeds_nor_a_row_from_its_baseline(setting: str, tmp_path: Path) -> None:
    group, _, key = setting.partition(".")

    def run(name: str, perplexity: float, value: Any, permutation: str, **changed: Any) -> None:
        folder = make_run(tmp_path / name, perplexity, permutation=permutation, **changed)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        if key:
            config[group][key] = value
        else:
            config[group] = value
        (folder / "config.yaml").write_text(yaml.safe_dump(config))

    run("start", 40.0, "one", "none")
    for seed, value in enumerate(("one", "another")):
        run(f"lcp{seed}", 20.0, value, "lcp", seed=seed)
    summary = summarise(collect([tmp_path]).runs)
    assert [(row.labels["permutation"], len(row.runs)) for row in summary.rows] == [("none", 1), ("lcp", 2)]
    assert gaps(summary)["lcp"] == pytest.approx(0.5)
    # Of one seed both are rows, which the setting tells apart.
    run("again", 21.0, "another", "lcp")
    summary = summarise(collect([tmp_path]).runs)
    assert setting in summary.settings
    assert sorted(len(row.runs) for row in summary.rows) == [1, 1, 2]


def test_a_gap_is_compared_by_seeds_that_both_rows_have(tmp_path: Path) -> None:
    texts_run(tmp_path / "none", nats_of(1, SIZES, 2.0), permutation="none")
    texts_run(tmp_path / "heuristic", nats_of(2, SIZES, 1.6), permutation="heuristic")
    for seed in (0, 1):
        texts_run(tmp_path / f"lcp{seed}", nats_of(3 + seed, SIZES, 1.0 + 0.3 * seed), seed=seed)
    alone = summarise(collect([tmp_path / name for name in ("none", "heuristic", "lcp0")]).runs)
    of_seed = paired(find_row(alone, "permutation=lcp", ""), find_row(alone, "permutation=heuristic", ""), "gap closed")
    summary = summarise(collect([tmp_path]).runs)
    lcp, heuristic = (find_row(summary, f"permutation={name}", "") for name in ("lcp", "heuristic"))
    found = paired(lcp, heuristic, "gap closed")
    assert isinstance(found, Paired)
    assert isinstance(of_seed, Paired)
    assert (found.difference, found.low, found.high) == pytest.approx((of_seed.difference, of_seed.low, of_seed.high))
    assert (found.over, found.whole) == ("96 windows of 3 texts, seed 0 alone", False)
    other = summarise(collect([tmp_path / name for name in ("none", "heuristic", "lcp1")]).runs)
    rows = [find_row(other, f"permutation={name}", "") for name in ("lcp", "heuristic")]
    assert paired(*rows, "gap closed") == "no seed in common"
    assert "gap closed: measured from a baseline of other seeds: lcp" in other.notes


def test_files_of_the_hub_are_told_apart_by_name_and_by_what_the_dense_model_makes_of_them(tmp_path: Path) -> None:
    where = "Salesforce/wikitext@{}/wikitext-{}-raw-v1/test"
    scored_run(tmp_path / "none", *drawn(1), where.format("c0ffee", 2), permutation="none")
    scored_run(tmp_path / "lcp", *drawn(2), where.format("0ddba11", 2))
    assert isinstance(between(tmp_path, PERPLEXITY), Paired)
    scored_run(tmp_path / "other", *drawn(3), where.format("c0ffee", 103), permutation="heuristic")
    measures = summarise(collect([tmp_path]).runs).measures
    assert [name for name in measures if name.startswith(PERPLEXITY)] == [
        f"{PERPLEXITY}, text Salesforce/wikitext/wikitext-{version}-raw-v1/test" for version in (2, 103)
    ]
    metrics = json.loads((tmp_path / "lcp" / "metrics.json").read_text())
    metrics["perplexity"]["dense"]["wikitext2"]["value"] *= 1.01
    (tmp_path / "lcp" / "metrics.json").write_text(json.dumps(metrics))
    two = summarise(collect([tmp_path / "none", tmp_path / "lcp"]).runs)
    assert paired(two.rows[0], two.rows[1], PERPLEXITY) == "not the same windows"


def test_a_baseline_is_of_the_same_linears_and_learns_no_mask(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 40.0, permutation="none")
    make_run(tmp_path / "b", 20.0)
    make_run(tmp_path / "c", 15.0, permutation="none", mask={"name": "score"})
    make_run(tmp_path / "d", 12.0, keep_dense=["0"])
    make_run(tmp_path / "e", 12.0, sparsity_of={"mlp": "6:8"})
    summary = summarise(collect([tmp_path]).runs)
    closed = {row.runs[0].directory.name: row.measures.get("gap closed") for row in summary.rows}
    expected = {"a": 0.0, "b": math.log(2) / math.log(4), "c": math.log(40 / 15) / math.log(4)}
    assert {name: measure.mean for name, measure in closed.items() if measure} == pytest.approx(expected)
    paper = Comparison(published("table1"), "smollm2-135m")
    known = {row.runs[0].directory.name for row in summary.rows if paper.value(row, PERPLEXITY) is not None}
    assert known == {"a", "b"}
    assert set(cost.methods(summary)) == {"none", "none, score", "lcp"}
    assert sum(label == "none, score" for label in row_labels(summary)) == 1
    make_run(tmp_path / "f", 24.0, permutation="none", keep_dense=["0"])
    summary = summarise(collect([tmp_path]).runs)
    (row,) = (row for row in summary.rows if row.runs[0].directory.name == "d")
    assert row.measures["gap closed"].mean == pytest.approx(math.log(2) / math.log(2.4))


@pytest.mark.parametrize("file", ["model.path", "calibration.data_files"])
def test_the_baseline_of_a_row_is_of_the_same_files(file: str, tmp_path: Path) -> None:
    """A folder, or a text, that was written anew under its name."""
    for digest, none, lcp in (("one", 40.0, 20.0), ("two", 80.0, 20.0)):
        make_run(tmp_path / f"none {digest}", none, permutation="none", inputs={file: digest})
        make_run(tmp_path / f"lcp {digest}", lcp, inputs={file: digest, "permutation.path": "x"})
    summary = summarise(collect([tmp_path]).runs)
    closed = {row.runs[0].directory.name: row.measures["gap closed"].mean for row in summary.rows}
    expected = {f"lcp {digest}": math.log(none / 20) / math.log(none / 10) for digest, none in (("one", 40), ("two", 80))}
    assert closed == pytest.approx(expected | {"none one": 0.0, "none two": 0.0})


def test_seeds_in_several_formats_are_told_and_memory_is_that_of_the_fastest(tmp_path: Path) -> None:
    for seed, (dtype, seconds, peak) in enumerate([("bfloat16", 60.0, 4), ("bfloat16", 120.0, 5), ("float32", 600.0, 9)]):
        folder = make_run(tmp_path / str(seed), 20.0 + seed, seed=seed)
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics |= {"compute_dtype": dtype, "peak_memory_bytes": peak, "seconds": {"permute": seconds}}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    summary = summarise(collect([tmp_path]).runs)
    (row,) = summary.rows
    assert (cost.minutes(row), cost.memory(row)) == (1.0, 5)
    assert summary.notes == ["wanda, lcp: products of the seeds are in bfloat16 and float32"]
    assert not summarise(collect([tmp_path / "0", tmp_path / "1"]).runs).notes


def test_with_a_baseline_all_gaps_are_from_that_row(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 60.0, permutation="none")
    make_run(tmp_path / "b", 40.0, permutation="heuristic")
    make_run(tmp_path / "c", 20.0)
    summary = summarise(collect([tmp_path]).runs)
    assert gaps(summary)["heuristic"] == pytest.approx(math.log(60 / 40) / math.log(60 / 10))
    take_baseline(summary, "permutation=heuristic")
    expected = {"none": math.log(40 / 60), "heuristic": 0.0, "lcp": math.log(40 / 20)}
    assert gaps(summary) == pytest.approx({name: value / math.log(40 / 10) for name, value in expected.items()})
    assert summary.measures.count("gap closed") == 1


def test_without_an_unpermuted_row_only_a_baseline_gives_a_gap_and_to_its_model_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 40.0, permutation="heuristic")
    make_run(tmp_path / "b", 20.0)
    make_run(tmp_path / "c", 20.0, permutation="other", model="another")
    summary = summarise(collect([tmp_path]).runs)
    assert len(summary.rows) == 3
    assert gaps(summary) == {}
    assert "gap closed" not in summary.measures
    take_baseline(summary, "permutation=heuristic")
    assert gaps(summary) == pytest.approx({"heuristic": 0.0, "lcp": math.log(2) / math.log(4)})


def test_a_change_is_what_its_interval_is_of(tmp_path: Path) -> None:
    """Of seeds that are far apart the ratio of the means is another one."""
    for seed, shift in enumerate((0.0, 3.0)):
        scored_run(tmp_path / f"lcp{seed}", *drawn(seed, shift=shift), seed=seed)
        scored_run(tmp_path / f"none{seed}", *drawn(seed + 9, shift=0.5), permutation="none", seed=seed)
    summary = summarise(collect([tmp_path]).runs)
    lines = records(summary, take_baseline(summary, "permutation=none"))
    (change,) = (line["against_baseline"][main_measure(summary)] for line in lines if line["settings"]["permutation"] == "lcp")
    logarithms = [
        drawn(seed, shift=shift)[0].mean() - drawn(seed + 9, shift=0.5)[0].mean() for seed, shift in ((0, 0), (1, 3))
    ]
    assert change["ours"] == pytest.approx(math.expm1(np.mean(logarithms)))
    low, high = change["interval"]
    assert low < change["ours"] < high


def test_the_gap_is_the_mean_over_texts_that_both_rows_have(tmp_path: Path) -> None:
    for name, values in {"none": (40.0, 80.0), "lcp": (20.0, 20.0)}.items():
        folder = make_run(tmp_path / name, values[0], permutation=name)
        metrics = json.loads((folder / "metrics.json").read_text())
        for which, value in (("dense", 10.0), ("sparse", values[1])):
            metrics["perplexity"][which]["c4"] = {"value": value, "window": 2048, "tokens": 100}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    summary = summarise(collect([tmp_path]).runs)
    assert gaps(summary)["lcp"] == pytest.approx((math.log(2) / math.log(4) + math.log(4) / math.log(8)) / 2)
    assert summary.notes == [f"gap closed: the mean over {PERPLEXITY}, c4 perplexity (window 2048)"]
    assert main_measure(summary) == "gap closed"
    alone = [f"{text} gap closed (window 2048)" for text in ("wikitext2", "c4")]
    assert summary.measures[:5] == [PERPLEXITY, "c4 perplexity (window 2048)", "gap closed", *alone]
    (lcp,) = (row for row in summary.rows if row.labels["permutation"] == "lcp")
    assert [lcp.measures[name].mean for name in alone] == pytest.approx([math.log(2) / math.log(4), math.log(4) / math.log(8)])


def texts_run(folder: Path, nats: dict[str, dict[str, NDArray[np.float64]]], **settings: Any) -> Path:
    """A run whose windows have these nats a token: by `dense` and `sparse`, by text."""
    make_run(folder, 1.0, **settings)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["perplexity"] = {
        which: {
            text: {"value": math.exp(of.mean()), "window": WINDOW, "tokens": of.size * (WINDOW - 1)}
            for text, of in texts.items()
        }
        for which, texts in nats.items()
    }
    names, several = list(nats["dense"]), len(nats["dense"]) > 1
    digests = {name: f"digest of {name}" for name in names}
    metrics["texts"] = {"perplexity": digests if several else digests[names[0]]}
    how = {"dataset": names if several else names[0], "window": WINDOW}
    metrics["evaluation"] = evaluation_of({"evaluation": {"perplexity": how}})
    losses = {which: {text: (of * (WINDOW - 1)).tolist() for text, of in texts.items()} for which, texts in nats.items()}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    write_record(folder / "scores.json", {"evaluations": {digest_of(metrics["evaluation"]): {"perplexity": losses}}})
    return folder


def nats_of(seed: int, sizes: dict[str, int], shift: float) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Windows that are hard for the dense model are hard for the sparse one; `shift` is how much worse that one is."""
    found: dict[str, dict[str, NDArray[np.float64]]] = {"dense": {}, "sparse": {}}
    for place, (text, size) in enumerate(sizes.items()):
        dense = np.random.default_rng(place).normal(3.0, 0.5, size)
        found["dense"][text] = dense
        found["sparse"][text] = dense + np.random.default_rng(100 * seed + place).normal(shift, 0.2, size)
    return found


SIZES = {"boolq-passages": 24, "wikitext2": 40, "sciq-support": 32}


def test_the_mean_gap_has_the_interval_of_windows_drawn_within_each_text(tmp_path: Path) -> None:
    shifts = {"none": 2.0, "heuristic": 1.6, "lcp": 0.9}
    made = {
        name: [nats_of(2 * place + seed, SIZES, shift + 0.1 * seed) for seed in range(2)]
        for place, (name, shift) in enumerate(shifts.items())
    }
    for name, seeds in made.items():
        for seed, nats in enumerate(seeds):
            texts_run(tmp_path / f"{name}{seed}", nats, permutation=name, seed=seed)
    summary = summarise(collect([tmp_path]).runs)

    def drawn_gap(name: str, text: str, of: NDArray[np.int64]) -> float:
        here = np.mean([nats["sparse"][text][of].mean() for nats in made[name]])
        start = np.mean([nats["sparse"][text][of].mean() for nats in made["none"]])
        end = made["none"][0]["dense"][text][of].mean()
        return float((start - here) / (start - end))

    def mean_gap(name: str, generator: np.random.Generator | None) -> tuple[float, float]:
        """Of the row, and its difference from the heuristic's; of all windows without a generator."""
        drawn = {t: np.arange(n) if generator is None else generator.integers(n, size=n) for t, n in SIZES.items()}
        one, other = (float(np.mean([drawn_gap(row, t, of) for t, of in drawn.items()])) for row in (name, "heuristic"))
        return one, one - other

    rows = {row.labels["permutation"]: row for row in summary.rows}
    gap, difference = mean_gap("lcp", None)
    assert rows["lcp"].measures["gap closed"].mean == pytest.approx(gap, abs=1e-12)
    each = []
    for nats, none in zip(made["lcp"], made["none"], strict=True):
        closed = []
        for t in SIZES:
            whole = np.mean([start["sparse"][t] for start in made["none"]]) - np.mean(none["dense"][t])
            closed.append(np.mean(none["sparse"][t] - nats["sparse"][t]) / whole)
        each.append(np.mean(closed))
    assert rows["lcp"].measures["gap closed"].deviation == pytest.approx(np.std(each, ddof=1), abs=1e-12)
    generator = np.random.default_rng(7)
    resampled = np.array([mean_gap("lcp", generator) for _ in range(3000)])
    for other, value, column in (("none", gap, 0), ("heuristic", difference, 1)):
        found = paired(rows["lcp"], rows[other], "gap closed")
        assert isinstance(found, Paired)
        low, high = np.quantile(resampled[:, column], [0.025, 0.975])
        assert found.difference == pytest.approx(value, abs=1e-12)
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))
        assert (found.kind, found.over, found.whole) == ("share", "96 windows of 3 texts, seeds 0, 1", True)
    lines = {line["measure"]: line for line in comparison(rows["lcp"], rows["heuristic"], summary)}
    assert lines["gap closed"]["difference"] == pytest.approx(difference)
    assert lines["wikitext2 gap closed (window 2048)"]["over"] == "40 windows, seeds 0, 1"
    header, body = cells(summary, take_baseline(summary, "permutation=none"))
    (lcp,) = (line for line in body if line[0] == "lcp")
    low, high = (100 * end for end in paired(rows["lcp"], rows["none"], "gap closed").shown()[1:])  # type: ignore[union-attr]
    assert lcp[header.index("against the baseline")] == f"{gap * 100:+.1f} points [{low:+.1f}, {high:+.1f}]"


def test_rows_whose_texts_differ_are_compared_by_those_that_all_have(tmp_path: Path) -> None:
    texts_run(tmp_path / "none", nats_of(1, SIZES, 2.0), permutation="none")
    texts_run(tmp_path / "lcp", nats_of(2, SIZES, 1.0))
    two = {text: SIZES[text] for text in ("wikitext2", "sciq-support")}
    texts_run(tmp_path / "heuristic", nats_of(3, two, 1.5), permutation="heuristic")
    summary = summarise(collect([tmp_path]).runs)
    names = {text: f"{text} perplexity (window {WINDOW})" for text in SIZES}
    both = ", ".join(names[text] for text in two)
    lacks = names["boolq-passages"]
    assert summary.notes == [
        f"rows are compared by {both}: some rows lack {lacks}",
        f"gap closed: the mean over {both}, without {lacks}, which some rows lack",
    ]
    rows = {row.labels["permutation"]: row for row in summary.rows}
    of_each = [rows["lcp"].measures[f"{text} gap closed (window {WINDOW})"].mean for text in two]
    assert rows["lcp"].measures["gap closed"].mean == pytest.approx(np.mean(of_each))
    assert isinstance(paired(rows["lcp"], rows["heuristic"], "gap closed"), Paired)
    # One text alone is what all have: it compares, also where another one stands first.
    texts_run(tmp_path / "other", nats_of(3, {"wikitext2": 40}, 1.5), permutation="other")
    assert main_measure(summarise(collect([tmp_path]).runs)) == names["wikitext2"]
    texts_run(tmp_path / "c4", nats_of(3, {"c4": 40}, 1.5), permutation="none", model="another")
    notes = summarise(collect([tmp_path]).runs).notes
    assert notes[0].startswith("no perplexity compares all rows: some rows lack ")
    assert notes[1] == "gap closed: no text is in all rows, so that each stands alone"


def test_runs_are_a_frame(tmp_path: Path) -> None:
    for seed, value in enumerate([20.0, 22.0, 24.0]):
        make_run(tmp_path / f"a{seed}", value, seed=seed)
    make_run(tmp_path / "b", 30.0, permutation="none")
    runs = frame(tmp_path)
    assert len(runs) == 4
    means = runs.groupby("permutation")[PERPLEXITY].agg(["mean", "std"])
    assert means.loc["lcp"].tolist() == [22.0, 2.0]
    assert set(runs[f"dense: {PERPLEXITY}"]) == {10.0}
    assert set(runs["seed"]) == {0, 1, 2}


def test_without_a_finished_run_there_is_no_frame(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make_run(tmp_path / "a", 20.0)
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps(metrics | {"status": "running"}))
    with pytest.raises(ConfigError, match=rf"no finished run is among them; skipped {folder}: not finished"):
        frame(tmp_path)
    make_run(tmp_path / "b", 20.0)
    assert len(frame(tmp_path)) == 1
    assert f"skipped {folder}: not finished" in caplog.text


def test_a_table_needs_nothing_that_takes_long_to_import(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 20.0)
    code = (
        "import sys; from permllm.cli import main\n"
        f"assert main(['results', {str(tmp_path)!r}]) == 0\n"
        "heavy = ('torch', 'transformers', 'wandb', 'safetensors', 'matplotlib', 'scipy', 'lm_eval')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    assert run_python("-c", code, cwd=tmp_path, fresh=True).stdout.splitlines()[-1] == "[]"
