"""The HTML page of `python -m permllm.results --html`: its data, and what a browser makes of it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from permllm.record.environment import environment
from permllm.record.names import MASKS, PERMUTATIONS
from permllm.record.run_tensors import write_masks
from permllm.record.tensors import write_tensors
from permllm.results.collect import collect
from permllm.results.page import curves, differences, page, page_data, row_labels, sort_keys
from permllm.results.pictures import CROP, NOT_KEPT, POINTS, pictures
from permllm.results.published import Comparison, published
from permllm.results.render import cells, find_baseline
from permllm.results.summary import summarise
from permllm.sparsity import NMPattern, permuted_nm_mask
from tests.conftest import ROOT, run_module
from tests.results.test_results import make_run

ABLATION = ROOT / "experiments" / "lcp_ablation"
QUICKSTART = ROOT / "experiments" / "quickstart"
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


def data_of(*folders: Path) -> dict[str, Any]:
    collection = collect(folders)
    return page_data(collection, summarise(collection.runs))


def write_page(file: Path, *folders: Path) -> Path:
    collection = collect(folders)
    file.write_text(page(collection, summarise(collection.runs)), encoding="utf-8")
    return file


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
    write_tensors(folder / PERMUTATIONS, orders)
    write_masks(folder / MASKS, masks)
    return orders, masks


class Scripts(HTMLParser):
    """Attributes and text of each script element of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[dict[str, str | None], str]] = []
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._inside = tag == "script"
        if self._inside:
            self.found.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            attributes, text = self.found[-1]
            self.found[-1] = (attributes, text + data)


def test_the_difference_of_a_config_is_against_the_usual_value() -> None:
    lcp = {
        "name": "a",
        "seed": 0,
        "logger": {"name": "wandb"},
        "permutation": {
            "name": "lcp",
            "_target_": "x",
            "block_size": 64,
            "margin": 0.05,
            "loss": None,
            "temperature": {"end": 0.1},
        },
        "temperature": {"end": 0.1},
        "block_size": 64,
    }
    none = {**lcp, "name": "b", "permutation": {"name": "none", "_target_": "y"}}
    large = {**lcp, "name": "c", "block_size": 128, "seed": 1, "logger": {"name": "none"}}
    cold = {
        **lcp,
        "name": "d",
        "temperature": {"end": 0.03},
    }
    first, second, third, fourth = differences([lcp, none, large, cold])
    assert first == []
    # What only LCP has is not listed: the name of the permutation says it.
    assert second == [("permutation.name", "none", "lcp")]
    assert third == [("seed", "1", "0"), ("block_size", "128", "64")]
    assert fourth == [("temperature.end", "0.03", "0.1")]


def test_without_a_usual_value_the_first_run_is_the_measure() -> None:
    configs = [
        {"seed": 32, "reconstruction": {"name": "none"}},
        {"seed": 64},
        {"seed": 128, "compile": True},
    ]
    assert differences(configs) == [
        [("reconstruction.name", "none", "not set")],
        [("seed", "64", "32")],
        [("seed", "128", "32"), ("compile", "true", "not set")],
    ]


def test_pictures_are_those_of_the_first_middle_and_last_layer(tmp_path: Path) -> None:
    true_orders, true_masks = write_orders_and_masks(tmp_path)
    found = pictures(tmp_path)
    orders, masks = found["permutations"], found["masks"]
    assert [entry["name"] for entry in orders] == [
        f"model.layers.{layer}.{group}" for layer in (0, 2, 4) for group in ("self_attn.qkv_proj", "mlp.down_proj")
    ]
    for entry in orders:
        order = true_orders[entry["name"]]
        assert entry["points"] == order.tolist()
        assert entry["channels"] == 64
        assert entry["moved"] == pytest.approx(float((order != torch.arange(64)).float().mean()))
    assert [entry["name"].removeprefix("model.layers.") for entry in masks][:3] == [
        "0.self_attn.k_proj",
        "0.self_attn.q_proj",
        "0.mlp.down_proj",
    ]
    for entry in masks:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(entry["bits"]), np.uint8), count=entry["rows"] * entry["columns"])
        assert (bits.reshape(entry["rows"], entry["columns"]) == true_masks[entry["name"]].numpy()).all()
        assert entry["shape"] == [24, 64]


def test_a_large_layer_is_sampled_and_cropped_and_a_run_stays_small(tmp_path: Path) -> None:
    orders, masks = {}, {}
    for layer in range(3):
        for group in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
            orders[f"model.layers.{layer}.{group}"] = torch.arange(11008).flip(0)
        for linear in ("q", "k", "v", "o", "gate", "up", "down"):
            masks[f"model.layers.{layer}.{linear}_proj"] = torch.rand(100, 4096) < 0.5
    write_tensors(tmp_path / PERMUTATIONS, orders)
    write_masks(tmp_path / MASKS, masks)
    found = pictures(tmp_path)
    entry = found["permutations"][0]
    assert len(entry["points"]) == POINTS
    assert [entry["points"][0], entry["points"][500]] == [11007, 11007 - 500 * 11008 // POINTS]
    corner = found["masks"][0]
    assert (corner["rows"], corner["columns"], corner["shape"]) == (CROP, CROP, [100, 4096])
    bits = np.unpackbits(np.frombuffer(base64.b64decode(corner["bits"]), np.uint8)).reshape(CROP, CROP)
    assert (bits == masks[corner["name"]][:CROP, :CROP].numpy()).all()
    assert len(json.dumps(found)) < 130_000


def test_files_that_are_not_there_or_broken_are_said_in_one_line(tmp_path: Path) -> None:
    assert pictures(tmp_path) == {"permutations": NOT_KEPT, "masks": NOT_KEPT}
    (tmp_path / PERMUTATIONS).write_bytes(b"no tensors")
    write_tensors(tmp_path / MASKS, {"model.layers.0.mlp.down_proj": torch.zeros(8, dtype=torch.uint8)})
    found = pictures(tmp_path)
    assert found["permutations"].startswith(f"{PERMUTATIONS} has no readable safetensors header")
    assert found["masks"].startswith(f"{MASKS}: the shapes of its masks: ")
    for order in (torch.zeros(2, 2, dtype=torch.int64), torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3]), torch.ones(1)):
        write_tensors(tmp_path / PERMUTATIONS, {"a.0.b": order})
        assert pictures(tmp_path)["permutations"] == f"{PERMUTATIONS}: the order of a.0.b is no permutation of its channels"
    write_orders_and_masks(tmp_path)
    content = bytearray((tmp_path / MASKS).read_bytes())
    content[-1] ^= 1
    (tmp_path / MASKS).write_bytes(content)
    assert re.fullmatch(rf"{MASKS} is corrupt: .* is not what was written", pictures(tmp_path)["masks"])


def test_the_table_is_that_of_the_other_formats(tmp_path: Path) -> None:
    make_run(tmp_path / "none", 40.0, permutation="none", acc=0.4)
    for seed in range(2):
        make_run(tmp_path / f"lcp{seed}", 20.0 + seed, seed=seed, acc=0.5)
    collection = collect([tmp_path])
    summary = summarise(collection.runs)
    baseline = find_baseline(summary, "permutation=none")
    paper = Comparison(published("table1"), "smollm2-135m")
    data = page_data(collection, summary, baseline, paper)
    header, (dense, *body) = cells(summary, baseline, paper)
    assert [column["name"] for column in data["columns"]] == header
    assert "rte acc (limited)" in header
    assert data["dense"] == dense
    assert [row["cells"] for row in data["rows"]] == body
    assert [row["baseline"] for row in data["rows"]] == [False, True]
    assert data["notes"] == [*collection.notes(), paper.note]
    assert [run["row"] for run in data["runs"]] == [0, 0, 1]
    assert data["rows"][0]["measures"][PERPLEXITY] == pytest.approx({"mean": 20.5, "error": 0.5**0.5, "text": "20.50 ± 0.71"})
    assert data["rows"][0]["keys"][header.index(PERPLEXITY)] == 20.5
    assert data["rows"][0]["keys"][header.index("against the baseline")] == -48.8
    assert data["rows"][1]["keys"][header.index("against the baseline")] is None


def test_settings_sort_as_numbers_where_they_are_numbers(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 20.0, block_size=128, loss="kl")
    make_run(tmp_path / "b", 30.0, block_size=64, loss="1e999")
    summary = summarise(collect([tmp_path]).runs)
    header, (_, *body) = cells(summary)
    keys = [sort_keys(summary, row, header, line) for row, line in zip(summary.rows, body, strict=True)]
    assert [line[: len(summary.settings)] for line in keys] == [[64.0, "1e999"], [128.0, "kl"]]


def test_rows_are_named_by_what_is_unusual_in_them() -> None:
    summary = summarise(collect([ABLATION]).runs)
    labels = row_labels(summary)
    for expected in ("wanda, lcp", "wanda, none", "wanda, lcp, gumbel=0.3", "wanda, lcp, constraint=foldable, block_size=192"):
        assert expected in labels
    assert row_labels(summarise(collect([QUICKSTART]).runs)) == ["heuristic", "lcp", "none"]


def test_curves_have_gaps_where_a_pass_has_no_number() -> None:
    history: list[Any] = [{"loss": 1.5, "measured_loss": None, "flips": None}, {"loss": float("nan"), "measured_loss": 1.0}]
    found = curves(history)
    assert set(found) == {"loss", "measured_loss"}
    assert found["measured_loss"] == [None, 1.0]


def test_notes_warnings_and_numbers_that_are_not_finite_reach_the_page(tmp_path: Path) -> None:
    make_run(tmp_path / "a", 20.0, evaluation={"perplexity": {"limit": 32}, "zero_shot": {"limit": 8}}, acc=0.5)
    other = make_run(tmp_path / "b", float("inf"), block_size=128)
    computed = environment(0, torch.device("cpu")) | {"git": {"commit": "c0ffee", "dirty": True}}
    (other / "environment.json").write_text(json.dumps(computed))
    shutil.copytree(other, tmp_path / "copy")
    data = data_of(tmp_path)
    json.dumps(data, allow_nan=False)
    assert data["notes"] == [
        f"{tmp_path / 'copy'} has the same identity as {other} and is not counted again",
        "2 records are older than checksums: checked by their form alone",
    ]
    assert data["runs"][0]["warnings"] == [
        "limited: perplexity on the first 32 windows only",
        "limited: accuracy on the first 8 items of each task only",
        "no environment.json: what it was computed with is not known",
    ]
    assert data["runs"][1]["warnings"] == ["computed in a checkout with changes that its commit does not have"]
    assert data["runs"][1]["environment"][:2] == [["commit", "c0ffee"], ["dirty", "true"]]
    assert ["cores", str(computed["hardware"]["cores"])] in data["runs"][1]["environment"]
    assert "inf" in data["rows"][1]["cells"]
    assert data["rows"][1]["measures"][PERPLEXITY]["mean"] is None


def test_text_of_a_run_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><!-- {{script}} &amp;"
    make_run(tmp_path / "a", 20.0, name=evil, loss=evil)
    make_run(tmp_path / "b", 30.0)
    make_run(tmp_path / "c", 40.0, loss="kl")
    text = write_page(tmp_path / "page.html", tmp_path).read_text(encoding="utf-8")
    assert "alert(1)" in text
    (kind, embedded), (attributes, script) = Scripts(text).found
    assert kind == {"type": "application/json", "id": "data"}
    assert attributes == {}
    assert evil in json.loads(embedded)["rows"][1]["cells"]
    assert "alert" not in script
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text


def test_the_page_refers_to_nothing_outside(tmp_path: Path) -> None:
    text = write_page(tmp_path / "page.html", QUICKSTART).read_text(encoding="utf-8")
    assert re.findall(r"\bsrc=|@import|url\(|\bfetch\(|XMLHttpRequest", text) == []
    assert re.findall(r'href="([^"]*)"', text) == ["data:,"]
    assert set(re.findall(r"https?://[^\"'` ]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"\{\{\w+\}\}", text)
    assert "default-src 'none'" in text


def test_the_command_line_writes_the_page_or_says_in_one_line_why_not(tmp_path: Path) -> None:
    file = tmp_path / "new" / "report.html"
    arguments = [str(QUICKSTART), "--paper", "table1", "--baseline", "permutation=none"]
    result = run_module("permllm", "results", *arguments, "--html", str(file))
    assert result.returncode == 0, result.stderr
    assert "| lcp |" in result.stdout
    text = file.read_text(encoding="utf-8")
    assert "compare the order of the rows" in text
    assert "against the baseline" in text
    (tmp_path / "file").touch()
    failed = run_module("permllm", "results", *arguments, "--html", str(tmp_path / "file" / "report.html"))
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: --html: cannot write ")
    assert "Traceback" not in failed.stderr


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

    def __enter__(self) -> Any:
        return self.page

    def __exit__(self, failed: Any, *_: object) -> None:
        self.context.close()
        if failed is None:
            assert self.complaints == []
            assert [url for url in self.requests if not url.startswith("data:")] == [self.file.as_uri()]


def column(page: Any, name: str) -> list[str]:
    """Cells of a column of the table, top to bottom, without the dense model's."""
    names = [text.strip() for text in page.locator("#table thead th button span:first-child").all_inner_texts()]
    position = [" ".join(text.split()) for text in names].index(name)
    return page.locator(f"#table tbody.rows tr > :nth-child({position + 1})").all_inner_texts()


def sort_button(page: Any, name: str) -> Any:
    return page.locator("#table thead button").filter(has_text=re.compile(rf"^{re.escape(name)}[▲▼]?$"))


def ablation_like(folder: Path) -> Path:
    """Nine rows: three block sizes of three methods."""
    for number, permutation in enumerate(("none", "heuristic", "lcp")):
        for size in (32, 64, 128):
            value = 100.0 - 30 * number + size / 16
            make_run(folder / f"{permutation}{size}", value, permutation=permutation, block_size=size, acc=0.5)
    return folder


def test_a_header_sorts_up_and_down_with_mouse_and_keyboard(browser: Any, tmp_path: Path) -> None:
    runs = ablation_like(tmp_path / "runs")
    make_run(runs / "inf", float("inf"), permutation="lcp", block_size=512, acc=0.5)
    with Opened(browser, write_page(tmp_path / "page.html", runs)) as page:
        button = sort_button(page, PERPLEXITY)
        header = button.locator("xpath=..")
        assert header.get_attribute("aria-sort") == "none"
        button.click()
        assert header.get_attribute("aria-sort") == "ascending"
        up = column(page, PERPLEXITY)
        # As numbers: 102.00 is the largest, though the smallest as text; what is no number comes last.
        assert up == ["42.00", "44.00", "48.00", "72.00", "74.00", "78.00", "102.00", "104.00", "108.00", "inf"]
        page.keyboard.press("Enter")  # the focus stayed on the header
        assert header.get_attribute("aria-sort") == "descending"
        assert column(page, PERPLEXITY) == [*reversed(up[:-1]), "inf"]
        sort_button(page, "permutation").focus()
        page.keyboard.press("Space")
        assert header.get_attribute("aria-sort") == "none"
        assert column(page, "permutation") == ["heuristic"] * 3 + ["lcp"] * 4 + ["none"] * 3
        sort_button(page, "block_size").click()
        assert column(page, "block_size") == ["32"] * 3 + ["64"] * 3 + ["128"] * 3 + ["512"]
        # The dense model stays in front, whatever is sorted.
        assert page.locator("#table tbody.dense tr").inner_text().startswith("dense")


def test_the_filter_wants_all_words_and_plots_and_runs_follow(browser: Any, tmp_path: Path) -> None:
    with Opened(browser, write_page(tmp_path / "page.html", ablation_like(tmp_path / "runs"))) as page:
        count = page.locator("#count")
        assert count.inner_text() == "9 of 9 rows"
        assert page.locator("#main-plot .bar").count() == 9
        page.get_by_label("Filter rows").fill("LCP  block_size=128")
        assert count.inner_text() == "1 of 9 rows"
        assert column(page, PERPLEXITY) == ["48.00"]
        assert page.locator("#main-plot .bar").count() == 1
        assert page.locator("#runs details:visible").count() == 1
        assert page.locator("#legend li").count() == 1
        page.get_by_label("Filter rows").fill("nothing like this")
        assert count.inner_text() == "0 of 9 rows"
        assert page.locator("#main-plot").inner_text() == "No row that is shown has this measure."
        page.get_by_label("Filter rows").fill("")
        assert count.inner_text() == "9 of 9 rows"


def test_one_numeric_setting_is_drawn_as_a_line(browser: Any, tmp_path: Path) -> None:
    for size, value in ((32, 20.0), (64, 18.0), (128, 30.0)):
        for seed in range(2):
            make_run(tmp_path / "runs" / f"{size}-{seed}", value + seed, block_size=size, seed=seed)
    with Opened(browser, write_page(tmp_path / "page.html", tmp_path / "runs")) as page:
        plot = page.locator("#main-plot")
        assert plot.locator(".bar").count() == 0
        assert plot.locator(".dot").count() == 3
        assert plot.locator(".error").count() == 3
        assert plot.locator(".dense-line").count() == 1
        assert "block_size" in plot.inner_text()
        assert "dense 10.00" in plot.inner_text()
        # Curves of all seeds, in the colour of their row.
        assert page.locator("#curve-plots .series").count() == 6
        page.locator("#legend button").first.hover()
        assert page.locator("#curve-plots .series.hot").count() == 2


def test_a_run_opens_with_its_difference_pictures_and_environment(browser: Any, tmp_path: Path) -> None:
    for size in (32, 64, 128):
        make_run(tmp_path / "runs" / str(size), 20.0, block_size=size)
    write_orders_and_masks(tmp_path / "runs" / "64")
    with Opened(browser, write_page(tmp_path / "page.html", tmp_path / "runs")) as page:
        details = page.locator("#runs details")
        details.nth(1).locator("summary").click()
        details.nth(1).locator(".run").wait_for()
        text = details.nth(1).inner_text()
        for expected in ("block_size", PERPLEXITY, "evaluate sparse", str(tmp_path / "runs" / "64"), "no environment.json"):
            assert expected in text
        assert details.nth(1).locator("canvas").count() == 6 + 9
        drawn = page.evaluate(
            """() => [...document.querySelectorAll("#runs canvas")].map((one) => {
                const { data } = one.getContext("2d").getImageData(0, 0, one.width, one.height);
                return new Set(new Uint32Array(data.buffer)).size;
            })"""
        )
        assert min(drawn) >= 2
        page.locator("#table tbody.rows a").nth(0).click()
        details.nth(0).locator(".run").wait_for()
        assert details.nth(0).inner_text().count(NOT_KEPT) == 2


def test_the_pixels_of_a_mask_are_its_bits(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs" / "a", 20.0)
    mask = torch.zeros(3, 10, dtype=torch.bool)
    mask[0, 0] = mask[1, 9] = mask[2, 4] = True
    write_masks(run / MASKS, {"model.layers.0.mlp.down_proj": mask})
    with Opened(browser, write_page(tmp_path / "page.html", tmp_path / "runs")) as page:
        page.locator("#runs summary").click()
        page.locator("canvas.mask").wait_for()
        pixels = page.evaluate(
            """() => {
                const one = document.querySelector("canvas.mask");
                return [...new Uint32Array(one.getContext("2d").getImageData(0, 0, one.width, one.height).data.buffer)];
            }"""
        )
        ground = pixels[1]
        assert [pixel != ground for pixel in pixels] == mask.flatten().tolist()


def test_a_run_named_like_a_script_is_harmless(browser: Any, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    for number, loss in enumerate(("kl", evil)):
        make_run(tmp_path / "runs" / f"{number}", 20.0 + number, name=evil, loss=loss)
    with Opened(browser, write_page(tmp_path / "page.html", tmp_path / "runs")) as page:
        for summary in page.locator("#runs summary").all():
            summary.click()
        assert evil in column(page, "loss")
        assert page.locator("img").count() == 0


@pytest.mark.parametrize("folder", [ABLATION, QUICKSTART], ids=lambda folder: folder.name)
def test_the_records_of_the_repository_fit_a_phone(browser: Any, tmp_path: Path, folder: Path) -> None:
    with Opened(browser, write_page(tmp_path / "page.html", folder), width=390) as page:
        for summary in page.locator("#runs summary").all()[:3]:
            summary.click()
        page.locator("#runs .run").nth(2).wait_for()
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        # Nothing sticks out of the page unseen either, but the table, which scrolls in its own box.
        outside = page.evaluate(
            """() => [...document.querySelectorAll("body *")]
                .filter((one) => !one.closest("#table, svg") && one.getBoundingClientRect().right > innerWidth)
                .map((one) => one.outerHTML.slice(0, 80))"""
        )
        assert outside == []
        assert page.evaluate(
            "(() => { const box = document.querySelector('.scroll'); return box.scrollWidth > box.clientWidth; })()"
        )


def test_colours_follow_the_scheme(browser: Any, tmp_path: Path) -> None:
    def brightness(page: Any, what: str) -> float:
        colour = page.evaluate(f"getComputedStyle(document.body).{what}")
        return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3

    file = write_page(tmp_path / "page.html", QUICKSTART)
    with Opened(browser, file, scheme="dark") as page:
        assert brightness(page, "backgroundColor") < 60
        assert brightness(page, "color") > 200
        assert page.evaluate("getComputedStyle(document.querySelector('.plot text:not(.quiet)')).fill") == "rgb(227, 231, 237)"
    with Opened(browser, file) as page:
        assert brightness(page, "backgroundColor") > 230
        assert brightness(page, "color") < 80
