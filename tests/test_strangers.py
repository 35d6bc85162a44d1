"""A pruner and a permutation of another package: a module and a YAML each."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import ByT5Tokenizer

import permllm
from permllm import job
from permllm.data.texts import TEXTS
from permllm.data.windows import calibration_windows
from permllm.errors import ConfigError, TrainingError
from permllm.export.verify import verify
from permllm.models import families
from permllm.models.families import channel_groups
from permllm.models.load import load_model
from permllm.pruning.stages import calibrate_dense
from permllm.settings.config import read_config
from permllm.sparsity.method import instantiate
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.saliency import saliency
from permllm.store.tensors import load_masks
from tests.conftest import run_command
from tests.settings.test_config import composed

SEARCH = "hydra.searchpath=[pkg://strange.conf]"

FILES = {
    # A statistic, and the pruner that asks for it, with a score for each weight.
    "pruning.py": """
        from dataclasses import dataclass

        import torch

        from permllm.runtime import parallel
        from permllm.pruning.stages import Pruner
        from permllm.sparsity.saliency import SaliencyFactors
        from permllm.sparsity.statistics import InputStatistic


        class Largest(InputStatistic):
            def __init__(self, channels, device, norm_tokens):
                self.value = torch.zeros(channels, device=device)

            def update(self, rows):
                self.value = torch.maximum(self.value, rows.abs().amax(0).to(self.value))

            def all_reduce(self):
                parallel.all_reduce([self.value], "max")


        @dataclass(frozen=True)
        class LargestInput(Pruner):
            power: int
            statistics = (Largest,)

            def factors(self, weight, statistics):
                score = weight.abs() + statistics[Largest].value
                return SaliencyFactors(self.power, score)
        """,
    "conf/pruner/largest.yaml": "name: largest\n_target_: strange.pruning.LargestInput\npower: 1\n",
    "permuting.py": """
        from permllm.permutation.base import LocalPermutation


        class ByTotal(LocalPermutation):
            def order(self, group, saliency, pattern):
                return saliency.sum(0).argsort(stable=True).cpu()
        """,
    "conf/permutation/by_total.yaml": "name: by_total\n_target_: strange.permuting.ByTotal\n",
}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Path]:
    """A folder on the path, as an installed package would be."""
    folder = tmp_path / "site"
    for name, content in FILES.items():
        file = folder / "strange" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(content))
    for module in ("", "conf/"):  # Hydra warns of a conf/ that is no package
        (folder / "strange" / f"{module}__init__.py").touch()
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "strange"]:
        del sys.modules[name]


def run(*overrides: str) -> tuple[dict[str, Any], Path]:
    result = job.run(read_config(composed(SEARCH, "model=tiny", "logger=none", *overrides)))
    assert result is not None
    return result.metrics, result.directory


def changed(package: Path, module: str, line: str) -> None:
    """Rewrite every `return` line of a module of the stranger's package."""
    file = package / "strange" / module
    file.write_text(re.sub(r"return .*", f"return {line}", file.read_text()))


@pytest.mark.parametrize(
    "words",
    [
        ["permutation=heuristic", "permutation.constraint=foldable", "export=folded"],
        ["permutation=by_total", "export=gathered"],
        ["permutation.straight_through=soft", "permutation.constraint=foldable", "export=folded"],
    ],
    ids=["heuristic", "by_total", "learned"],
)
def test_masks_are_those_of_a_dense_score_whatever_orders_the_channels(
    words: list[str], package: Path
) -> None:
    chosen = ["pruner=largest", "block_size=8", "compute_dtype=float32", *words]
    if not words[0].startswith("permutation="):
        chosen += ["permutation.epochs=1", "permutation.learning_rate=0.05"]
        chosen += ["calibration.samples=6"]
    metrics, directory = run(*chosen, f"run_dir={package}/run")
    assert sum(metrics["moved_channels"].values()) > 0
    settings = read_config(composed(SEARCH, "model=tiny", *chosen))
    model = load_model(settings.model, 0).model
    tokenizer = ByT5Tokenizer(extra_ids=0)
    windows = calibration_windows(tokenizer, TEXTS["builtin"], settings.calibration, seed=0)
    factors = calibrate_dense(
        model, channel_groups(model), windows, instantiate("pruner", settings.pruner), 4
    ).factors
    orders = load_file(directory / "permutations.safetensors")
    masks = load_masks(directory / "masks.safetensors")
    scores = {
        path: saliency(model.get_submodule(path).weight, found) for path, found in factors.items()
    }
    for group in channel_groups(model):
        for path in group.members:
            score, order = scores[path], orders[group.name]
            assert torch.equal(masks[path], permuted_nm_mask(score, order, settings.pattern))
        if words[0].endswith("by_total"):
            total = sum(scores[path].sum(0) for path in group.members)
            assert torch.equal(orders[group.name], total.argsort(stable=True))
    if settings.export.form != "none":
        assert verify(directory / "export")["passed"]


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("saliency.sum(0).argsort() * 0", r"torch.int64 \(32,\)"),
        ("None", "is NoneType"),
        ("saliency.sum().long()", r"torch.int64 \(\)"),
    ],
)
def test_an_order_that_is_no_permutation_is_refused(
    returned: str, reason: str, package: Path
) -> None:
    changed(package, "permuting.py", returned)
    with pytest.raises(ConfigError, match=rf"^permutation=by_total: the permutation of .*{reason}"):
        run("permutation=by_total", f"run_dir={package}/run")


@pytest.mark.parametrize(
    ("returned", "error", "reason"),
    [
        ("(1, weight).column", ConfigError, "are a Parameter"),
        ("(1, statistics[Largest].value)", ConfigError, r"are column \(32,\)"),
        ("(1, weight - 9)", ConfigError, "are negative"),
        ("(1, weight * float('nan'))", TrainingError, "q_proj is not finite"),
    ],
)
def test_a_saliency_that_is_none_is_refused(
    returned: str, error: type[Exception], reason: str, package: Path
) -> None:
    changed(package, "pruning.py", f"SaliencyFactors{returned}")
    with pytest.raises(error, match=reason):
        run("pruner=largest", "permutation=none", f"run_dir={package}/run")


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("def factors", "def factor", "abstract"),
        ("(Pruner)", "", "expected a subclass of permllm.pruner.base.Pruner"),
        ("import torch", "import nowhere_to_be_found", "No module named 'nowhere_to_be_found'"),
        ("power: int", "powers: int", ".power=.*no such setting"),
    ],
)
def test_a_class_that_is_no_pruner_says_why(
    before: str, after: str, reason: str, package: Path
) -> None:
    file = package / "strange" / "pruning.py"
    file.write_text(file.read_text().replace(before, after))
    with pytest.raises(ConfigError, match=rf"^pruner.*{reason}"):
        run("pruner=largest", "plan=true")


def test_an_option_that_says_it_is_another_one_is_refused(package: Path, tmp_path: Path) -> None:
    (package / "strange" / "conf" / "pruner" / "copied.yaml").write_text(
        FILES["conf/pruner/largest.yaml"].replace("largest", "ria")
    )
    words = ("model=tiny", SEARCH, "permutation=none", "logger=none", "pruner=copied")
    words += ("pruner._target_=strange.pruning.LargestInput",)
    found = run_command(*words, cwd=tmp_path, fresh=True, PYTHONPATH=str(package))
    assert (found.returncode, found.stderr.count("error: ")) == (1, 1)
    assert "error: pruner=copied: its `name` is ria" in found.stderr


def test_python_finds_options_of_somebody_else(package: Path) -> None:
    loaded = load_model(read_config(composed("model=tiny")).model, 0)
    settings: dict[str, Any] = {"pruner": "largest", "permutation": "by_total"}
    settings |= {"searchpath": ["pkg://strange.conf"]}
    few: dict[str, Any] = {"calibration__samples": 4, "calibration__seqlen": 16}
    texts = ["Tyger Tyger, burning bright. " * 20]
    _, _, report = permllm.prune(loaded.model, loaded.tokenizer, texts=texts, **settings, **few)
    assert report["name"].endswith("-largest-by_total-2x4")
    assert report["sparsity"]["violations"] == 0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("strange.nowhere:FAMILY", "cannot be imported from strange.nowhere:FAMILY: No module"),
        ("strange.pruning:Largest", "expected a permllm.models.families.Family"),
    ],
)
def test_an_entry_point_that_gives_no_family_is_one_line(
    package: Path, entry: str, message: str
) -> None:
    described = package / "strange-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(f"[permllm.families]\nstablelm = {entry}\n")
    families.family_of_a_package.cache_clear()
    with pytest.raises(ConfigError, match=re.escape(message)):
        families.family_of_a_package("stablelm")
    families.family_of_a_package.cache_clear()
