"""The page and the pictures of `permllm report`, and its tables from W&B."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from matplotlib import rc_context
from PIL import Image

from permllm.cli import call
from permllm.report.metrics import flat_metrics
from permllm.report.plots import dense_value, drawn_metric, plot_cost, points
from permllm.report.table import DENSE_ROW
from permllm.settings.values import flatten
from permllm.store.files import read_json, write_json
from tests.kept import (
    PERPLEXITY,
    THREE_RUNS,
    as_folder,
    evaluation,
    make_run,
    record,
    table_below,
)

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ERRANDS = ("background-networking", "component-update", "sync")
# No window, no sandbox (containers have none), and none of the browser's own errands.
ARGUMENTS = [
    f"--{word}" for word in ("no-sandbox", "disable-gpu", *(f"disable-{name}" for name in ERRANDS))
]
EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"


def test_a_point_is_a_row_and_nothing_beats_the_front(tmp_path: Path) -> None:
    for seed in range(2):
        seconds = {"load": 7.0, "permute": 570.0 + 120 * seed, "prune": 30.0, "evaluate": 999.0}
        how: Any = {"seed": seed, "seconds": seconds, "peak_memory_bytes": 4 * (seed + 1)}
        make_run(tmp_path / f"lcp{seed}", 20.0 + 2 * seed, **how)
    make_run(tmp_path / "none", 40.0, permutation="none", seconds={"permute": 5.0})
    make_run(tmp_path / "slow", 50.0, permutation="heuristic", seconds={"permute": 50.0})
    make_run(tmp_path / "from_file", 20.0, permutation="from_file")
    make_run(tmp_path / "infinite", float("inf"), permutation="other")
    found = points(table_below(tmp_path), PERPLEXITY).set_index("name")
    assert set(found.index) == {"lcp", "none", "heuristic"}
    lcp = found.loc["lcp"]  # minutes are those of the faster seed
    assert (lcp["minutes"], lcp["value"], lcp["memory"]) == (10.0, 21.0, 8)
    assert lcp["error"] == pytest.approx(2**0.5)
    assert found["front"].to_dict() == {"none": True, "heuristic": False, "lcp": True}
    # Another model has a front of its own.
    make_run(tmp_path / "other", 60.0, model="llama-2-7b", seconds={"permute": 50.0})
    slow: Any = {"seconds": {"permute": 500.0}}
    make_run(tmp_path / "worse", 70.0, model="llama-2-7b", permutation="none", **slow)
    both = points(table_below(tmp_path), PERPLEXITY).set_index("name")
    best = {"llama-2-7b, lcp", "smollm2-135m, lcp", "smollm2-135m, none"}
    assert set(both.index[both["front"]]) == best


def test_a_star_is_for_minutes_of_a_run_that_has_recorded_a_hit(tmp_path: Path) -> None:
    for name, seconds in (("unknown", 0.001), ("computed", 0.001), ("lcp", 50.0)):
        make_run(tmp_path / name, 20.0, permutation=name, seconds={"calibrate": seconds})
    facts = {"computed": {"saliency": False, "target": False}, "lcp": {"target": True}}
    for name, hits in facts.items():
        file = tmp_path / name / "metrics.json"
        write_json(file, read_json(file) | {"cached": hits})
    found = points(table_below(tmp_path), PERPLEXITY).set_index("name")
    assert found["cached"].to_dict() == {"unknown": False, "computed": False, "lcp": True}


def test_rows_without_a_point_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tmp_path / "runs"
    make_run(runs / "lcp", 20.0)
    make_run(runs / "from_file", 20.0, permutation="from_file")
    make_run(runs / "infinite", float("inf"), permutation="other")
    file = tmp_path / "page.html"
    assert call("report", [str(runs), "--to", str(file)]) == 0
    (note,) = (line for line in capsys.readouterr().err.splitlines() if "not drawn" in line)
    assert note.startswith("note: 2 of 3 rows")
    assert note.removeprefix("note: ") in file.read_text(encoding="utf-8")


def test_the_measure_that_most_rows_have_is_drawn(tmp_path: Path) -> None:
    texts = evaluation({"boolq": {"dense": 8.0, "sparse": 30.0}})
    make_run(tmp_path / "another", 0.0, texts, model="another")
    for permutation in ("none", "heuristic", "lcp"):
        make_run(tmp_path / permutation, 20.0, permutation=permutation)
    table = table_below(tmp_path)
    assert table.usual[0] != PERPLEXITY  # rows of the other model come first
    assert drawn_metric(table, None) == PERPLEXITY


def test_each_model_has_the_line_of_its_dense_model(tmp_path: Path) -> None:
    def dense() -> dict[str, float | None]:
        table = table_below(tmp_path)
        assert DENSE_ROW not in table.means.index
        panels = points(table, PERPLEXITY).groupby("model")
        return {model: dense_value(table, PERPLEXITY, part) for model, part in panels}

    for model, value in (("a", 9.0), ("b", 12.0)):
        for name, sparse in (("none", 40.0), ("lcp", 20.0)):
            texts = {"wikitext2": {"dense": value, "sparse": sparse}}
            folder = tmp_path / model / name
            make_run(folder, 0.0, evaluation(texts), permutation=name, model=model)
    assert dense() == {"a": 9.0, "b": 12.0}
    other = {"wikitext2": {"dense": 13.0, "sparse": 20.0}}
    make_run(tmp_path / "b" / "rounded", 0.0, evaluation(other), permutation="heuristic", model="b")
    assert dense() == {"a": 9.0, "b": None}


def test_a_picture_has_a_panel_for_each_model_and_names_a_method_once(tmp_path: Path) -> None:
    for model in ("a", "b"):
        for name, value in (("none", 40.0), ("lcp", 20.0)):
            make_run(tmp_path / model / name, value, permutation=name, model=model)
    file = tmp_path / "both.svg"
    with rc_context({"svg.fonttype": "none"}):
        plot_cost(table_below(tmp_path), file, PERPLEXITY)
    words = re.findall(r"<text[^>]*>([^<]+)</text>", file.read_text())
    assert [words.count(word) for word in ("a", "b", "none", "lcp")] == [1, 1, 1, 1]


def test_pictures_have_the_format_of_a_suffix(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, png, svg = (str(tmp_path / name) for name in ("runs", "a.png", "a.svg"))
    make_run(tmp_path / "runs" / "a", 20.0)
    make_run(tmp_path / "runs" / "b", 30.0, permutation="none")
    assert call("report", [runs, "--to", png]) == 0
    assert Image.open(png).format == "PNG"
    assert call("report", [str(THREE_RUNS), "--to", svg, "--metric", "average acc"]) == 0
    assert "average acc" in Path(svg).read_text()
    for words in ("--to a.txt", "--to a.png --metric speed", "--to a.html --metric speed", ""):
        assert call("report", [runs, *words.split()]) == 1
        assert "error: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None or not find_spec("playwright"):
        leave = pytest.fail if os.environ.get("CI") else pytest.skip
        leave("playwright or a Chromium is not installed: pip install -e '.[browser]'")
    with import_module("playwright.sync_api").sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield started
        started.close()


@contextmanager
def opened(browser: Any, folder: Path) -> Iterator[Any]:
    """Give the page in the browser, which says nothing and asks for nothing."""
    file, said = folder.parent / "page.html", list[str]()
    assert call("report", [str(folder), "--to", str(file)]) == 0
    with browser.new_context(viewport={"width": 1280, "height": 844}) as context:
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: said.append(request.url))
        page.goto(file.as_uri())
        page.locator("#table_wrapper").wait_for()
        yield page
    assert [one for one in said if not one.startswith(("data:", "blob:"))] == [file.as_uri()]


def column(page: Any, name: str) -> list[str]:
    """Return the cells of a column of the table, top to bottom."""
    names = [" ".join(text.split()) for text in page.locator("#table thead th").all_inner_texts()]
    return page.locator(f"#table tbody tr > :nth-child({names.index(name) + 1})").all_inner_texts()


def test_the_table_sorts_by_number_and_filters(browser: Any, tmp_path: Path) -> None:
    values = (102.0, 42.0, 104.0, 48.0, float("inf"))
    for size, value in enumerate(values, 10):
        make_run(tmp_path / "runs" / str(size), value, block_size=size)
    with opened(browser, tmp_path / "runs") as page:
        header = page.locator("#table thead th").filter(has_text=PERPLEXITY).get_by_role("button")
        up = [f"{value:.2f}" for value in sorted((10.0, *values))]  # the dense model's 10.00
        for direction, expected in (("ascending", up), ("descending", up[::-1])):
            header.click()
            page.locator(f"th[aria-sort={direction}]").wait_for()
            assert column(page, PERPLEXITY) == expected
        page.get_by_label("Search").fill("13 48")
        assert column(page, PERPLEXITY) == ["48.00"]
        page.get_by_label("Search").fill("nothing like this")
        assert "No matching records" in page.locator("#table tbody").inner_text()


def test_a_measure_can_be_chosen(browser: Any, tmp_path: Path) -> None:
    for name, value in (("none", 40.0), ("lcp", 20.0)):
        make_run(tmp_path / "runs" / name, value, permutation=name)
    with opened(browser, tmp_path / "runs") as page:
        axis = page.locator("svg").get_by_text("gap closed", exact=True)
        assert not axis.is_visible()
        page.get_by_label("Metric").select_option("gap closed")
        assert axis.is_visible()
        assert page.locator("svg").get_by_text("dense: 100.00%").is_visible()


def test_a_run_named_like_a_script_is_harmless(browser: Any, tmp_path: Path) -> None:
    for number, loss in enumerate(("kl", EVIL)):
        as_folder(
            record(20.0 + number, loss=loss, **{EVIL: number}), tmp_path / "runs" / str(number)
        )
    with opened(browser, tmp_path / "runs") as page:
        assert " ".join(EVIL.split()) in [" ".join(text.split()) for text in column(page, "loss")]
        assert page.locator("img").count() == 0


def logged(line: dict[str, Any], name: str, **changed: Any) -> SimpleNamespace:
    """Return a run of `wandb.Api` as the logger leaves it."""
    flat = {"epoch/permutation/loss": 0.5, "_step": 3, "gap_closed": 0.5}
    flat |= flat_metrics(line["metrics"])
    flat = {key: "Infinity" if value == float("inf") else value for key, value in flat.items()}
    evaluated = {"perplexity": {"dataset": "wikitext2", "seqlen": 2048}}
    config = flatten(line["config"] | {"evaluation": evaluated})
    config |= {"record.config_hash": "0", "record.run_directory": name}
    facts = {"id": name, "name": name, "group": "table1-1"}
    facts |= {"config": config, "summary_metrics": flat}
    return SimpleNamespace(**facts | changed)


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Return the runs that W&B has."""
    runs: list[SimpleNamespace] = []
    monkeypatch.setattr(
        "wandb.Api", lambda: SimpleNamespace(default_entity="me", runs=lambda path, order: runs)
    )
    return runs


def test_a_table_of_wandb_is_that_of_the_runs(
    api: list[SimpleNamespace], capsys: pytest.CaptureFixture[str]
) -> None:
    ours: Any = {"model": "llama-2-7b"}
    lines = [
        record(12.0, **ours),
        record(30.0, **ours),
        record(float("inf"), permutation="none", **ours),
    ]
    api += [logged(line, f"run{number}") for number, line in enumerate(lines)]
    api.reverse()  # the newest first
    api.append(logged(record(seed=3), "crashed", summary_metrics={}))
    api.append(logged(record(seed=4), "elsewhere", group="other"))
    strange = logged(record(seed=5), "strange")
    strange.config = {"learning_rate": 0.1}
    api.append(strange)
    assert call("report", ["--wandb", "permllm", "--table", "table1", "--json"]) == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)["rows"]
    found = {row["settings"]["permutation"]: row["metrics"][PERPLEXITY]["mean"] for row in rows}
    assert "note: skipped crashed (crashed): not as a run leaves it" in printed.err
    assert "note: run0 has the same settings as run1: not counted again" in printed.err
    assert [found[name] for name in ("none", "lcp")] == [None, 30.0]
    assert "note: skipped strange" in printed.err
    assert call("report", ["--wandb", "permllm", "--table", "table2"]) == 1
    assert "table2 or table2-*: no finished run" in capsys.readouterr().err
