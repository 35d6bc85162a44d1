"""The package of docs/plugin: a job with each of its parts, and each mistake that it could have."""

from __future__ import annotations

import ast
import inspect
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import permllm
from permllm import job
from permllm.errors import ConfigError, TrainingError
from permllm.export.verify import verify
from permllm.models import families
from permllm.models.families import channel_groups
from permllm.models.load import load_model
from permllm.reconstruction.base import PrunedLinear
from permllm.runtime import parallel
from permllm.settings.config import NMPattern, RunConfig
from permllm.sparsity.method import instantiate
from permllm.sparsity.nm import nm_mask, permuted_nm_mask
from permllm.sparsity.statistics import InputStatistics
from permllm.store.tensors import load_masks
from tests.conftest import ROOT, run_python
from tests.settings.test_config import chosen, config

PLUGIN = ROOT / "docs" / "plugin"
CONF = PLUGIN / "mypackage" / "conf"
GUIDE = (ROOT / "docs" / "extending.md").read_text("utf-8")
BASES = re.findall(r"```python\n# (permllm/\S+)\.py\n(.*?)```", GUIDE, re.DOTALL)
# Files of the package that the guide makes first.
FILES = re.findall(r"```\w+\n# mine/(\S+)\n(.*?)```", GUIDE, re.DOTALL)
OPTIONS = sorted(file.relative_to(CONF).with_suffix("") for file in CONF.glob("*/*.yaml"))


SEARCH = "hydra.searchpath=[pkg://mypackage.conf]"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[Path]:
    """A copy of the package on the path, with the entry points that pip would install."""
    site = tmp_path / "site"
    shutil.copytree(PLUGIN / "mypackage", site / "mypackage")
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text("utf-8"))["project"]
    described = site / "mypackage-0.1.dist-info"
    described.mkdir()
    name = "Metadata-Version: 2.1\nName: mypackage\nVersion: 0.1\n"
    (described / "METADATA").write_text(name)
    lines = [
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in points.items())
        for group, points in project["entry-points"].items()
    ]
    (described / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(site))
    families.family_of_a_package.cache_clear()
    yield site
    families.family_of_a_package.cache_clear()
    for module in [name for name in sys.modules if name.partition(".")[0] == "mypackage"]:
        del sys.modules[module]


def settings_of(*overrides: str) -> RunConfig:
    return config(SEARCH, "model=tiny-random", "logger=none", *overrides)


def run(*overrides: str) -> tuple[dict[str, Any], Path]:
    result = job.run(settings_of(*overrides))
    assert result is not None
    return result.metrics, result.directory


def of_group(name: str) -> dict[str, Any]:
    return dict(getattr(settings_of(name), name.partition("=")[0]))


def return_instead(package: Path, module: str, value: str) -> None:
    """Rewrite every `return` line of a module."""
    file = package / "mypackage" / module
    file.write_text(re.sub(r"return .*", f"return {value}", file.read_text()))


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_a_job_runs_with_each_option(option: Path, tmp_path: Path) -> None:
    group, name = option.parts
    words = [f"{group}={name}", "block_size=8", "permutation=lcp", "permutation.epochs=1"]
    if group == "method":
        words = [f"method={name}", "block_size=8", "budget.steps=4", "budget.learning_windows=8"]
    elif group not in ("temperature", "calibration"):
        words = [f"{group}={name}"] + ["permutation=none"] * (group != "permutation")
    metrics, directory = run(*words, f"run_dir={tmp_path}/run")
    assert metrics["status"] == "finished"
    assert metrics["sparsity"]["fraction"] == 0.5
    assert metrics["sparsity"]["violations"] == 0
    assert metrics["sparsity"]["weights_changed"] == (group == "reconstruction")
    if group == "permutation":
        assert sum(metrics["moved_channels"].values()) > 0
        assert load_file(directory / "permutations.safetensors")


def run_pytest(folder: Path, cwd: Path) -> None:
    paths = os.pathsep.join(map(str, (folder, ROOT)))
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(folder), str(folder))
    environment = os.environ | {"PYTHONPATH": paths, "PERMLLM_CACHE": str(cwd / "cache")}
    done = run_python(*words, cwd=cwd, environment=environment, fresh=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout


def test_the_tests_of_the_package_pass(tmp_path: Path) -> None:
    run_pytest(PLUGIN, tmp_path)


def test_the_first_package_of_the_guide_works_as_the_guide_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    for name, content in FILES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, "utf-8")
    for part in ("mypruner", "mypruner/conf"):
        (folder / part / "__init__.py").touch()
    test = (PLUGIN / "tests" / "test_pruner.py").read_text("utf-8")
    changes = {
        "import Peak, PeakPruner": "import Mine",
        "statistics import InputStatistics": "statistics import InputStatistics, Norm",
        "inputs.double().abs().max(dim=0).values": "inputs.double().square().mean(0).sqrt()",
        "(Peak,)": "(Norm,)",
        "PeakPruner": "Mine",
        '"peak"': '"mine"',
        "mypackage": "mypruner",
    }
    for before, after in changes.items():
        assert before in test
        test = test.replace(before, after)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_pruner.py").write_text(test, "utf-8")
    run_pytest(folder, tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    compose_commands("mypruner")


@pytest.mark.usefixtures("package")
def test_the_commands_of_the_guide_compose() -> None:
    compose_commands("mypackage")


def compose_commands(package: str) -> None:
    """Compose each `permllm run` of the guide that has the options of a package."""
    commands = [line for line in re.findall(r"^permllm run .*", GUIDE, re.M) if package in line]
    assert commands
    for command in commands:
        words = shlex.split(command, comments=True)
        if "--help" not in words and "experiment=NAME" not in words:
            config(*chosen(shlex.join(words)))


def test_the_yaml_of_a_method_in_the_guide_is_that_of_the_package() -> None:
    (shown,) = re.findall(r"```yaml\n(# @package _global_\n.*?)```", GUIDE, re.DOTALL)
    file = CONF / "method" / "peak-lcp.yaml"
    assert yaml.safe_load(shown) == yaml.safe_load(file.read_text("utf-8"))


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
def test_the_family_folds(tmp_path: Path) -> None:
    words = ("model.architecture.model_type=starcoder2", "permutation=heuristic")
    words += ("permutation.constraint=foldable", "export=folded", f"run_dir={tmp_path}/run")
    metrics, directory = run(*words)
    assert sum(metrics["moved_channels"].values()) > 0
    assert verify(directory / "export")["passed"]


@pytest.mark.parametrize(("module", "code"), BASES, ids=[module for module, _ in BASES])
def test_the_base_classes_in_the_guide_are_those_of_the_code(module: str, code: str) -> None:
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


@pytest.mark.parametrize(
    "words",
    [
        ["permutation=heuristic", "permutation.constraint=foldable", "export=folded"],
        ["permutation=spread", "export=gathered"],
        ["permutation.straight_through=soft", "permutation.constraint=foldable", "export=folded"],
    ],
    ids=["heuristic", "spread", "learned"],
)
def test_masks_are_those_of_a_dense_score_whatever_orders_the_channels(
    words: list[str], package: Path
) -> None:
    return_instead(package, "pruner.py", "SaliencyFactors(1, weight.abs())")
    chosen = ["pruner=peak", "block_size=8", "compute_dtype=float32", *words]
    if not words[0].startswith("permutation="):
        chosen += ["permutation.epochs=1", "permutation.learning_rate=0.05"]
        chosen += ["calibration.samples=6"]
    metrics, directory = run(*chosen, f"run_dir={package}/run")
    assert sum(metrics["moved_channels"].values()) > 0
    settings = settings_of(*chosen)
    model = load_model(settings.model, 0).model
    orders = load_file(directory / "permutations.safetensors")
    masks = load_masks(directory / "masks.safetensors")
    for group in channel_groups(model):
        order = orders[group.name]
        scores = {path: model.get_submodule(path).weight.square() for path in group.members}
        for path, score in scores.items():
            assert torch.equal(masks[path], permuted_nm_mask(score, order, settings.pattern))
        if words[0].endswith("spread"):
            total = sum(score.sum(0) for score in scores.values())
            ranked = total.argsort(descending=True, stable=True)
            assert torch.equal(order, ranked.view(4, -1).t().flatten())
    assert verify(directory / "export")["passed"]


def test_a_saliency_that_is_not_finite_is_one_line(package: Path) -> None:
    return_instead(package, "pruner.py", "SaliencyFactors(1, weight * float('nan'))")
    with pytest.raises(TrainingError, match="q_proj"):
        run("pruner=peak", "permutation=none", f"run_dir={package}/run")


@pytest.mark.parametrize(
    ("option", "returned", "error"),
    [
        ("mask=random", "{path: mask | True for path, mask in found.items()}", ConfigError),
        ("reconstruction=row_scale", "pruned.dense", ConfigError),
        ("reconstruction=row_scale", "pruned.weight * 1e38 * 1e38", TrainingError),
    ],
)
def test_masks_and_weights_that_are_no_pruned_ones_are_refused_and_not_kept(
    option: str, returned: str, error: type[Exception], package: Path
) -> None:
    return_instead(package, f"{option.partition('=')[0]}.py", returned)
    with pytest.raises(error, match=rf"{option}: model\.layers"):
        run(option, "permutation=none", f"run_dir={package}/run")
    assert not (package / "run" / "masks.safetensors").exists()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def factors", "def factor"),
        ("(Pruner)", ""),
        ("import torch", "import nowhere_to_be_found"),
        ("exponent: float", "exponents: float"),
    ],
)
def test_a_class_that_is_no_pruner_is_an_error_of_its_option(
    before: str, after: str, package: Path
) -> None:
    file = package / "mypackage" / "pruner.py"
    file.write_text(file.read_text().replace(before, after))
    with pytest.raises(ConfigError, match=r"^pruner"):
        run("pruner=peak", "plan=true")


def test_python_finds_options_of_a_package(package: Path) -> None:
    loaded = load_model(config("model=tiny-random").model, 0)
    settings: dict[str, Any] = {"pruner": "peak", "permutation": "spread"}
    settings |= {"searchpath": ["pkg://mypackage.conf"]}
    few: dict[str, Any] = {"calibration__samples": 4, "calibration__seqlen": 16}
    texts = ["Tyger Tyger, burning bright. " * 20]
    with pytest.raises(ConfigError, match="searchpath"):
        permllm.prune(loaded.model, loaded.tokenizer, texts=texts, searchpath="mypackage")
    _, _, report = permllm.prune(loaded.model, loaded.tokenizer, texts=texts, **settings, **few)
    assert report["name"].endswith("-peak-spread-2x4")
    assert report["sparsity"]["violations"] == 0
