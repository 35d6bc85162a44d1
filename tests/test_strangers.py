"""One new thing of each kind in a package of somebody else's: modules, YAMLs, an entry point, no file of this repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from safetensors.torch import load_file

from permllm.errors import ConfigError
from permllm.models import families
from permllm.record.files import read_json
from permllm.record.run_tensors import read_masks
from permllm.record.schema import Metrics
from tests.conftest import ROOT

FILES = {
    # A statistic, and the pruner that asks for it.
    "pruning.py": """
        from dataclasses import dataclass

        import torch

        from permllm.calibration.saliency import SaliencyFactors
        from permllm.calibration.statistics.base import InputStatistic


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

        from permllm.reconstruction.base import NoReconstruction


        @dataclass(frozen=True)
        class Doubled(NoReconstruction):
            changes_weights = True

            def linear(self, pruned):
                return 2 * pruned.weight
        """,
    "studying.py": """
        from dataclasses import dataclass
        from typing import ClassVar

        from typing_extensions import TypedDict


        class Found(TypedDict):
            answer: int


        @dataclass(frozen=True)
        class Answer:
            question: str
            form: ClassVar[type] = Found

            def measure(self, inputs):
                return {"answer": len(self.question) + inputs.config.seed}

            def lines(self, results):
                return [f"the answer is {results['answer']}"]

            def draw(self, results, axes):
                axes.plot([results["answer"]])
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
    "conf/permutation/by_total.yaml": "name: by_total\n_target_: strange.permuting.ByTotal\n",
    "conf/reconstruction/doubled.yaml": "name: doubled\n_target_: strange.reconstructing.Doubled\n",
    "conf/calibration/poem.yaml": """
        dataset: strange.poem
        data_files: null
        samples: 4
        length: 32
        batch_size: 2
        statistics: dense
        sampling: null
        """,
    "conf/study/answer.yaml": """
        # @package _global_
        name: answer
        study:
          _target_: strange.studying.Answer
          question: why
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


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to put onto the path, as an installed package would be."""
    folder = tmp_path_factory.mktemp("site")
    for name, content in FILES.items():
        file = folder / "strange" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(content))
    (folder / "strange" / "__init__.py").touch()
    described = folder / "strange-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text("[permllm.families]\nstablelm = strange.family:FAMILY\n")
    return folder


def python(package: Path, *words: str) -> str:
    environment = os.environ | {"PYTHONPATH": f"{package}:{ROOT}", "PERMLLM_CACHE": str(package / "cache")}
    result = subprocess.run(
        [sys.executable, *words], cwd=package, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_one_of_each_kind_runs_together(package: Path) -> None:
    chosen = ["pruner=largest", "permutation=by_total", "reconstruction=doubled", "evaluation.perplexity.dataset=strange.poem"]
    here = ["hydra.searchpath=[pkg://strange.conf]", "logger=none", "run_dir=run", "export=gathered"]
    python(package, str(ROOT / "run.py"), "model=strange", *chosen, *here)
    metrics = read_json(package / "run" / "metrics.json", Metrics)
    assert metrics["status"] == "finished"
    assert metrics["perplexity"]["sparse"].keys() == {"poem"}
    orders = load_file(package / "run" / "permutations.safetensors")
    masks = read_masks(package / "run" / "masks.safetensors")
    assert len(orders) == 4
    assert len(masks) == 10
    for name, mask in masks.items():
        layer, _, linear = name.partition(".mlp.") if ".mlp." in name else name.partition(".self_attn.")
        group = "mlp.gate_up_proj" if linear in ("gate_proj", "up_proj") else "self_attn.qkv_proj"
        ordered = mask[:, orders[f"{layer}.{group}"]]
        assert bool((ordered.view(len(mask), -1, 4).sum(-1) == 2).all())
    # The doubled weights are those of the record and of the checkpoint.
    show = "import permllm, sys; model = permllm.load('run/export'); print(type(model).__name__, model.config.dense_type)"
    assert python(package, "-c", show) == "SparseStableLmForCausalLM stablelm\n"


def test_a_study_of_somebody_else_is_recorded(package: Path) -> None:
    words = ["model=tiny", "study=answer", "seed=39", "hydra.searchpath=[pkg://strange.conf]", "run_dir=studied"]
    assert "the answer is 42" in python(package, str(ROOT / "run.py"), *words)
    assert read_json(package / "studied" / "metrics.json", Metrics)["study"] == {"answer": 42}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("strange.nowhere:FAMILY", "the family stablelm cannot be imported from strange.nowhere:FAMILY: No module named"),
        ("strange.poem:TEXT", "the family stablelm of strange.poem:TEXT is no permllm.models.families.Family"),
    ],
)
def test_an_entry_point_that_gives_no_family_is_one_line(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, message: str
) -> None:
    shutil.copytree(package, tmp_path / "site")
    (tmp_path / "site" / "strange-1.0.dist-info" / "entry_points.txt").write_text(f"[permllm.families]\nstablelm = {entry}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    families._from_a_package.cache_clear()
    with pytest.raises(ConfigError, match=re.escape(message)):
        families.family_named("stablelm")
    with pytest.raises(ConfigError, match=r"known are: llama, mistral, opt, qwen2, qwen3, stablelm$"):
        families.family_named("unheard")
