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
from safetensors.torch import load_file

import permllm
from permllm import runner
from permllm.config import read_config
from permllm.errors import ConfigError
from permllm.export.transformers_classes import register
from permllm.models import families
from permllm.models.loading import load_model
from permllm.record.run_tensors import read_masks
from tests.test_config import composed

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
        seqlen: 32
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
    result = runner.run(read_config(composed("hydra.searchpath=[pkg://strange.conf]", "logger=none", *overrides)))
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
    dense = load_model(read_config(composed("hydra.searchpath=[pkg://strange.conf]", "model=strange")).model, 0).model
    for name, mask in masks.items():
        layer, _, linear = name.partition(".mlp.") if ".mlp." in name else name.partition(".self_attn.")
        group = "mlp.gate_up_proj" if linear in ("gate_proj", "up_proj") else "self_attn.qkv_proj"
        perm = orders[f"{layer}.{group}"]
        assert bool((mask[:, perm].view(len(mask), -1, 4).sum(-1) == 2).all())
        # The checkpoint holds the doubled weights, in the order of the record.
        expected = (2 * dense.get_submodule(name).weight * mask)[:, perm]
        assert torch.equal(model.get_submodule(name).weight, expected)


def test_a_study_of_somebody_else_is_recorded(package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics, _ = run("model=tiny", "study=answer", "seed=39", f"run_dir={tmp_path}/studied")
    assert metrics["study"] == {"answer": 42}
    assert "the answer is 42" in capsys.readouterr().out


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
