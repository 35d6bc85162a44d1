"""Differences between rows: intervals against computations of their own, in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from permllm.cli import call
from permllm.report.compare import interval, paired
from permllm.report.table import Table, find
from permllm.store.files import read_json, write_json
from tests.kept import PERPLEXITY, evaluation, make_run, table_below

TASKS = ("rte", "piqa")
Numbers = NDArray[np.float64]


def drawn(seed: int, shift: float = 0.0) -> tuple[Numbers, dict[str, Numbers]]:
    """Return nats of windows, and scores of items by task."""
    generator = np.random.default_rng(seed)
    nats = np.abs(generator.normal(3.0 + shift, 0.4, 60))
    sizes = zip(TASKS, (90, 100), strict=True)
    return nats, {task: generator.integers(0, 2, items) * 1.0 for task, items in sizes}


def scored(folder: Path, nats: Numbers, tasks: dict[str, Numbers], **settings: Any) -> Path:
    texts = {"wikitext2": {"dense": nats / 2, "sparse": nats}}
    return make_run(folder, 0.0, evaluation(texts, tasks), **settings)


def rows_of(folder: Path) -> tuple[Table, int, int]:
    table = table_below(folder)
    names = ("permutation=lcp", "permutation=none")
    return table, *(find(table.labels, name, "--compare") for name in names)


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Any, Any]:
    ours, theirs = drawn(0), drawn(1, shift=0.2)
    scored(tmp_path / "lcp", *ours)
    scored(tmp_path / "none", *theirs, permutation="none")
    return tmp_path, ours, theirs


def test_an_interval_of_one_seed_is_that_of_paired_windows(two: Any) -> None:
    folder, ours, theirs = two
    table = rows_of(folder)
    samples = {f"{task} acc": ours[1][task] - theirs[1][task] for task in TASKS}
    samples[PERPLEXITY] = ours[0] - theirs[0]
    for name, difference in samples.items():
        found = paired(*table, name)
        values = [found["difference"], *found["interval"]]
        if name == PERPLEXITY:
            values = [math.log1p(value) for value in values]
        of_scipy = stats.ttest_1samp(difference, 0.0).confidence_interval(0.95)
        assert values == pytest.approx([difference.mean(), *of_scipy], abs=1e-12)


def test_the_items_of_each_task_vary_on_their_own(two: Any) -> None:
    folder, ours, theirs = two
    found = paired(*rows_of(folder), "average acc")
    parts = [ours[1][task] - theirs[1][task] for task in TASKS]
    assert found["difference"] == pytest.approx(np.mean([part.mean() for part in parts]), abs=1e-12)
    # Welch's interval of the sum of two means, halved.
    of_scipy = stats.ttest_ind(parts[0], -parts[1], equal_var=False).confidence_interval(0.95)
    assert found["interval"] == pytest.approx([end / 2 for end in of_scipy], abs=1e-12)
    assert found["over"] == "190 items"


SIZES = {"boolq-passages": 24, "wikitext2": 40, "sciq-support": 32}


def nats_of(seed: int, shift: float) -> dict[str, dict[str, Numbers]]:
    """Return nats of windows of the dense model, and by `shift` higher ones of the sparse one."""
    found = {}
    for place, (text, size) in enumerate(SIZES.items()):
        dense = np.random.default_rng(place).normal(3.0, 0.5, size)
        sparse = dense + np.random.default_rng(100 * seed + place).normal(shift, 0.2, size)
        found[text] = {"dense": dense, "sparse": sparse}
    return found


@pytest.mark.parametrize("of_base", [2, 3])
def test_the_mean_gap_has_the_interval_of_seeds_and_of_windows_within_each_text(
    of_base: int, tmp_path: Path
) -> None:
    shifts = {"none": 2.0, "heuristic": 1.6, "lcp": 0.9}
    seeds = {"none": of_base, "heuristic": 2, "lcp": 2}
    made = {
        name: [nats_of(3 * place + seed, shift + 0.1 * seed) for seed in range(seeds[name])]
        for place, (name, shift) in enumerate(shifts.items())
    }
    for name, runs in made.items():
        for seed, nats in enumerate(runs):
            make_run(tmp_path / f"{name}{seed}", 0.0, evaluation(nats), permutation=name, seed=seed)
    table = table_below(tmp_path)
    rows = {table.labels.at[row, "permutation"]: row for row in range(3)}

    def gap_and_slopes(name: str, seed: int, text: str) -> tuple[float, Numbers]:
        """Return the gap, and how much each window moves it (the delta method)."""
        dense = made["none"][0][text]["dense"]
        start = np.mean([run[text]["sparse"] for run in made["none"]], axis=0)
        value = made[name][seed][text]["sparse"]
        whole = start.mean() - dense.mean()
        gap = (start.mean() - value.mean()) / whole
        slopes = (start - value) / whole - gap * (start - dense) / whole
        return gap, slopes - slopes.mean()

    for other in ("none", "heuristic"):
        found = paired(table, rows["lcp"], rows[other], "gap closed")
        if seeds[other] != seeds["lcp"]:
            assert (found["interval"], found["over"]) == (None, "0 windows")
            continue
        by_seed = np.zeros(2)
        variances, freedoms = [], []
        for text, size in SIZES.items():
            of_windows = np.zeros(size)
            for seed in range(2):
                gap, slopes = gap_and_slopes("lcp", seed, text)
                other_gap, other_slopes = gap_and_slopes(other, seed, text)
                by_seed[seed] += (gap - other_gap) / len(SIZES)
                of_windows += (slopes - other_slopes) / 2
            variances.append(of_windows.var(ddof=1) / size / len(SIZES) ** 2)
            freedoms.append(size - 1)
        variances.append(by_seed.var(ddof=1) / 2)
        freedoms.append(1)
        variance = sum(variances)
        terms = [part**2 / free for part, free in zip(variances, freedoms, strict=True)]
        half = stats.t.isf(0.025, variance**2 / sum(terms)) * math.sqrt(variance)
        assert found["difference"] == pytest.approx(by_seed.mean(), abs=1e-12)
        ends = [by_seed.mean() - half, by_seed.mean() + half]
        assert found["interval"] == pytest.approx(ends, abs=0.01 * half)
        assert found["over"] == "96 windows"


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0, 3.0])
def test_an_interval_over_seeds_covers_the_truth(seeds: int, noise: float) -> None:
    """`noise` is the deviation of the mean over all windows, in deviations of a seed."""
    generator = np.random.default_rng(0)
    trials, windows = 3000, 64
    covered = 0
    for _ in range(trials):
        values = np.zeros((2, seeds, windows))
        values[0] += generator.normal(size=(seeds, 1))
        values[0] += noise * math.sqrt(windows) * generator.normal(size=windows)
        low, high = interval([values], np.subtract)
        covered += low < 0 < high
    assert 0.92 < covered / trials < 0.97


def test_rows_are_compared_over_the_seeds_that_both_have(tmp_path: Path) -> None:
    for seed in range(3):
        values = evaluation(nats_of(seed, 2.0))
        make_run(tmp_path / f"none{seed}", 0.0, values, permutation="none", seed=seed)
        if seed != 1:
            values = evaluation(nats_of(10 + seed, 1.0))
            make_run(tmp_path / f"lcp{seed}", 0.0, values, permutation="lcp", seed=seed)
    table = table_below(tmp_path)
    rows = {table.labels.at[row, "permutation"]: row for row in range(2)}
    name = next(name for name in table.usual if "perplexity" in name)
    found = paired(table, rows["lcp"], rows["none"], name)
    text = next(iter(SIZES))
    means = [
        nats_of(10 + seed, 1.0)[text]["sparse"].mean() - nats_of(seed, 2.0)[text]["sparse"].mean()
        for seed in (0, 2)
    ]
    assert found["difference"] == pytest.approx(float(np.expm1(np.mean(means))), rel=1e-9)
    assert found["interval"]
    assert found["over"] == f"{SIZES[text]} windows"
    assert found["seeds"] == len(means)
    assert found["change"].endswith("] over seeds 0, 2")
    assert "over" not in paired(table, rows["lcp"], rows["none"], "gap closed")["change"]


@pytest.mark.parametrize("changed", ["nothing kept", "another tokenizer", "another seed"])
def test_what_is_not_the_same_has_no_interval(
    changed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nats, tasks = drawn(0)
    scored(tmp_path / "lcp", nats, tasks)
    changes: Any = {"another seed": {"seed": 1}, "another tokenizer": {"model": "another"}}
    settings = changes.get(changed, {})
    other = scored(tmp_path / "none", nats + 0.1, tasks, permutation="none", **settings)
    if changed == "nothing kept":
        (file,) = (other / "evaluations").glob("*.json")
        write_json(file, read_json(file) | {"scores": {}})
    assert paired(*rows_of(tmp_path), PERPLEXITY)["over"] == "0 windows"
    assert call("results", [str(tmp_path), "--baseline", "permutation=none"]) == 0
    assert "% [" not in capsys.readouterr().out


def test_other_windows_of_a_text_are_another_column_within_a_model(tmp_path: Path) -> None:
    nats, tasks = drawn(0)
    for number, permutation in enumerate(("lcp", "none", "heuristic")):
        folder = scored(tmp_path / permutation, nats, tasks, permutation=permutation)
        (file,) = (folder / "evaluations").glob("*.json")
        keys = {f"perplexity/wikitext2/2048/{number}": ["wikitext2"]}
        if permutation != "heuristic":  # as in a record of version 1
            write_json(file, read_json(file) | {"measured": {"sparse": keys, "dense": keys}})
    expected = {PERPLEXITY, f"{PERPLEXITY}, windows 0", f"{PERPLEXITY}, windows 1"}
    names = {name for name in table_below(tmp_path).usual if "perplexity" in name}
    assert names == expected
    scored(tmp_path / "heuristic", nats, tasks, permutation="heuristic", model="another")
    one = table_below(tmp_path / "lcp", tmp_path / "heuristic")
    assert {name for name in one.usual if "perplexity" in name} == {PERPLEXITY}


def test_the_command_compares_two_rows_and_all(
    two: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, ours, theirs = two
    words = [str(folder), "--compare", "permutation=lcp", "permutation=none"]
    assert call("results", words) == 0
    lines = capsys.readouterr().out.splitlines()
    expected = math.expm1(ours[0].mean() - theirs[0].mean())
    (line,) = (line for line in lines if line.startswith(f"| {PERPLEXITY}"))
    cells = line.strip("| ").split(" | ")
    change, interval = cells[3].split(" ", 1)
    assert change == f"{expected * 100:+.1f}%"
    low, high = (float(word) for word in interval.strip("[]").split(", "))
    assert low < expected * 100 < high
    assert call("results", [*words, "--json"]) == 0
    found = {line["metric"]: line for line in json.loads(capsys.readouterr().out)}
    assert found[PERPLEXITY]["difference"] == pytest.approx(expected)
    assert found["rte acc (limited)"]["over"] == "90 items"
    assert call("results", [str(folder), "--baseline", "permutation=none"]) == 0
    assert f"{expected * 100:+.1f}% [{low:+.1f}, {high:+.1f}]" in capsys.readouterr().out


def test_all_parts_of_a_mean_have_the_same_seeds() -> None:
    # The effects of two seeds cancel in each mean of both parts.
    first = np.zeros((2, 2, 3))
    first[0, 0] = 1.0
    second = np.zeros((2, 2, 3))
    second[0, 1] = 1.0
    assert interval([first, second], np.subtract) == pytest.approx([0.5, 0.5])
