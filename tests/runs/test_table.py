"""`permllm results`: what is collected, what varies, how it is shown, and what bad input gets."""

from __future__ import annotations

import csv
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from permllm.errors import ConfigError
from permllm.runs.plots import plot_curves, plot_masks
from permllm.runs.printed import print_comparison
from permllm.runs.published import Comparison, published
from permllm.runs.read import collect
from permllm.runs.render import cells, find_row, main_measure, records, render, take_baseline
from permllm.runs.table import summarise
from permllm.runs.tensors import save_masks
from tests.conftest import ROOT, run_module
from tests.kept import THREE_RUNS


def make_run(
    folder: Path,
    perplexity: float,
    *,
    seed: int = 0,
    block_size: int = 64,
    permutation: str = "lcp",
    acc: float | None = None,
    model: str = "smollm2-135m",
    **changed: Any,
) -> Path:
    """The record of a finished run, as small as it can be."""
    config: dict[str, Any] = {
        "name": f"{model}-wanda-{permutation}",
        "model": {"name": model, "source": "wheel", "device": "cpu"},
        "sparsity": "2:4",
        "pruner": {"name": "wanda", "_target_": "x"},
        "permutation": {"name": permutation, "uses": ["block_size"], "_target_": "y"},
        "block_size": block_size,
        "seed": seed,
        "runs_dir": str(folder.parent),
        "calibration": {"dataset": "c4", "data_files": None},
        "mask": {"name": "pruner"},
        "reconstruction": {"name": "none"},
        "inputs": {},
    }
    text = {"wikitext2": {"value": perplexity, "window": 2048, "tokens": 100}}
    dense = {"wikitext2": {"value": 10.0, "window": 2048, "tokens": 100}}
    metrics: dict[str, Any] = {
        "schema_version": 2,
        "status": "finished",
        "name": config["name"],
        "config_hash": "0",
        "evaluation": changed.pop("evaluation", {"perplexity": {"dataset": "wikitext2", "seqlen": 2048}}),
        "evaluation_hash": "0",
        "texts": {"perplexity": "0123456789"},
        "seconds": {"permute": 5.0, "evaluate sparse": 100.0},
        "peak_memory_bytes": 1,
        "sparsity": {"pattern": "2:4", "fraction": 0.5, "of_model": 0.5, "violations": 0},
        "perplexity": {"dense": dense, "sparse": text},
        "retained_saliency": {"a": 0.5, "b": 0.7},
        "output_error": {"a": 0.1, "b": 0.2},
    }
    if acc is not None:
        one = {"acc": acc, "acc_norm": None, "stderr": 0.05, "n": 32, "limited": True, "split": None}
        metrics["zero_shot"] = {"dense": {"rte": one | {"acc": 0.6}}, "sparse": {"rte": one}}
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config | changed))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "history.jsonl").write_text('{"pass": 1, "loss": 1.5}\n{"pass": 2, "loss": 1.2}\n{"pass": 3, "lo')
    return folder


def table(folder: Path, **options: Any) -> list[list[str]]:
    summary = summarise(collect([folder]).runs)
    return list(csv.reader(io.StringIO(render(summary, "csv", **options))))


def test_columns_are_what_varies_and_seeds_become_mean_and_deviation(tmp_path: Path) -> None:
    for seed, value in enumerate([20.0, 22.0, 24.0]):
        make_run(tmp_path / f"a{seed}", value, seed=seed)
    make_run(tmp_path / "b", 30.0, block_size=128)
    header, dense, first, second = table(tmp_path)
    assert header[:3] == ["block_size", "seeds", "wikitext2 perplexity (window 2048)"]
    assert dense[:3] == ["dense", "", "10.00"]
    assert first[:3] == ["64", "3", "22.00 ± 2.00"]
    assert second[:3] == ["128", "1", "30.00"]
    assert dict(zip(header, second, strict=True))["saliency retained"] == "60.00%"
    assert dict(zip(header, second, strict=True))["seconds"] == "5"


def test_runs_that_differ_where_no_column_looks_are_not_averaged(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 20.0, save_weights=True, compute_dtype="float32")
    make_run(tmp_path / "b", 30.0, save_weights=False, compute_dtype="bfloat16")
    header, _, *rows = table(tmp_path)
    assert header[0] == "compute_dtype"
    assert [row[1] for row in rows] == ["30.00", "20.00"]


def test_the_share_of_zeros_stands_where_patterns_differ(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 20.0)
    make_run(tmp_path / "b", 30.0, permutation="none")
    assert "zeros" not in table(tmp_path)[0]
    dense_layers = make_run(tmp_path / "c", 15.0, keep_dense=["0"])
    metrics = json.loads((dense_layers / "metrics.json").read_text())
    metrics["sparsity"]["of_model"] = 0.4375
    (dense_layers / "metrics.json").write_text(json.dumps(metrics))
    header, dense, *rows = table(tmp_path)
    place = header.index("zeros")
    assert dense[place] == ""
    assert {row[header.index("keep_dense")]: row[place] for row in rows} == {"": "50.00%", "0": "43.75%"}
    make_run(tmp_path / "d" / "one", 20.0)
    make_run(tmp_path / "d" / "other", 20.0, sparsity="4:8")  # as many, in another pattern
    assert "zeros" in table(tmp_path / "d")[0]
    make_run(tmp_path / "d" / "third", 20.0, permutation="none", sparsity_of={"down_proj": "4:8"})
    assert "sparsity_of.down_proj" in table(tmp_path / "d")[0]  # though the permutation tells the rows apart


def test_limited_accuracy_says_so_and_has_its_error(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 20.0, acc=0.5)
    header, dense, row = table(tmp_path)
    position = header.index("rte acc (limited)")
    assert row[position] == "50.00% ± 5.00%"
    assert dense[position] == "60.00% ± 5.00%"


def test_baseline(tmp_path: Path) -> None:
    make_run(tmp_path / "none", 40.0, permutation="none")
    make_run(tmp_path / "lcp", 20.0)
    summary = summarise(collect([tmp_path]).runs)
    header, rows = cells(summary, take_baseline(summary, "permutation=none"))
    found = {row[0]: row[header.index("against the baseline")] for row in rows}
    assert found == {"dense": "", "none": "", "lcp": "-50.0%"}
    with pytest.raises(ConfigError, match="valid are permutation"):
        find_row(summary, "block=3", "--baseline")
    with pytest.raises(ConfigError, match="no row has permutation=magic; valid are none, lcp"):
        find_row(summary, "permutation=magic", "--baseline")
    make_run(tmp_path / "ria", 20.0, pruner={"name": "ria"})
    summary = summarise(collect([tmp_path]).runs)
    with pytest.raises(ConfigError, match=r"permutation=lcp: 2 rows have these settings; they differ in pruner: add one$"):
        find_row(summary, "permutation=lcp", "--baseline")
    with pytest.raises(ConfigError, match="permutation=none,pruner=ria: no row has all of these settings"):
        find_row(summary, "permutation=none,pruner=ria", "--baseline")


def test_formats_hold_the_same_numbers(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 20.0)
    make_run(tmp_path / "b", 30.0, block_size=128)
    summary = summarise(collect([tmp_path]).runs)
    records = json.loads(render(summary, "json"))
    assert [record["measures"]["wikitext2 perplexity (window 2048)"]["mean"] for record in records] == [20.0, 30.0]
    assert records[0]["settings"] == {"block_size": "64"}
    markdown = render(summary, "md").splitlines()
    assert markdown[2].startswith("| dense | 10.00 |")
    latex = render(summary, "latex")
    assert r"block\_size & wikitext2 perplexity (window 2048)" in latex
    assert r"60.00\% & 0.1500" in latex
    assert latex.count(r"\\") == 4


def test_every_published_number_is_found_by_its_table() -> None:
    with open(ROOT / "permllm" / "runs" / "published.csv", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert sum(len(published(f"table{number}")) for number in range(1, 9)) == len(rows)
    with pytest.raises(ConfigError, match="valid are table1, table2"):
        published("table9")


def test_the_papers_numbers_stand_beside_ours(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 9.5, model="llama-2-7b")
    make_run(tmp_path / "b", 9.9, model="llama-2-7b", block_size=32)
    summary = summarise(collect([tmp_path]).runs)
    paper = Comparison(published("table6"), "llama-2-7b")
    assert paper.note == ""
    header, rows = cells(summary, paper=paper)
    expected = {row.setting: row.value for row in published("6") if row.metric == "wikitext2_ppl"}
    for row in rows[1:]:
        value = expected[f"block_size={row[0]}"]
        assert row[header.index("paper, llama-2-7b")] == f"{value:.2f}"
        ours = float(row[header.index("wikitext2 perplexity (window 2048)")])
        assert row[header.index("difference")] == f"{ours - value:+.2f}"
    other = Comparison(published("table6"), "smollm2-135m")
    assert "llama-2-7b" in other.note
    assert "difference" not in cells(summary, paper=other)[0]


def test_several_models_of_the_paper_have_its_numbers_each_and_another_model_only_alone(tmp_path: Path) -> None:
    for model in ("llama-2-7b", "opt-6.7b"):
        make_run(tmp_path / model, 9.5, model=model, permutation="none")
    summary = summarise(collect([tmp_path]).runs)
    paper = Comparison(published("table1"), ["llama-2-7b", "opt-6.7b"])
    header, rows = cells(summary, paper=paper)
    expected = {row.model: row.value for row in published("1") if row.method == "wanda"}
    assert {row[0]: float(row[header.index("paper")]) for row in rows[1:]} == {
        model: expected[model] for model in ("llama-2-7b", "opt-6.7b")
    }
    with pytest.raises(ConfigError, match="not smollm2-135m; give runs of one model"):
        Comparison(published("table1"), ["llama-2-7b", "smollm2-135m"])


def test_no_column_has_the_name_of_another() -> None:
    summary = summarise(collect([THREE_RUNS]).runs)
    for table_ in ("table1", "table2"):
        paper = Comparison(published(table_), "smollm2-135m")
        header, _ = cells(summary, take_baseline(summary, "permutation=none"), paper)
        assert len(set(header)) == len(header)


def test_a_run_that_the_paper_does_not_have_gets_no_number_of_it(tmp_path: Path) -> None:
    settings = {"name": "lcp-paper", "uses": ["block_size"], "sinkhorn_iterations": 5, "last_layers": None, "_target_": "y"}
    changes: dict[str, dict[str, Any]] = {
        "same": {},
        "block size": {"block_size": 128},
        "iterations": {"permutation": settings | {"sinkhorn_iterations": 0}},
        "layers": {"permutation": settings | {"last_layers": 6}},
        "foldable": {"permutation": settings | {"constraint": "foldable"}},
        "text": {"calibration": {"dataset": "pile"}},
        "weights": {"reconstruction": {"name": "distill"}},
    }
    paper = Comparison(published("table1"), "llama-2-7b")
    found = {}
    (made,) = collect([make_run(tmp_path / "a", 9.5, model="llama-2-7b")]).runs
    for name, changed in changes.items():
        run = replace(made, config=made.config | changed)
        (row,) = summarise([run]).rows
        found[name] = paper.value(row, "wikitext2 perplexity (window 2048)")
        assert paper.value(row, "wikitext2 perplexity (window 256)") is None
    expected = next(row.value for row in published("1") if (row.model, row.method) == ("llama-2-7b", "permllm-wanda"))
    assert found == {name: expected if name == "same" else None for name in changes}
    (row,) = summarise([replace(made, metrics=made.metrics | {"evaluation": {"perplexity": {"limit": 32}}})]).rows
    assert paper.value(row, "wikitext2 perplexity (window 2048)") is None


def test_of_another_model_the_changes_stand_beside_each_other(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 50.0, block_size=32)
    make_run(tmp_path / "b", 40.0, block_size=64)
    summary = summarise(collect([tmp_path]).runs)
    paper = Comparison(published("table6"), "smollm2-135m")
    header, rows = cells(summary, take_baseline(summary, "block_size=32"), paper)
    (row,) = [row for row in rows if row[0] == "64"]
    theirs = {entry.setting: entry.value for entry in published("6") if entry.metric == "wikitext2_ppl"}
    change = 100 * (theirs["block_size=64"] / theirs["block_size=32"] - 1)
    assert row[header.index("against the baseline")] == "-20.0%"
    assert row[header.index("paper, against its baseline")] == f"{change:+.1f}%"
    assert row[header.index("difference of the changes")] == f"{-20 - change:+.1f}%"
    lines = records(summary, take_baseline(summary, "block_size=32"), paper)
    (found,) = [line["against_baseline"] for line in lines if line["settings"]["block_size"] == "64"]
    expected = {"ours": -0.2, "interval": None, "paper": change / 100, "difference": -0.2 - change / 100}
    assert found == {main_measure(summary): pytest.approx(expected)}


def test_the_mean_accuracy_leaves_groups_of_tasks_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", 20.0, acc=0.5)
    metrics = json.loads((folder / "metrics.json").read_text())
    for which in ("dense", "sparse"):
        one = metrics["zero_shot"][which]["rte"]
        metrics["zero_shot"][which] |= {"piqa": one | {"acc": 0.7}, "a group": one | {"acc": 0.0, "n": None}}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    header, _, row = table(tmp_path)
    assert row[header.index("average acc (limited)")].startswith("60.00%")


def test_the_table_after_a_sweep_has_a_column_for_the_seeds_together(tmp_path: Path) -> None:
    for seed, value in enumerate([20.0, 22.0, 24.0]):
        make_run(tmp_path / f"a{seed}", value, seed=seed, acc=0.5)
    make_run(tmp_path / "b", 30.0, permutation="none", acc=0.4)
    output = io.StringIO()
    print_comparison(summarise(collect([tmp_path]).runs), Console(file=output, width=150))
    text = output.getvalue()
    assert "3 seeds" in text
    assert "22.00 ± 2.00" in text
    assert "rte acc (limited)" in text
    assert "40.00% ± 5.00%" in text


def test_masks_are_drawn_as_they_are(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a", 20.0), make_run(tmp_path / "b", 30.0, permutation="none")
    for folder in (first, second):
        mask = torch.rand(8, 16) > 0.5
        save_masks(folder / "masks.safetensors", {f"model.layers.{layer}.mlp.down_proj": mask for layer in range(3)})
    summary = summarise(collect([tmp_path]).runs)
    plot_masks(summary, tmp_path / "masks.png", size=4)
    assert (tmp_path / "masks.png").read_bytes()[:4] == b"\x89PNG"
    plot_masks(summary, tmp_path / "masks.svg")
    assert "model.layers.1.mlp.down_proj" in (tmp_path / "masks.svg").read_text()  # the middle layer
    with pytest.raises(ConfigError, match="has no such mask"):
        plot_masks(summary, tmp_path / "masks.png", "model.layers.7.mlp.down_proj")
    for folder in (first, second):
        (folder / "masks.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"none of the runs has its masks\.safetensors"):
        plot_masks(summary, tmp_path / "masks.png")


def test_curves_are_those_of_the_rows_that_learned(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 20.0)
    other = make_run(tmp_path / "b", 30.0, permutation="none")
    (other / "history.jsonl").unlink()
    plot_curves(summarise(collect([tmp_path]).runs), tmp_path / "curves.svg")
    drawn = (tmp_path / "curves.svg").read_text()
    assert "<!-- lcp -->" in drawn
    assert "<!-- none -->" not in drawn
    with pytest.raises(ConfigError, match="--curves"):
        plot_curves(summarise(collect([other]).runs), tmp_path / "curves.svg")
    with pytest.raises(ConfigError, match=r"--curves .*\.nothing"):
        plot_curves(summarise(collect([tmp_path]).runs), tmp_path / "curves.nothing")


def test_a_sweeps_folder_stands_for_the_runs_of_its_jobs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a", 20.0)
    make_run(tmp_path / "runs" / "of another sweep", 30.0, block_size=128)
    folder = tmp_path / "runs" / "sweeps" / "sweep-1"
    (folder / "jobs").mkdir(parents=True)
    (folder / "jobs" / "0000.json").write_text(json.dumps({"overrides": [], "outcome": "ran", "directory": str(run)}))
    (folder / "jobs" / "0001.json").write_text('{"overrides": ["a=1"], "outcome": "failed", "reason": "no memory"}')
    assert [found.directory for found in collect([folder]).runs] == [run]
    assert collect([folder]).skipped == [(folder, "a=1: no memory")]


def test_bad_files_are_listed_with_path_and_reason_and_duplicates_are_shown(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", 20.0)
    shutil.copytree(first, tmp_path / "copy")
    broken = {"text": "{", "list": "[]", "foreign": '{"loss": 1}', "running": '{"schema_version": 2, "status": "running"}'}
    for name, text in broken.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(text)
    half = make_run(tmp_path / "no config", 1.0)
    (half / "config.yaml").unlink()
    found = collect([tmp_path, tmp_path / "a"])
    assert [run.directory for run in found.runs] == [first]
    assert found.duplicates == [(tmp_path / "copy", first)]
    reasons = {path.name: reason for path, reason in found.skipped}
    assert set(reasons) == {*broken, "no config"}
    for name, text in [
        ("text", "metrics.json is not readable JSON"),
        ("list", "metrics.json: input should be a valid dictionary"),
        ("foreign", "metrics.json: schema_version is missing"),
        ("running", "not finished"),
        ("no config", "config.yaml cannot be read: No such file"),
    ]:
        assert text in reasons[name]
    assert len(found.left_out()) == 6
    # The last line of the history was cut short.
    assert [entry["loss"] for entry in found.runs[0].history] == [1.5, 1.2]


def test_an_empty_directory_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a run is a directory with a metrics\.json"):
        collect([tmp_path])
    with pytest.raises(ConfigError, match="is not a directory"):
        collect([tmp_path / "nothing"])


def test_the_command_line_reads_the_records_of_the_repository() -> None:
    result = run_module("permllm", "results", str(THREE_RUNS), "--paper", "table1")
    assert result.returncode == 0, result.stderr
    for name in ("| permutation |", "| none |", "| heuristic |", "| lcp |", "hellaswag acc (limited)"):
        assert name in result.stdout
    assert "compare the order of the rows" in result.stderr
