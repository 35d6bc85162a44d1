"""The page and the picture of `permllm report`: what they show, and what a browser makes of the page."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from permllm.cli import call
from permllm.config import NMPattern
from permllm.runs import cost
from permllm.runs.details import details
from permllm.runs.environment import environment
from permllm.runs.names import MASKS, PERMUTATIONS
from permllm.runs.page import page, sections
from permllm.runs.pictures import CROP, NOT_KEPT, POINTS, SIDE, pictures
from permllm.runs.plots import cost_data, plot_cost
from permllm.runs.published import Comparison, published
from permllm.runs.read import collect
from permllm.runs.render import cells, main_measure, take_baseline
from permllm.runs.table import Summary, row_labels, summarise
from permllm.runs.tensors import save_masks, save_tensors
from permllm.sparsity.nm import permuted_nm_mask
from tests.conftest import ROOT, run_module
from tests.kept import THREE_RUNS
from tests.runs.test_table import make_run

ABLATION = ROOT / "experiments" / "lcp_ablation"
PERPLEXITY = "wikitext2 perplexity (window 2048)"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# No window, no sandbox (containers have none), and none of the browser's own errands.
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
)


def write_page(file: Path, *folders: Path) -> Path:
    collection = collect(folders)
    file.write_text(page(collection, summarise(collection.runs)), encoding="utf-8")
    return file


def change(run: Path, **metrics: Any) -> None:
    """Other metrics in a record without a checksum."""
    file = run / "metrics.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | metrics))


def write_orders_and_masks(
    folder: Path, layers: int = 5, channels: int = 64, rows: int = 24
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Files of a run that was pruned to 2:4 in random orders; the orders and the masks, each by name."""
    generator = torch.Generator().manual_seed(0)
    orders, masks = {}, {}
    for layer in range(layers):
        for group, members in (("self_attn.qkv_proj", ("q_proj", "k_proj")), ("mlp.down_proj", ("down_proj",))):
            order = torch.randperm(channels, generator=generator)
            orders[f"model.layers.{layer}.{group}"] = order
            for member in members:
                path = f"model.layers.{layer}.{group.split('.')[0]}.{member}"
                saliency = torch.rand(rows, channels, generator=generator)
                masks[path] = permuted_nm_mask(saliency, order, NMPattern(2, 4))
    save_tensors(folder / PERMUTATIONS, orders)
    save_masks(folder / MASKS, masks)
    return orders, masks


class Parsed(HTMLParser):
    """What a page holds: attributes and text of each script, and of each cell of the table of rows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.lines: list[list[tuple[dict[str, str | None], str]]] = []
        self.tags: list[str] = []
        self._within: list[list[tuple[dict[str, str | None], str]]] = []
        self._table = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.tags.append(tag)
        if tag == "table":
            self._table = attributes.get("id") == "table"
        if tag == "script":
            self.scripts.append((attributes, ""))
            self._within.append(self.scripts)
        elif self._table and tag == "tr":
            self.lines.append([])
        elif self._table and tag in ("td", "th"):
            self.lines[-1].append((attributes, ""))
            self._within.append(self.lines[-1])

    def handle_endtag(self, tag: str) -> None:
        if self._within and tag in ("td", "th", "script"):
            self._within.pop()

    def handle_data(self, data: str) -> None:
        if self._within:
            attributes, text = self._within[-1][-1]
            self._within[-1][-1] = (attributes, text + data)


def figures_of(summary: Summary) -> dict[str, dict[str, Any]]:
    return sections(summary, [f"{number} {name}" for number, name in enumerate(row_labels(summary), 1)])


def summary_of(*folders: Path) -> Summary:
    return summarise(collect(folders).runs)


def bits_of(image: str) -> NDArray[Any]:
    """Which pixels of a picture are inked."""
    picture = Image.open(io.BytesIO(base64.b64decode(image.removeprefix("data:image/png;base64,"))))
    return np.asarray(picture.convert("RGBA"))[:, :, 3] > 0


def test_each_setting_of_a_run_is_there_once_as_it_is_typed(tmp_path: Path) -> None:
    for size in (32, 64):
        make_run(tmp_path / str(size), 20.0, block_size=size, calibration={"dataset": "c4", "seqlen": 16})
    runs = details(summary_of(tmp_path))
    assert [run["varying"] for run in runs] == [[("block_size", "32")], [("block_size", "64")]]
    settings = runs[0]["settings"].split(", ")
    assert {"permutation=lcp", "calibration.seqlen=16", "sparsity=2:4"} <= set(settings)
    assert not [one for one in settings if one.startswith(("block_size=", "name=", "seed="))]


def test_pictures_are_those_of_the_first_middle_and_last_layer(tmp_path: Path) -> None:
    true_orders, true_masks = write_orders_and_masks(tmp_path)
    found = pictures(tmp_path)
    orders, masks = found["permutations"], found["masks"]
    assert not isinstance(orders, str)
    assert not isinstance(masks, str)
    assert [entry["name"] for entry in orders] == [
        f"model.layers.{layer}.{group}" for layer in (0, 2, 4) for group in ("self_attn.qkv_proj", "mlp.down_proj")
    ]
    for entry in orders:
        order = true_orders[entry["name"]]
        moved = float((order != torch.arange(64)).double().mean())
        assert entry["what"] == f"64 channels, {moved:.1%} moved"
        # Position to the right, original position upwards.
        assert [(x, 63 - y) for y, x in zip(*np.nonzero(bits_of(entry["image"])), strict=True)] == sorted(
            enumerate(order.tolist()), key=lambda place: (-place[1], place[0])
        )
    assert [entry["name"].removeprefix("model.layers.") for entry in masks][:3] == [
        "0.self_attn.k_proj",
        "0.self_attn.q_proj",
        "0.mlp.down_proj",
    ]
    for entry in masks:
        assert (bits_of(entry["image"]) == true_masks[entry["name"]].numpy()).all()
        assert entry["what"] == "24 x 64 of 24 x 64"


def test_a_large_layer_is_sampled_and_cropped_and_a_run_stays_small(tmp_path: Path) -> None:
    orders, masks = {}, {}
    for layer in range(3):
        for group in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            orders[f"model.layers.{layer}.{group}"] = torch.arange(11008).flip(0)
        for linear in ("q", "k", "v", "o", "gate", "up", "down"):
            masks[f"model.layers.{layer}.{linear}_proj"] = torch.rand(100, 4096) < 0.5
    save_tensors(tmp_path / PERMUTATIONS, orders)
    save_masks(tmp_path / MASKS, masks)
    found = pictures(tmp_path)
    assert not isinstance(found["permutations"], str)
    entry, corner = found["permutations"][0], found["masks"][0]
    assert entry["what"] == f"11008 channels, {POINTS} of them drawn, 100.0% moved"
    drawn = bits_of(entry["image"])
    assert drawn.shape == (SIDE, SIDE)
    # The reversed order: the falling diagonal, within the rounding of a pixel.
    y, x = np.nonzero(drawn)
    assert abs(y.astype(int) - x).max() <= 1
    assert len(set(x)) == SIDE
    assert isinstance(corner, dict)
    assert corner["what"] == f"{CROP} x {CROP} of 100 x 4096"
    assert (bits_of(corner["image"]) == masks[corner["name"]][:CROP, :CROP].numpy()).all()
    assert len(json.dumps(found)) < 80_000


def test_files_that_are_not_there_or_broken_are_said_in_one_line(tmp_path: Path) -> None:
    assert pictures(tmp_path) == {"permutations": NOT_KEPT, "masks": NOT_KEPT}
    (tmp_path / PERMUTATIONS).write_bytes(b"no tensors")
    save_tensors(tmp_path / MASKS, {"model.layers.0.mlp.down_proj": torch.zeros(8, dtype=torch.uint8)})
    found = pictures(tmp_path)
    assert str(found["permutations"]).startswith(f"{PERMUTATIONS} has no readable safetensors header")
    assert str(found["masks"]).startswith(f"{MASKS}: the shapes of its masks: ")
    for order in (torch.zeros(2, 2, dtype=torch.int64), torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3]), torch.ones(1)):
        save_tensors(tmp_path / PERMUTATIONS, {"a.0.b": order})
        assert (
            pictures(tmp_path)["permutations"] == f"{PERMUTATIONS}: the permutation of a.0.b is no permutation of its channels"
        )
    write_orders_and_masks(tmp_path)
    content = bytearray((tmp_path / MASKS).read_bytes())
    content[-1] ^= 1
    (tmp_path / MASKS).write_bytes(content)
    assert re.fullmatch(rf"{MASKS} is corrupt: .* is not what was written", str(pictures(tmp_path)["masks"]))


def test_the_table_is_that_of_the_other_formats(tmp_path: Path) -> None:
    make_run(tmp_path / "none", 40.0, permutation="none", acc=0.4)
    for seed in range(2):
        make_run(tmp_path / f"lcp{seed}", 20.0 + seed, seed=seed, acc=0.5)
    collection = collect([tmp_path])
    summary = summarise(collection.runs)
    baseline = take_baseline(summary, "permutation=none")
    paper = Comparison(published("table1"), "smollm2-135m")
    text = page(collection, summary, baseline, paper)
    header, (dense, *body) = cells(summary, baseline, paper)
    found = [[" ".join(cell.split()) for _, cell in line] for line in Parsed(text).lines]
    assert found == [["#", *header], ["1 baseline", *body[0]], ["2", *body[1]], ["dense", "", *dense[1:]]]
    assert "rte acc (limited)" in header
    for note in (*collection.left_out(), paper.note):
        assert f"<li>{note}</li>" in html.unescape(text)
    keys = [[attributes["data-order"] for attributes, _ in line] for line in Parsed(text).lines[1:3]]
    place = 1 + header.index(PERPLEXITY)
    assert [line[place] for line in keys] == ["40.0", "20.5"]
    place = 1 + header.index("against the baseline")
    assert [line[place] for line in keys] == ["", "-48.8"]


def test_rows_are_named_by_what_is_unusual_in_them() -> None:
    labels = row_labels(summary_of(ABLATION))
    for expected in ("wanda, lcp", "wanda, none", "wanda, lcp, constraint=foldable, block_size=192"):
        assert expected in labels
    assert row_labels(summary_of(THREE_RUNS)) == ["none", "heuristic", "lcp"]


@pytest.mark.parametrize("lower", [True, False])
def test_nothing_beats_the_points_of_the_front(lower: bool) -> None:
    generator = np.random.default_rng(0)
    values = np.round(generator.uniform(1, 5, size=(60, 2)), 1)  # with ties
    found = [cost.Point(n, "", x, y, 0.0, 1) for n, (x, y) in enumerate(values.tolist())]

    def beats(one: cost.Point, other: cost.Point) -> bool:
        first, second = ((p.minutes, p.value if lower else -p.value) for p in (one, other))
        return first != second and first[0] <= second[0] and first[1] <= second[1]

    expected = {(p.minutes, p.value) for p in found if not any(beats(other, p) for other in found)}
    front = [(p.minutes, p.value) for p in cost.front(found, lower)]
    assert front == sorted(expected)


def test_quality_over_minutes_has_a_point_a_row_and_leaves_out_what_was_learned_elsewhere(tmp_path: Path) -> None:
    seconds = {"load": 7.0, "permute": 600.0, "prune": 30.0, "calibrate": 90.0, "evaluate sparse": 999.0}
    for seed in range(2):
        run = make_run(tmp_path / f"lcp{seed}", 20.0 + 2 * seed, seed=seed, acc=0.5)
        change(run, seconds=seconds | {"permute": 600.0 + 120 * seed}, peak_memory_bytes=4_000_000_000 * (seed + 1))
    change(make_run(tmp_path / "none", 40.0, permutation="none", acc=0.4), peak_memory_bytes=2_000_000_000)
    make_run(tmp_path / "from_file", 20.0, permutation="from_file", acc=0.5)
    summary = summary_of(tmp_path)
    figures = figures_of(summary)["Quality over minutes"]
    assert list(figures) == ["gap closed", PERPLEXITY, "rte acc"]
    assert figures["gap closed"]["layout"]["yaxis"]["tickformat"] == ".0%"
    rows = {row.labels["permutation"]: number for number, row in enumerate(summary.rows)}
    data = figures[PERPLEXITY]["data"]
    points = {trace["meta"]["row"]: trace for trace in data if "row" in trace["meta"]}
    assert set(points) == {rows["lcp"], rows["none"]}
    lcp, none = points[rows["lcp"]], points[rows["none"]]
    assert (lcp["x"], lcp["y"]) == ([12.0], [21.0])  # of the fastest of two
    assert lcp["error_y"]["array"] == [pytest.approx(2**0.5)]
    assert (none["x"], none["y"]) == ([5 / 60], [40.0])
    areas = [(point["marker"]["size"] - 8) ** 2 for point in (lcp, none)]
    assert areas[0] / areas[1] == pytest.approx(4)
    assert lcp["text"] == [f"{rows['lcp'] + 1} lcp<br>21.00 ± 1.41<br>12.0 min<br>8.00 GB at the peak"]
    assert [trace["meta"] for trace in data if "join" in trace["meta"]] == [{"join": "lower"}]
    assert [trace["meta"] for trace in figures["rte acc"]["data"] if "join" in trace["meta"]] == [{"join": "higher"}]
    assert figures[PERPLEXITY]["layout"]["xaxis"]["title"]["text"].startswith("minutes: calibrate + permute + mask + prune")
    (dense,) = figures[PERPLEXITY]["layout"]["shapes"]
    assert (dense["y0"], dense["y1"]) == (10.0, 10.0)


def test_accuracies_have_their_errors_and_all_figures_are_plotlys(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 20.0, acc=0.5)
    make_run(tmp_path / "b", 30.0, permutation="none", acc=0.4)
    figures = figures_of(summary_of(tmp_path))
    assert set(figures) == {"Quality over minutes", "Measures", "Accuracy", "While learning"}
    bars = figures["Accuracy"]["rte acc"]["data"]
    assert [(bar["x"], bar["error_x"]["array"]) for bar in bars] == [([0.4], [0.05]), ([0.5], [0.05])]
    for chosen in figures.values():
        for figure in chosen.values():
            go.Figure(figure)  # raises where a property is none of Plotly's


def test_curves_have_gaps_where_an_epoch_has_no_number(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", 20.0)
    lines = ({"pass": 1, "loss": 1.5, "measured_loss": None, "flips": None}, {"pass": 2, "loss": 1.25, "measured_loss": 1.0})
    (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = figures_of(summary_of(tmp_path))["While learning"]
    assert [(figure["data"][0]["x"], figure["data"][0]["y"]) for figure in figures.values()] == [
        ([1, 2], [1.5, 1.25]),
        ([1, 2], [None, 1.0]),
    ]


def test_notes_warnings_and_numbers_that_are_not_finite_reach_the_page(tmp_path: Path) -> None:
    limited = {"perplexity": {"limit": 32}, "zero_shot": {"limit": 8}}
    change(make_run(tmp_path / "a", 20.0, acc=0.5), evaluation=limited)
    other = make_run(tmp_path / "b", float("inf"), block_size=128)
    computed = environment(0, torch.device("cpu")) | {"git": {"commit": "c0ffee", "dirty": True}}
    (other / "environment.json").write_text(json.dumps(computed))
    shutil.copytree(other, tmp_path / "copy")
    collection = collect([tmp_path])
    summary = summarise(collection.runs)
    text = page(collection, summary)
    assert f"<li>{tmp_path / 'copy'} has the same identity as {other} and is not counted again</li>" in text
    first, second = details(summary)
    assert first["warnings"] == [
        "limited: perplexity on the first 32 windows only",
        "limited: accuracy on the first 8 items of each task only",
        "no environment.json: what it was computed with is not known",
    ]
    assert second["warnings"] == ["computed in a checkout with changes that its commit does not have"]
    assert second["environment"][:2] == [("commit", "c0ffee"), ("dirty", "true")]
    assert ("cores", str(computed["hardware"]["cores"])) in second["environment"]
    assert second["seconds"] == [("permute", "5.0"), ("evaluate sparse", "100.0"), ("all", "105.0")]
    assert "inf" in [cell for _, cell in Parsed(text).lines[2]]
    bars = figures_of(summary)["Measures"][PERPLEXITY]["data"]
    assert [bar["y"] for bar in bars if "row" in bar["meta"]] == [[20.0], [None]]


EVIL = "</script><script>alert(1)</script><!-- {{script}} {%x%} &amp;<img src=x onerror=alert(2)>"


def test_text_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 20.0, name=EVIL, loss=EVIL)
    make_run(tmp_path / "b", 30.0)
    make_run(tmp_path / "c", 40.0, loss="kl")
    text = write_page(tmp_path / "page.html", tmp_path).read_text(encoding="utf-8")
    parsed = Parsed(text)
    assert EVIL in [cell for _, cell in parsed.lines[2]]
    assert "img" not in parsed.tags
    (kind, embedded), *libraries, (attributes, script) = parsed.scripts
    assert kind == {"type": "application/json", "id": "figures"}
    assert [library["class"] for library, _ in libraries] == ["library", "library"]
    assert attributes == {}
    # Plotly knows some markup: what it shows is the text, without.
    names = [trace["name"] for trace in json.loads(embedded)[1][PERPLEXITY]["data"]]
    assert any("alert" in name for name in names)
    assert not re.search(r"<(?!br>)", " ".join(names))
    assert "alert" not in script
    # No other script can run.
    unpacked = [gzip.decompress(base64.b64decode(packed)) for _, packed in libraries]
    digests = [base64.b64encode(hashlib.sha256(one).digest()).decode() for one in (script.encode(), *unpacked)]
    (policy,) = re.findall(r"script-src ([^\"]*)\"", text)
    assert policy.split() == [f"'sha256-{digest}'" for digest in digests]


def test_the_page_refers_to_nothing_outside_and_is_small(tmp_path: Path) -> None:
    file = write_page(tmp_path / "page.html", ABLATION)
    assert file.stat().st_size < 3_000_000  # 6 MB with all pictures that it may have
    text = file.read_text(encoding="utf-8")
    assert re.findall(r"\bsrc=(?!\"data:)|@import|\bfetch\(|XMLHttpRequest", text) == []
    assert [url for url in re.findall(r"url\((.{5})", text) if url != "data:"] == []
    assert {url for url in re.findall(r'href="([^"]*)"', text) if not url.startswith("#row-")} == {"data:,"}
    assert "default-src 'none'" in text


def test_the_command_line_writes_the_page_or_says_in_one_line_why_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "new" / "report.html"
    arguments = [str(THREE_RUNS), "--paper", "table1", "--baseline", "permutation=none"]
    result = run_module("permllm", "report", *arguments, "--to", str(file))
    assert result.returncode == 0, result.stderr
    text = file.read_text(encoding="utf-8")
    assert "compare the order of the rows" in text
    assert "against the baseline" in text
    (tmp_path / "file").touch()
    assert call("report", [*arguments, "--to", str(tmp_path / "file" / "report.html")]) == 1
    assert "error: --to: cannot write " in capsys.readouterr().err
    drawn = [str(THREE_RUNS), "--to", str(tmp_path / "a.png"), "--json", "--measure"]
    assert call("report", [*drawn, "accuracy"]) == 1
    assert "error: --measure accuracy: valid are " in capsys.readouterr().err
    assert call("report", [*drawn, "average acc"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3


@pytest.mark.parametrize(
    ("option", "value", "written"),
    [
        ("--measure", "average acc", ("--to", "a.html")),
        ("--paper", "table1", ("--to", "a.png")),
        ("--baseline", "permutation=none", ("--masks", "a.png")),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    option: str, value: str, written: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("report", [str(THREE_RUNS), written[0], str(tmp_path / written[1]), option, value]) == 1
    assert capsys.readouterr().err.startswith(f"error: {option} {value}: ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--curves", "--masks"])
def test_curves_and_masks_are_written_by_the_command(option: str, tmp_path: Path) -> None:
    write_orders_and_masks(make_run(tmp_path / "run", 20.0))
    assert call("report", [str(tmp_path), option, str(tmp_path / "a.png")]) == 0
    assert Image.open(tmp_path / "a.png").format == "PNG"


def test_a_picture_holds_what_it_draws(tmp_path: Path) -> None:
    summary = summary_of(THREE_RUNS)
    plot_cost(summary, tmp_path / "a.png")
    held = json.loads(Image.open(tmp_path / "a.png").text["data"])
    assert held["measure"].startswith("boolq-passages perplexity")
    for point in held["points"]:
        (run,) = summary.rows[point["row"]].runs
        seconds = run.metrics["seconds"]
        assert point["minutes"] == pytest.approx(sum(seconds[s] for s in ("calibrate", "permute", "prune")) / 60, rel=1e-5)
        assert point["value"] == pytest.approx(run.metrics["perplexity"]["sparse"]["boolq-passages"]["value"], rel=1e-5)
        assert point["memory"] == run.metrics["peak_memory_bytes"]
    assert len(held["points"]) == 3
    plot_cost(summary, tmp_path / "a.svg", "average acc")
    assert "average acc" in (tmp_path / "a.svg").read_text()


def test_the_picture_of_the_readme_is_drawn_from_the_records() -> None:
    records = ("experiments/table1/records.jsonl", "experiments/table1/recipe.jsonl")
    summary = summary_of(*(ROOT / file for file in records))
    measure = main_measure(summary)
    assert measure is not None
    file = ROOT / "docs" / "result.png"
    drawn = json.loads(Image.open(file).text["data"])
    assert drawn == cost_data(summary, measure), f"stale: permllm report {' '.join(records)} --to docs/result.png"
    assert {point["label"] for point in drawn["points"]} >= {
        "wanda, none",
        "wanda, heuristic",
        "wanda, lcp",
        "sparsegpt, none",
    }
    assert file.stat().st_size < 60_000


# What a browser makes of it.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    def missing(what: str) -> None:
        if os.environ.get("CI"):
            pytest.fail(what)
        pytest.skip(what)

    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed: pip install -e '.[browser]'")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        missing(f"no browser among {', '.join(BROWSERS)}")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=list(ARGUMENTS))
        yield started
        started.close()


class Opened:
    """A page in the browser, and all that it said and asked for."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.complaints.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.file = file
        self.page.goto(file.as_uri())
        self.page.locator("html[data-ready]").wait_for(state="attached")

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, failed: Any, *_: object) -> None:
        self.context.close()
        if failed is None:
            assert self.complaints == []
            assert [url for url in self.requests if not url.startswith("data:")] == [self.file.as_uri()]


def column(page: Any, name: str) -> list[str]:
    """Cells of a column of the table, top to bottom, without the dense model's."""
    names = [" ".join(text.split()) for text in page.locator("#table thead th").all_inner_texts()]
    return page.locator(f"#table tbody tr > :nth-child({names.index(name) + 1})").all_inner_texts()


def header_of(page: Any, name: str) -> Any:
    return page.locator("#table thead th").filter(has_text=re.compile(rf"^\s*{re.escape(name)}\s*$"))


def figure(page: Any, section: str) -> Any:
    return page.locator(".plots").filter(has=page.get_by_role("heading", name=section, exact=True))


def ablation_like(folder: Path) -> Path:
    """Nine rows: three block sizes of three methods."""
    for number, permutation in enumerate(("none", "heuristic", "lcp")):
        for size in (32, 64, 128):
            value = 100.0 - 30 * number + size / 16
            acc = round(0.3 + 0.1 * number, 1)
            run = make_run(folder / f"{permutation}{size}", value, permutation=permutation, block_size=size, acc=acc)
            change(run, seconds={"permute": 60.0 * (number + 1), "evaluate sparse": 5.0})
    return folder


def test_a_header_sorts_up_and_down_with_mouse_and_keyboard(browser: Any, tmp_path: Path) -> None:
    runs = ablation_like(tmp_path / "runs")
    make_run(runs / "inf", float("inf"), permutation="lcp", block_size=512, acc=0.5)
    with Opened(browser, write_page(tmp_path / "page.html", runs)) as page:
        header = header_of(page, PERPLEXITY)
        assert header.get_attribute("aria-sort") is None
        header.click()
        page.locator("th[aria-sort=ascending]").wait_for()
        up = column(page, PERPLEXITY)
        # As numbers: 108.00 is the largest, though not as text; what is no number comes last.
        assert up == ["42.00", "44.00", "48.00", "72.00", "74.00", "78.00", "102.00", "104.00", "108.00", "inf"]
        header.get_by_role("button").focus()
        page.keyboard.press("Enter")
        page.locator("th[aria-sort=descending]").wait_for()
        assert column(page, PERPLEXITY) == [*reversed(up[:-1]), "inf"]
        # Bars stand in the order of the table.
        ticks = figure(page, "Measures").locator(".ytick text").all()
        labels = [text for _, text in sorted((tick.bounding_box()["y"], tick.text_content()) for tick in ticks)]
        assert labels[:2] == ["3 none, block_size=128", "2 none, block_size=64"]
        assert labels[-2:] == ["7 lcp, block_size=32", "10 lcp, block_size=512"]
        header_of(page, "permutation").click()
        page.locator("th[aria-sort=ascending]").wait_for()
        assert header.get_attribute("aria-sort") is None
        assert column(page, "permutation") == ["heuristic"] * 3 + ["lcp"] * 4 + ["none"] * 3
        header_of(page, "block_size").click()
        page.locator("th[aria-sort=ascending]").filter(has_text="block_size").wait_for()
        assert column(page, "block_size") == ["32"] * 3 + ["64"] * 3 + ["128"] * 3 + ["512"]
        # The dense model stays where it is, whatever is sorted.
        assert page.locator("#table tfoot tr").inner_text().startswith("dense")


def test_the_filter_wants_all_words_and_plots_and_runs_follow(browser: Any, tmp_path: Path) -> None:
    with Opened(browser, write_page(tmp_path / "page.html", ablation_like(tmp_path / "runs"))) as page:
        count, words = page.locator(".dt-info"), page.get_by_label("Filter rows")
        figure(page, "Quality over minutes").get_by_label("Measure").select_option(PERPLEXITY)
        front = figure(page, "Quality over minutes").locator(".scatterlayer .js-line")
        assert count.inner_text() == "9 of 9 rows"
        assert figure(page, "Measures").locator(".bars .point").count() == 9
        assert figure(page, "Quality over minutes").locator(".scatterlayer .point").count() == 9
        path = front.get_attribute("d")
        words.fill("LCP  block_size=128")
        assert count.inner_text() == "1 of 9 rows"
        assert column(page, PERPLEXITY) == ["48.00"]
        assert figure(page, "Measures").locator(".bars .point").count() == 1
        assert page.locator("#runs details:visible").count() == 1
        assert figure(page, "While learning").locator(".scatterlayer .trace").count() == 1
        # The front is that of the rows that are shown.
        words.fill("block_size=128")
        assert figure(page, "Quality over minutes").locator(".scatterlayer .point").count() == 3
        assert front.get_attribute("d") != path
        assert plotted(page, "Quality over minutes")[-1]["y"] == [108.0, 78.0, 48.0]
        words.fill("block_size=12")  # is the value of no row
        assert count.inner_text() == "0 of 9 rows"
        words.fill("nothing like this")
        assert count.inner_text() == "0 of 9 rows"
        assert "No row that is shown has this measure." in figure(page, "Measures").inner_text()
        words.fill("")
        assert count.inner_text() == "9 of 9 rows"


def plotted(page: Any, section: str) -> list[dict[str, Any]]:
    """The traces that Plotly has."""
    return figure(page, section).locator(".plot").evaluate("(one) => one.data.map(({ x, y, name }) => ({ x, y, name }))")


def test_another_measure_can_be_chosen_and_a_point_says_what_it_is(browser: Any, tmp_path: Path) -> None:
    with Opened(browser, write_page(tmp_path / "page.html", ablation_like(tmp_path / "runs"))) as page:
        section = figure(page, "Quality over minutes")
        assert plotted(page, "Quality over minutes")[0]["x"] == [1.0]
        section.get_by_label("Measure").select_option("rte acc")
        front = plotted(page, "Quality over minutes")[-1]
        assert (front["name"], front["x"], front["y"]) == ("Pareto front", [1.0, 2.0, 3.0], [0.3, 0.4, 0.5])
        section.get_by_label("Measure").select_option(PERPLEXITY)
        page.get_by_label("Filter rows").fill("block_size=32")
        number = [trace["y"] for trace in plotted(page, "Quality over minutes")].index([102.0])
        section.locator(".scatterlayer .trace").nth(number).locator(".point").hover(force=True)
        hover = section.locator(".hoverlayer")
        hover.locator("text").first.wait_for()
        for words in ("none, block_size=32", "102.00", "1.0 min", "0.00 GB at the peak"):
            assert words in " ".join(hover.locator("text").all_text_contents())


def test_one_numeric_setting_is_drawn_as_a_line(browser: Any, tmp_path: Path) -> None:
    for size, value in ((32, 20.0), (64, 18.0), (128, 30.0)):
        for seed in range(2):
            make_run(tmp_path / "runs" / f"{size}-{seed}", value + seed, block_size=size, seed=seed)
    with Opened(browser, write_page(tmp_path / "page.html", tmp_path / "runs")) as page:
        section = figure(page, "Measures")
        assert section.locator(".bars").count() == 0
        assert section.locator(".scatterlayer .point").count() == 3
        assert section.locator(".errorbar path.yerror").count() == 3
        assert plotted(page, "Measures")[-1]["x"] == [32, 64, 128]
        assert plotted(page, "Measures")[-1]["y"] == [20.5, 18.5, 30.5]
        text = section.inner_text()
        assert "block_size" in text
        assert "dense 10.00" in text
        # Curves of all seeds.
        assert figure(page, "While learning").locator(".scatterlayer .trace").count() == 6


def test_a_run_opens_with_its_settings_pictures_and_environment(browser: Any, tmp_path: Path) -> None:
    for size in (32, 64, 128):
        make_run(tmp_path / "runs" / str(size), 20.0, block_size=size)
    write_orders_and_masks(tmp_path / "runs" / "64")
    with Opened(browser, write_page(tmp_path / "page.html", tmp_path / "runs")) as page:
        details = page.locator("#runs details")
        details.nth(1).locator("summary").click()
        text = details.nth(1).inner_text()
        for expected in ("block_size", PERPLEXITY, "evaluate sparse", str(tmp_path / "runs" / "64"), "no environment.json"):
            assert expected in text
        images = details.nth(1).locator("img")
        assert images.count() == 6 + 9
        images.last.scroll_into_view_if_needed()
        assert images.last.evaluate("(one) => one.decode().then(() => one.naturalWidth)") == 64
        page.locator("#table tbody a").nth(0).click()
        assert details.nth(0).get_attribute("open") is not None
        assert details.nth(0).inner_text().count(NOT_KEPT) == 2


def test_a_run_named_like_a_script_is_harmless(browser: Any, tmp_path: Path) -> None:
    for number, loss in enumerate(("kl", EVIL)):
        make_run(tmp_path / "runs" / f"{number}", 20.0 + number, name=EVIL, loss=loss, **{EVIL: number})
    with Opened(browser, write_page(tmp_path / "page.html", tmp_path / "runs")) as page:
        for summary in page.locator("#runs details summary").all():
            summary.click()
        assert EVIL in column(page, "loss")
        assert page.locator("img").count() == 0
        page.get_by_role("button", name="Columns").click()
        assert " ".join(EVIL.split()) in [
            " ".join(text.split()) for text in page.locator(".dt-button-collection button").all_text_contents()
        ]
        assert page.locator("img").count() == 0
        # Plotly shows the text itself.
        assert EVIL[:20] in " ".join(figure(page, "Measures").locator(".ytick text").all_text_contents())


def test_the_records_of_the_repository_fit_a_phone(browser: Any, tmp_path: Path) -> None:
    folders = (ABLATION, ROOT / "experiments" / "table1")
    shutil.copytree(folders[-1], tmp_path / ("long" * 30))  # a note with a long word: what is there twice
    with Opened(browser, write_page(tmp_path / "page.html", *folders, tmp_path / ("long" * 30)), width=390) as page:
        for summary in page.locator("#runs details summary").all()[:3]:
            summary.click()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        # Nothing sticks out of the page unseen either, but the table, which scrolls in its own box.
        outside = page.evaluate(
            """() => [...document.querySelectorAll("body *")]
                .filter((one) => !one.closest("#table, svg") && one.getBoundingClientRect().right > innerWidth + 1)
                .map((one) => one.outerHTML.slice(0, 80))"""
        )
        assert outside == []
        assert page.evaluate(
            "(() => { const box = document.querySelector('.dt-layout-full'); return box.scrollWidth > box.clientWidth; })()"
        )


def test_colours_follow_the_scheme(browser: Any, tmp_path: Path) -> None:
    def brightness(page: Any, what: str, of: str) -> float:
        colour = page.evaluate(f"getComputedStyle(document.querySelector('{of}')).{what}")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    file = write_page(tmp_path / "page.html", THREE_RUNS)
    with Opened(browser, file, scheme="dark") as page:
        for now in ("dark", "light"):  # it follows at once, without loading again
            page.emulate_media(color_scheme=now)
            page.locator("html.dark" if now == "dark" else "html:not(.dark)").wait_for(state="attached")
            dark = now == "dark"
            assert (brightness(page, "backgroundColor", "html") < 60) == dark
            assert (brightness(page, "color", "#table td") > 200) == dark
            assert (brightness(page, "fill", ".plot .xtick text") > 200) == dark
