"""The package of docs/plugin: a job with each of its parts, and its family folds."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from permllm import job
from permllm.export.verify import verify
from permllm.models import families
from permllm.reconstruction.base import PrunedLinear
from permllm.runtime import parallel
from permllm.settings.config import NMPattern, read_config
from permllm.sparsity.method import instantiate
from permllm.sparsity.nm import nm_mask
from permllm.sparsity.statistics import InputStatistics
from permllm.store.tensors import load_masks
from tests.conftest import ROOT
from tests.settings.test_config import composed

PLUGIN = ROOT / "docs" / "plugin"
CONF = PLUGIN / "mypackage" / "conf"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
BASES = re.findall(r"```python\n# (permllm/\S+)\.py\n(.*?)```", CONTRIBUTING, re.DOTALL)
OPTIONS = sorted(file.relative_to(CONF).with_suffix("") for file in CONF.glob("*/*.yaml"))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[None]:
    """The package on the path, with the entry points that pip would install."""
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text("utf-8"))["project"]
    described = tmp_path / "site" / "mypackage-0.1.dist-info"
    described.mkdir(parents=True)
    name = "Metadata-Version: 2.1\nName: mypackage\nVersion: 0.1\n"
    (described / "METADATA").write_text(name)
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (described / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(PLUGIN))
    families.family_of_a_package.cache_clear()
    yield
    families.family_of_a_package.cache_clear()
    for module in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[module]


def run(*overrides: str) -> tuple[dict[str, Any], Path]:
    words = ("hydra.searchpath=[pkg://mypackage.conf]", "model=tiny", "logger=none", *overrides)
    result = job.run(read_config(composed(*words)))
    assert result is not None
    return result.metrics, result.directory


def of_group(name: str) -> dict[str, Any]:
    words = ("hydra.searchpath=[pkg://mypackage.conf]", "model=tiny", name)
    return dict(getattr(read_config(composed(*words)), name.partition("=")[0]))


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_a_job_runs_with_each_option(option: Path, tmp_path: Path) -> None:
    group, name = option.parts
    words = [f"{group}={name}", "block_size=8", "permutation=lcp", "permutation.epochs=1"]
    if group not in ("temperature", "calibration"):
        words = [f"{group}={name}"] + ["permutation=none"] * (group != "permutation")
    metrics, directory = run(*words, f"run_dir={tmp_path}/run")
    assert metrics["status"] == "finished"
    assert metrics["sparsity"]["fraction"] == 0.5
    assert metrics["sparsity"]["violations"] == 0
    assert metrics["sparsity"]["weights_changed"] == (group == "reconstruction")
    if group == "permutation":
        assert sum(metrics["moved_channels"].values()) > 0
        assert load_file(directory / "permutations.safetensors")


@pytest.mark.usefixtures("package")
def test_all_options_run_together(tmp_path: Path) -> None:
    chosen = [f"{option.parent}={option.name}" for option in OPTIONS]
    metrics, _ = run(*chosen, "export=gathered", f"run_dir={tmp_path}/run")
    assert metrics["name"] == "tiny-peak-spread-random-row_scale-2x4"
    assert verify(tmp_path / "run" / "export")["passed"]


@pytest.mark.usefixtures("package")
def test_the_peak_of_all_ranks_is_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    pruner = instantiate("pruner", of_group("pruner=peak"))
    inputs = torch.randn(2, 50, 8, generator=torch.Generator().manual_seed(0))
    (kind,) = pruner.statistics
    ranks = [InputStatistics(8, "cpu", pruner.statistics) for _ in inputs]
    for statistics, of_rank in zip(ranks, inputs, strict=True):
        statistics.update(of_rank)
    peak, other = ranks[0][kind], ranks[1][kind].value
    monkeypatch.setattr(parallel, "world_size", lambda: 2)

    def all_reduce(tensor: torch.Tensor, kind: object) -> None:
        assert kind == torch.distributed.ReduceOp.MAX
        tensor.copy_(torch.maximum(tensor, other))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    peak.all_reduce()
    assert torch.equal(peak.value, inputs.abs().amax((0, 1)))


@pytest.mark.usefixtures("package")
def test_the_row_factors_lower_the_output_error() -> None:
    reconstruction = instantiate("reconstruction", of_group("reconstruction=row_scale"))
    generator = torch.Generator().manual_seed(0)
    dense, inputs = torch.randn(6, 8, generator=generator), torch.randn(50, 8, generator=generator)
    statistics = InputStatistics(8, "cpu", reconstruction.statistics)
    statistics.update(inputs)
    mask = nm_mask(torch.rand(6, 8, generator=generator), NMPattern(2, 4))
    weight = torch.where(mask, dense, 0.0)
    parts = dense, weight, mask, torch.arange(8), NMPattern(2, 4), statistics
    found = reconstruction.linear(PrunedLinear(*parts))
    before, after = (((dense - one) @ inputs.t()).square().sum(1) for one in (weight, found))
    assert bool((after < before).all())
    assert not found[~mask].any()


@pytest.mark.usefixtures("package")
def test_random_masks_follow_the_seed(tmp_path: Path) -> None:
    masks = []
    for number, seed in enumerate((0, 0, 1)):
        words = ("permutation=none", "mask=random", f"seed={seed}", f"run_dir={tmp_path}/{number}")
        masks.append(load_masks(run(*words)[1] / "masks.safetensors"))
    first, again, other = masks
    assert all(torch.equal(mask, again[path]) for path, mask in first.items())
    assert not any(torch.equal(mask, other[path]) for path, mask in first.items())


@pytest.mark.usefixtures("package")
def test_the_temperature_halves() -> None:
    schedule = instantiate("temperature", of_group("temperature=steps"))
    found = [schedule(progress) for progress in (0.0, 0.3, 0.6, 0.9, 1.0)]
    assert found == [1, 0.5, 0.25, 0.125, 0.125]


@pytest.mark.usefixtures("package")
def test_the_family_folds(tmp_path: Path) -> None:
    words = ("model.architecture.model_type=starcoder2", "permutation=heuristic")
    words += ("permutation.constraint=foldable", "export=folded", f"run_dir={tmp_path}/run")
    metrics, directory = run(*words)
    assert sum(metrics["moved_channels"].values()) > 0
    assert verify(directory / "export")["passed"]


def test_the_tree_in_contributing_has_the_files_of_the_package() -> None:
    (tree,) = re.findall(r"```\ndocs/plugin/\n(.*?)```", CONTRIBUTING, re.DOTALL)
    named = re.findall(r"(?:^ +|, )([\w/]+\.(?:py|yaml|toml|txt))", tree, re.MULTILINE)
    files = [file for file in PLUGIN.rglob("*.*") if "__pycache__" not in file.parts]
    there = [file.name for file in files if file.suffix in (".py", ".yaml", ".toml", ".txt")]
    assert sorted(name.rpartition("/")[2] for name in named) == sorted(there)


@pytest.mark.parametrize(("module", "code"), BASES, ids=[module for module, _ in BASES])
def test_the_base_classes_in_contributing_are_those_of_the_code(module: str, code: str) -> None:
    classes = [node for node in ast.parse(code).body if isinstance(node, ast.ClassDef)]
    assert classes
    for shown in classes:
        real = getattr(import_module(module.replace("/", ".")), shown.name)
        for base in shown.bases:
            assert ast.unparse(base) in [one.__name__ for one in real.__mro__]
        for node in shown.body:
            if isinstance(node, ast.FunctionDef):
                parameters = [one.arg for one in node.args.args]
                assert parameters == [*inspect.signature(getattr(real, node.name)).parameters]
            elif isinstance(node, ast.Assign):
                (name,) = map(ast.unparse, node.targets)
                assert getattr(real, name) == ast.literal_eval(node.value), name
            elif isinstance(node, ast.AnnAssign):
                name = ast.unparse(node.target)
                assert name in [key for one in real.__mro__ for key in inspect.get_annotations(one)]
