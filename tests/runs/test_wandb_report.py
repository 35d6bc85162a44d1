"""Tables and reports that are made from runs in W&B."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from permllm.cli import main
from permllm.errors import ConfigError, DataError
from permllm.runs import wandb_report as wandb_runs
from permllm.runs.published import published
from tests.conftest import run_command, run_module

RESULTS = ("perplexity/sparse/wikitext2/value", "zero_shot/sparse/rte/acc")


def test_the_table_of_offline_runs_is_that_of_the_run_directories(tmp_path: Path) -> None:
    words = ("-m", "model=tiny", "block_size=16,32", "calibration.samples=4", "logger=wandb")
    assert run_command(*words, cwd=tmp_path, WANDB_MODE="offline").returncode == 0
    runs = str(tmp_path / "runs")
    ours = run_module("permllm", "report", "--offline", runs, "--table", "table6", "--group", "sweep-*")
    assert ours.returncode == 0, ours.stderr
    assert ours.stdout == run_module("permllm", "results", runs, "--paper", "table6").stdout


def online_run(number: int, *, state: str = "finished", group: str = "table6-1a2b3c4d", **changed: Any) -> SimpleNamespace:
    """A run as `wandb.Api` gives it, measured on WikiText-2 and a task."""
    block_size = changed.get("block_size", 64)
    config = {
        "_wandb": {},
        "run_directory": f"runs/{number}",
        "config_hash": str(number),
        "name": "x",
        "model": {"name": changed.get("model", "llama-2-7b")},
        "sparsity": "2:4",
        "pruner": {"name": "wanda"},
        "permutation": {"name": "lcp-paper", "uses": ["block_size"], "sinkhorn_iterations": 5},
        "mask": {"name": "pruner"},
        "reconstruction": {"name": "none"},
        "block_size": block_size,
        "seed": changed.get("seed", 0),
        "calibration": {"dataset": "c4"},
    }
    summary = {
        "_step": 10,
        "schema_version": 2,
        "status": "finished",
        "lcp/loss": {"min": 0.1},
        "pass/loss": {"min": 0.2},
        "seconds/permute": 5.0,
        "name": "x",
        "config_hash": str(number),
        "peak_memory_bytes": 1,
        "sparsity/pattern": "2:4",
        "sparsity/fraction": 0.5,
        "sparsity/of_model": 0.5,
        "sparsity/violations": 0,
        "retained_saliency/mean": 0.6,
        "output_error/mean": 0.1,
        "perplexity/dense/wikitext2/value": 5.0,
        "perplexity/dense/wikitext2/window": 2048,
        "perplexity/dense/wikitext2/tokens": 100,
        "perplexity/sparse/wikitext2/tokens": 100,
        "perplexity/sparse/wikitext2/value": changed.get("perplexity", 9.5),
        "perplexity/sparse/wikitext2/window": 2048,
        "zero_shot/sparse/rte/acc": 0.5,
        "zero_shot/dense/rte/acc": 0.7,
    }
    summary["minutes"] = changed.get("minutes", 2.5)
    for which in ("dense", "sparse"):
        summary[f"zero_shot/{which}/rte/n"] = 10
        summary |= {f"zero_shot/{which}/{task}/limited": False for task in ("rte", "perplexity_task")}
    return SimpleNamespace(
        id=f"id{number}", name=f"run {number}", group=group, state=state, config=config, summary_metrics=summary
    )


class FakeApi:
    """`wandb.Api` with some runs."""

    default_entity = "me"

    def __init__(self, runs: list[SimpleNamespace]) -> None:
        self._runs = runs
        self.asked: list[str] = []

    def runs(self, path: str, order: str) -> list[SimpleNamespace]:
        assert order == "+created_at"
        self.asked.append(path)
        return self._runs


def test_runs_of_the_api_become_a_table_beside_the_papers() -> None:
    runs = [
        online_run(1, seed=0, perplexity=9.4),
        online_run(2, seed=1, perplexity=9.8),
        online_run(3, block_size=32, perplexity=float("inf")),
        online_run(4, block_size=32, perplexity=9.0),
        online_run(5, state="crashed", block_size=128),
        online_run(6, group="table1-00000000", block_size=128),
    ]
    found = wandb_runs.read_api(FakeApi(runs), "me/permllm", ["table6", "table6-*"])
    assert [run.config == {} for run in found] == [False] * 5 + [True]
    of_group = [run for run in found if wandb_runs.chosen(run.group, ["table6", "table6-*"])]
    (table,), notes = wandb_runs.tables(of_group, published("table6"))
    assert table.ids == ["id1", "id2", "id4"]
    assert notes == [
        "run 4 (id4) has the settings of id3, which is older and is not counted",
        "skipped run 5 (id5): not finished (crashed)",
    ]
    lines = wandb_runs.text([table], "md").splitlines()
    paper = {row.setting: row.value for row in published("table6") if row.metric == "wikitext2_ppl"}
    columns = ["block_size", "seeds", "wikitext2 perplexity (window 2048)", "paper, llama-2-7b", "difference", "rte acc"]
    assert lines[0].startswith(f"| {' | '.join(columns)} |")
    assert lines[3].startswith(f"| 32 | 1 | 9.00 | {paper['block_size=32']:.2f} | {9 - paper['block_size=32']:+.2f} | 50.00%")
    assert lines[4].startswith(f"| 64 | 2 | 9.60 ± 0.28 | {paper['block_size=64']:.2f} |")
    assert json.loads(wandb_runs.text([table], "json"))[1]["seeds"] == [0, 1]


def test_what_goes_wrong_at_wandb_is_one_error() -> None:
    class Broken(FakeApi):
        def runs(self, path: str, order: str) -> list[SimpleNamespace]:
            raise ValueError("Could not find project")

    with pytest.raises(DataError, match="the runs of a/b cannot be had from W&B: Could not find project"):
        wandb_runs.read_api(Broken([]), "a/b", ["*"])
    with pytest.raises(ConfigError, match=r"no finished run is among them; skipped run 1 \(id1\)"):
        wandb_runs.tables(wandb_runs.read_api(FakeApi([online_run(1, state="failed")]), "x", ["*"]), published("6"))
    other = online_run(1)
    other.summary_metrics["schema_version"] = 7
    with pytest.raises(DataError, match="schema_version is 7"):
        wandb_runs.as_run(wandb_runs.read_api(FakeApi([other]), "x", ["*"])[0])


def test_without_a_key_the_report_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise RuntimeError("No API key configured.")

    monkeypatch.setattr("wandb.Api", refuse)
    assert main(["report", "--wandb", "permllm", "--table", "table6"]) == 1
    assert capsys.readouterr().err == "error: W&B cannot be reached: No API key configured.\n"


def specified(part: Any) -> dict[str, Any]:
    """What would be sent."""
    return dict(part._to_model().model_dump(by_alias=True, exclude_none=True))


def test_the_report_has_the_table_and_panels_of_the_runs_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    wr, interface = (import_module(f"wandb_workspaces.reports.v2{part}") for part in ("", ".interface"))
    runs = [online_run(1), online_run(2, block_size=32), online_run(3, model="qwen2.5-7b")]
    found, _ = wandb_runs.tables(wandb_runs.read_api(FakeApi(runs), "x", ["*"]), published("table6"))
    report = wandb_runs.report(found, "permllm", "me", "PermLLM, table6")
    kinds = [type(block) for block in report.blocks]
    grids = [wr.PanelGrid, wr.PanelGrid]
    assert kinds == [wr.H2, wr.MarkdownBlock, *grids, wr.H2, wr.MarkdownBlock, wr.P, *grids]
    assert report.blocks[1].text == wandb_runs.text(found[:1], "md")

    # Making the specification looks the project up.
    monkeypatch.setattr(interface, "_get_api", lambda: None)
    monkeypatch.setattr(interface, "execute_graphql", lambda *_: {"project": {"internalId": "1"}})
    over_minutes, grid = (specified(block)["metadata"] for block in report.blocks[2:4])
    for one in (over_minutes, grid):
        assert one["runSets"][0]["filters"]["filters"][0]["value"] == ["id1", "id2"]
    scatters = [panel["config"] for panel in over_minutes["panelBankSectionConfig"]["panels"]]
    assert [panel["xAxis"] for panel in scatters] == ["summary:minutes"] * 2
    assert [panel["yAxis"] for panel in scatters] == [f"summary:{name}" for name in RESULTS]
    assert [key["name"] for key in grid["runSets"][0]["grouping"]] == ["block_size.value"]
    panels = [panel["config"] for panel in grid["panelBankSectionConfig"]["panels"]]
    assert [panel["metrics"] for panel in panels if "xAxis" not in panel] == [[name] for name in RESULTS]
    assert ("lcp/step", "lcp/loss") in [(panel["xAxis"], *panel["metrics"]) for panel in panels if "xAxis" in panel]


def test_publishing_saves_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    saved = []

    def save(report: Any) -> SimpleNamespace:
        saved.append(report)
        return SimpleNamespace(url="https://wandb.ai/me/permllm/reports/1")

    api = FakeApi([online_run(1), online_run(2, block_size=32)])
    monkeypatch.setattr("wandb.Api", lambda: api)
    monkeypatch.setattr("wandb_workspaces.reports.v2.Report.save", save)
    monkeypatch.setattr("wandb_workspaces.workspaces.Workspace.save", save)
    assert main(["report", "--wandb", "permllm", "--table", "table6", "--publish"]) == 0
    assert api.asked == ["me/permllm"]
    report, workspace = saved
    assert (report.entity, report.title) == ("me", "PermLLM, table6")
    assert (workspace.entity, workspace.name) == ("me", "PermLLM, table6")
    printed = capsys.readouterr().out
    assert printed.startswith("| block_size |")
    assert printed.endswith("https://wandb.ai/me/permllm/reports/1\n" * 2)
