"""Tables of documents are those of the records, and one that cannot be made is one line."""

from __future__ import annotations

import csv
import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from permllm.errors import ConfigError
from permllm.report.read import keep_runs
from scripts.readme_tables import (
    bounds,
    claims,
    landscape,
    main,
    needs,
    sizes,
    with_views,
)
from tests.conftest import ROOT
from tests.kept import evaluation, make_run

TABLE_6 = ROOT / "experiments" / "table6" / "records.jsonl"
LANDSCAPE = ROOT / "experiments" / "landscape"
ALLOCATION = ROOT / "experiments" / "allocation"
SIZES = ROOT / "experiments" / "sizes"
SERVING, FRONTIER = ROOT / "experiments" / "serving", "../frontier/minutes-10.jsonl"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("experiments/**/*.md")])


def test_tables_of_documents_are_those_of_the_records(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", *map(str, DOCUMENTS)]) == 0, capsys.readouterr()


@pytest.mark.parametrize(
    "words", ["tabel", "table colums=x", f"table records={TABLE_6} baseline=a=7"]
)
def test_a_table_that_cannot_be_names_its_file(words: str, tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"Before.\n\n<!-- view: {words} -->\nold\n<!-- /view -->\n\nAfter.\n")
    with pytest.raises(ConfigError, match=f"{file}: view "):
        with_views(file)


def test_the_landscape_has_the_gap_of_each_published_row() -> None:
    with (LANDSCAPE / "landscape.csv").open(encoding="utf-8") as file:
        published = list(csv.DictReader(file))
    methods = {row["reference_method"] for row in published}
    shown = "".join(landscape(LANDSCAPE, "landscape.csv", method) for method in methods)
    cells = {tuple(line.strip("| ").split(" | ")) for line in shown.splitlines()}
    for row in published:
        second_hand = "second-hand" in row["note"]
        # The logarithm of a quotient, to the base of the whole gap's.
        share = math.log(
            float(row["reference"]) / float(row["perplexity"]),
            float(row["reference"]) / float(row["dense"]),
        )
        start = (f"{row['method']} †" if second_hand else row["method"], row["year"], row["model"])
        values = (row["reference"], row["perplexity"])
        (found,) = (cell for cell in cells if cell[:3] == start and cell[5:7] == values)
        assert found[7] == f"{100 * share:.1f}%"


def test_the_gap_of_a_method_stands_in_the_column_of_its_model() -> None:
    losses, dense = defaultdict(list), {}
    for line in (SIZES / "records.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        model, method = record["config"]["model"]["name"], record["config"]["method"]
        texts = record["metrics"]["perplexity"]
        losses[model, method].append(
            [np.log(texts["sparse"][text]["value"]) for text in texts["dense"]]
        )
        dense[model] = np.log([result["value"] for result in texts["dense"].values()])
    of_sizes = sizes(SIZES, "wanda", "lcp").splitlines()
    of_needs = needs(SIZES, "records.jsonl", "wanda", "tiny", learned="method=lcp").splitlines()
    heads, shown, needed = (line.split(" | ") for line in (of_sizes[0], of_sizes[2], of_needs[2]))
    for place, model in enumerate(heads[1:], 1):
        start = np.mean(losses[model.strip(" |"), "wanda"], axis=0)
        runs = losses[model.strip(" |"), "lcp"]
        gap = np.mean((start - np.mean(runs, axis=0)) / (start - dense[model.strip(" |")]))
        assert shown[place].startswith(f"{gap:.2%}")
        assert f"({len(runs)})" in shown[place]
        assert needed[place + 1] == f"{gap:.0%}"


def test_a_claim_holds_if_its_interval_is_above_zero() -> None:
    six, half = "sparsity=6:8", "method=wanda,allocation.share=0.5"
    pairs = [f"records.jsonl {first} {second}" for first, second in ((six, half), (half, six))]
    baseline = "method=wanda,allocation=uniform,sparsity=2:4,keep_dense=none"
    same = f"records.jsonl {half} {half}"
    shown = claims(ALLOCATION, baseline, better=pairs[0], worse=pairs[1], same=same)
    cells = [line.strip("| ").split(" | ") for line in shown.splitlines()[2:]]
    assert [line[-1] for line in cells] == ["holds", "does not hold here", "not decided"]
    cautious = claims(ALLOCATION, baseline, of_one_seed="100", better=pairs[0], worse=pairs[1])
    assert cautious.count("not decided") == 2
    losses = {}
    for line in (ALLOCATION / "records.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        config, texts = record["config"], record["metrics"]["perplexity"]
        if config["method"] == "wanda" and not config["keep_dense"]:
            losses[config["sparsity"], config["allocation"].get("share")] = [
                np.log([result["value"] for result in texts[which].values()])
                for which in ("sparse", "dense")
            ]
    start, dense = losses["2:4", None]
    of_six, of_half = losses["6:8", None][0], losses["2:4", 0.5][0]
    points = 100 * np.mean((of_half - of_six) / (start - dense))
    assert [line[3].split()[0] for line in cells] == [f"{points:+.1f}", f"{-points:+.1f}", "+0.0"]


def test_one_seed_holds_beyond_what_reruns_differ_by_and_two_decide_nothing(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    dense = generator.normal(3.0, 0.1, 40)
    # The heuristic closes 40 % of the gap, LCP 45 %.
    shifts = {"none": 1.0, "heuristic": 0.6, "lcp": 0.55}
    rows = "records.jsonl permutation=lcp permutation=heuristic"

    def verdict(seeds: int, **rule: str) -> str:
        for name, shift in shifts.items():
            for seed in range(seeds):
                nats = dense + shift + generator.normal(0.0, 1e-3, 40)
                texts = {"wikitext2": {"dense": dense, "sparse": nats}}
                folder = tmp_path / f"{seeds}" / f"{name}{seed}"
                make_run(folder, 0.0, evaluation(texts), permutation=name, seed=seed)
        keep_runs([tmp_path / f"{seeds}"], tmp_path / "records.jsonl")
        shown = claims(tmp_path, "permutation=none", **rule, better=rows)
        return shown.splitlines()[-1].strip("| ").split(" | ")[-1]

    assert verdict(1, of_one_seed="3") == "holds"
    assert verdict(1, of_one_seed="3", of_heuristic="6") == "not decided"
    assert verdict(2) == "not decided"
    assert verdict(3, of_one_seed="3", of_heuristic="6") == "holds"


def test_the_bytes_of_2_4_kernels_are_those_of_values_and_their_places() -> None:
    shown = bounds(SERVING, "wanda wanda-cp", f"patterns.jsonl {FRONTIER}")
    cells = [line.strip("| ").split(" | ") for line in shown.splitlines() if "`" in line]
    for pattern, _, half, eight, speed, *_ in cells:
        # Bits of eight channels: stored values, and two bits to place each.
        stored = {"2:4": 4, "6:8": 6}[pattern]
        shares = [f"{stored * (bits + 2) / (8 * bits):.1%}" for bits in (16, 8)]
        assert [half, eight, speed] == [*shares, f"{8 / stored:.2f}"]
    assert [cell[0] for cell in cells] == ["2:4", "2:4", "6:8", "6:8"]
