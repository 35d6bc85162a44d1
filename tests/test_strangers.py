"""One new thing of each kind in a package of somebody else's: modules, YAMLs, an entry point, no file of this repository."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from permllm.runs.code import code_digest
from permllm.runs.run_tensors import read_masks
from safetensors.torch import load_file
from transformers import ByT5Tokenizer

import permllm
from permllm import job
from permllm.config import instantiate, read_config
from permllm.data.windows import calibration_tokens
from permllm.errors import ConfigError, TrainingError
from permllm.export.gathered import register
from permllm.export.verify import verify
from permllm.models import families
from permllm.models.families import channel_groups
from permllm.models.load import load_model
from permllm.sparsity.calibrate import calibrate_dense
from permllm.sparsity.nm import permuted_nm_mask
from permllm.sparsity.saliency import saliency
from tests.conftest import run_command
from tests.test_config import composed

SEARCH = "hydra.searchpath=[pkg://strange.conf]"

FILES = {
    # A statistic, and the pruner that asks for it.
    "pruning.py": """
        from dataclasses import dataclass

        import torch

        from permllm.sparsity.saliency import SaliencyFactors
        from permllm.sparsity.statistics import InputStatistic


        class Largest(InputStatistic):
            def __init__(self, channels, device, norm_tokens):
                self.value = torch.zeros(channels, device=device)

            def update(self, rows):
                self.value = torch.maximum(self.value, rows.abs().amax(0).to(self.value))


        @dataclass(frozen=True)
        class LargestInput:
            power: int = 1
            statistics = (Largest,)
            updates_weights = False

            def factors(self, weight, statistics):
                return SaliencyFactors(self.power, statistics[Largest].value.unsqueeze(0))


        @dataclass(frozen=True)
        class OfEachWeight(LargestInput):
            def factors(self, weight, statistics):
                return SaliencyFactors.of_each_weight(weight.abs() + statistics[Largest].value, self.power)
        """,
    "permuting.py": """
        from dataclasses import dataclass


        @dataclass(frozen=True)
        class ByTotal:
            constraint = "free"
            learned = False
            local = True

            def order(self, group, saliency, pattern):
                return saliency.sum(0).argsort(stable=True).cpu()
        """,
    "scheduling.py": """
        from dataclasses import dataclass


        @dataclass(frozen=True)
        class Steps:
            high: float = 1.0

            def __call__(self, progress):
                return self.high if progress < 0.5 else 0.2
        """,
    "poem.py": """
        from permllm.data.texts.base import Text


        class Poem(Text):
            calibrates = evaluates = True

            def calibration(self, seed):
                return ["So much depends upon a red wheel barrow. " * 40]

            def evaluation(self):
                return "Tyger Tyger, burning bright, in the forests of the night. " * 20


        TEXT = Poem()
        """,
    "reconstructing.py": """
        from dataclasses import dataclass

        from permllm.pruning.reconstruction import NoReconstruction


        @dataclass(frozen=True)
        class Doubled(NoReconstruction):
            changes_weights = True

            def linear(self, pruned):
                return 2 * pruned.weight
        """,
    "family.py": """
        from permllm.models.families import Family, GroupTable

        FAMILY = Family(
            layers="model.layers",
            groups=(
                GroupTable("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
                GroupTable("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
            ),
            after=("model.norm",),
            norms=("input_layernorm", "post_attention_layernorm"),
            writers=("self_attn.o_proj", "mlp.down_proj"),
            embeddings=("model.embed_tokens",),
        )
        """,
    "conf/pruner/largest.yaml": "name: largest\n_target_: strange.pruning.LargestInput\npower: 1\n",
    "conf/pruner/of_each_weight.yaml": "name: of_each_weight\n_target_: strange.pruning.OfEachWeight\npower: 1\n",
    "conf/permutation/by_total.yaml": "name: by_total\n_target_: strange.permuting.ByTotal\n",
    "conf/temperature/steps.yaml": "_target_: strange.scheduling.Steps\nhigh: 1.0\n",
    "conf/reconstruction/doubled.yaml": "name: doubled\n_target_: strange.reconstructing.Doubled\n",
    "conf/calibration/poem.yaml": """
        dataset: strange.poem
        data_files: null
        samples: 4
        seqlen: 32
        batch_size: 2
        statistics: dense
        sampling: null
        """,
    "conf/model/strange.yaml": """
        # @package _global_
        defaults:
          - tiny
          - override /calibration: poem
        model:
          name: strange
          architecture:
            model_type: stablelm
        """,
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
    described = folder / "strange-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[permllm.families]\nstablelm = strange.family:FAMILY\n")
    monkeypatch.syspath_prepend(str(folder))
    families._from_a_package.cache_clear()
    yield folder
    families._from_a_package.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "strange"]:
        del sys.modules[name]


def run(*overrides: str) -> tuple[dict[str, Any], Path]:
    result = job.run(read_config(composed(SEARCH, "logger=none", *overrides)))
    assert result is not None
    return result


def test_one_of_each_kind_runs_together(package: Path, tmp_path: Path) -> None:
    register()  # as importing permllm.export does where the package is installed before
    chosen = ["pruner=largest", "permutation=by_total", "reconstruction=doubled", "evaluation.perplexity.dataset=strange.poem"]
    metrics, directory = run("model=strange", *chosen, f"run_dir={tmp_path}/run", "export=gathered")
    assert metrics["status"] == "finished"
    assert metrics["perplexity"]["sparse"].keys() == {"poem"}
    orders = load_file(directory / "permutations.safetensors")
    masks = read_masks(directory / "masks.safetensors")
    assert len(orders) == 4
    assert len(masks) == 10
    model = permllm.load(directory / "export", dtype=torch.float32)
    assert (type(model).__name__, model.config.dense_type) == ("SparseStableLmForCausalLM", "stablelm")
    dense = load_model(read_config(composed(SEARCH, "model=strange")).model, 0).model
    for name, mask in masks.items():
        layer, _, linear = name.partition(".mlp.") if ".mlp." in name else name.partition(".self_attn.")
        group = "mlp.gate_up_proj" if linear in ("gate_proj", "up_proj") else "self_attn.qkv_proj"
        perm = orders[f"{layer}.{group}"]
        assert bool((mask[:, perm].view(len(mask), -1, 4).sum(-1) == 2).all())
        # The checkpoint holds the doubled weights, in the order of the record.
        expected = (2 * dense.get_submodule(name).weight * mask)[:, perm]
        assert torch.equal(model.get_submodule(name).weight, expected)


@pytest.mark.parametrize(
    "words",
    [
        ["permutation=heuristic", "permutation.constraint=foldable", "export=folded"],
        ["export=gathered"],
        ["permutation.straight_through=hard", "permutation.loss=cosine", "permutation.conventions=paper"],
        ["permutation.straight_through=soft", "permutation.constraint=foldable", "export=folded"],
    ],
    ids=["heuristic", "swap", "hard", "soft"],
)
def test_masks_are_those_of_a_dense_score_whatever_orders_the_channels(words: list[str], package: Path) -> None:
    chosen = ["pruner=of_each_weight", "block_size=8", "compute_dtype=float32", *words]
    if not words[0].startswith("permutation=heuristic"):
        chosen += ["permutation.epochs=1", "permutation.learning_rate=0.05", "calibration.samples=6"]
    metrics, directory = run("model=tiny", *chosen, f"run_dir={package}/run")
    assert sum(metrics["moved_channels"].values()) > 0
    settings = read_config(composed(SEARCH, "model=tiny", *chosen))
    model = load_model(settings.model, 0).model
    windows = calibration_tokens(ByT5Tokenizer(extra_ids=0), settings.calibration, seed=0)
    factors = calibrate_dense(model, channel_groups(model), windows, instantiate(settings.pruner), 4).factors
    assert all(found.dense for found in factors.values())
    orders, masks = load_file(directory / "permutations.safetensors"), read_masks(directory / "masks.safetensors")
    for group in channel_groups(model):
        for path in group.members:
            score = saliency(model.get_submodule(path).weight, factors[path])
            assert torch.equal(masks[path], permuted_nm_mask(score, orders[group.name], settings.pattern))
    if settings.export.form != "none":
        assert verify(directory / "export").passed


@pytest.mark.parametrize(
    ("returned", "reason"),
    [
        ("saliency.sum(0).argsort() * 0", "some channels stand in it twice"),
        ("saliency.sum(0).argsort()[:4]", r"it is int64 \(4,\)"),
        ("saliency.sum(0).argsort().int()", r"it is int32 \(32,\)"),
        ("saliency.sum(0).argsort().tolist()", "it is a list"),
        ("None", "it is a NoneType"),
    ],
)
@pytest.mark.parametrize("local", [True, False], ids=["local", "joint"])
def test_an_order_that_is_no_permutation_is_refused(returned: str, reason: str, local: bool, package: Path) -> None:
    orders = f"{{g.name: (lambda saliency: {returned})(torch.cat([problem.saliency_of(p) for p in g.members])) "
    orders += "for g in problem.groups}"
    lines = f"def order(self, group, saliency, pattern):\n        return {returned}"
    if not local:
        lines = f"def orders(self, problem):\n        return {orders}"
    head = "import torch\n\n\nclass ByTotal:\n    constraint, learned = 'free', False\n"
    (package / "strange" / "permuting.py").write_text(f"{head}    local = {local}\n\n    {lines}\n")
    said = rf"^permutation=by_total: the order of model\.layers\.0\.self_attn\.qkv_proj must be a permutation.*{reason}"
    with pytest.raises(ConfigError, match=said):
        run("model=tiny", "permutation=by_total", f"run_dir={package}/run")


@pytest.mark.parametrize(
    ("returned", "error", "reason"),
    [
        ("SaliencyFactors(1, inputs)", ConfigError, r"\(K, 32\) and \(K, 32\).*they are column \(32,\), row None"),
        ("SaliencyFactors(1, inputs.unsqueeze(0), inputs)", ConfigError, r"column \(1, 32\), row \(32,\)"),
        ("SaliencyFactors(1, -inputs.unsqueeze(0))", ConfigError, "must not be negative"),
        ("SaliencyFactors(1, inputs.unsqueeze(0) * float('nan'))", TrainingError, "q_proj is not finite"),
        ("weight.abs()", ConfigError, "must give SaliencyFactors, and gave a "),
    ],
)
@pytest.mark.parametrize("statistics", ["dense", "sequential"])
def test_a_saliency_that_is_none_is_refused(
    returned: str, error: type[Exception], reason: str, statistics: str, package: Path
) -> None:
    file = package / "strange" / "pruning.py"
    text = file.read_text().replace("return SaliencyFactors(self.power, statistics[Largest].value.unsqueeze(0))", "RETURN")
    assert "RETURN" in text
    file.write_text(text.replace("RETURN", f"inputs = statistics[Largest].value\n        return {returned}"))
    settings = ("pruner=largest", "permutation=none", f"calibration.statistics={statistics}", f"run_dir={package}/run")
    with pytest.raises(error, match=reason):
        run("model=tiny", *settings)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("return -0.1", r"at progress=0\.0=-0\.1: expected a positive number"),
        ("return 1.0 - progress", r"at progress=1\.0=0\.0: expected a positive number"),
        ("return 'hot'", "expected a positive number"),
        ("return progress.start", "has no attribute 'start'"),
    ],
)
def test_a_schedule_that_gives_no_temperature_is_refused_before_anything_is_computed(
    line: str, reason: str, package: Path
) -> None:
    file = package / "strange" / "scheduling.py"
    file.write_text(file.read_text().replace("return self.high if progress < 0.5 else 0.2", line))
    with pytest.raises(ConfigError, match=rf"temperature: strange\.scheduling\.Steps.*{reason}"):
        run("model=tiny", "temperature=steps", "plan=true")


@pytest.mark.parametrize(
    ("module", "settings", "before", "after"),
    [
        ("scheduling", ("temperature=steps", "permutation.epochs=1"), "0.2", "0.30"),
        ("poem", ("calibration.dataset=strange.poem", "permutation=none"), "red wheel barrow", "white chicken"),
    ],
)
def test_a_run_says_that_a_module_of_its_own_was_another_one(
    module: str, settings: tuple[str, ...], before: str, after: str, package: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = ("model=tiny", *settings, f"run_dir={package}/run")
    run(*words)
    del sys.modules[f"strange.{module}"]
    code_digest.cache_clear()
    file = package / "strange" / f"{module}.py"
    file.write_text(file.read_text().replace(before, after))
    caplog.clear()
    run(*words)
    assert "was made by another version of the code" in caplog.text


def test_an_option_that_says_it_is_another_one_is_refused(package: Path, tmp_path: Path) -> None:
    (package / "strange" / "conf" / "pruner" / "copied.yaml").write_text(
        "name: wanda\n_target_: strange.pruning.LargestInput\n"
    )
    words = ("model=tiny", SEARCH, "permutation=none", "logger=none")
    found = run_command(*words, "pruner=copied", cwd=tmp_path, fresh=True, PYTHONPATH=str(package))
    assert (found.returncode, found.stderr.count("error: ")) == (1, 1)
    assert "error: pruner=copied: its `name` is wanda, which is another option" in found.stderr


def test_a_module_that_cannot_be_imported_says_why(package: Path) -> None:
    (package / "strange" / "pruning.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(ConfigError, match=r"strange\.pruning\.LargestInput.*No module named 'nowhere_to_be_found'"):
        run("model=tiny", "pruner=largest", f"run_dir={package}/run")


def test_python_finds_options_of_somebody_else(package: Path) -> None:
    config = read_config(composed("model=tiny"))
    loaded = load_model(config.model, 0)
    settings: dict[str, Any] = {"pruner": "largest", "permutation": "by_total", "searchpath": ["pkg://strange.conf"]}
    few: dict[str, Any] = {"calibration__samples": 4, "calibration__seqlen": 16}
    _, _, report = permllm.prune(
        loaded.model, loaded.tokenizer, texts=["Tyger Tyger, burning bright. " * 20], **settings, **few
    )
    assert report["name"].endswith("-largest-by_total-2x4")
    assert report["sparsity"]["violations"] == 0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("strange.nowhere:FAMILY", "the family stablelm cannot be imported from strange.nowhere:FAMILY: No module named"),
        ("strange.poem:TEXT", "the family stablelm of strange.poem:TEXT is no permllm.models.families.Family"),
    ],
)
def test_an_entry_point_that_gives_no_family_is_one_line(package: Path, entry: str, message: str) -> None:
    (package / "strange-1.0.dist-info" / "entry_points.txt").write_text(f"[permllm.families]\nstablelm = {entry}\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        families.family_named("stablelm")
    with pytest.raises(ConfigError, match=r"known are: gemma3_text, llama, mistral, opt, qwen2, qwen3, stablelm$"):
        families.family_named("unheard")
