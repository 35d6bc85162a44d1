"""Every YAML composes and agrees with its class; every command that is written down is one that works; what makes a run."""

from __future__ import annotations

import copy
import functools
import re
import shlex
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from permllm.config import RunConfig, digest_of, read_config
from permllm.errors import ConfigError
from permllm.models.families import channel_groups
from permllm.models.load import meta_model
from permllm.pruning.composition import options_of
from permllm.pruning.methods import METHODS, methods_of
from permllm.runs.directory import run_directory
from permllm.runs.tensors import save_tensors
from permllm.sparsity.method import instantiate
from tests.conftest import ROOT

CONF = ROOT / "conf"
OPTIONS = sorted(
    path.relative_to(CONF) for path in CONF.glob("*/**/*.yaml") if path.parent.name != "hydra"
)


def composed(*overrides: str) -> DictConfig:
    """What Hydra makes of a command line.

    Folders of a test are put in afterwards: to compose takes longer than a tiny job.
    """
    folders = [word for word in overrides if word.startswith(("run_dir=/", "runs_dir=/"))]
    made = copy.deepcopy(_composed(*(word for word in overrides if word not in folders)))
    for word in folders:
        key, _, value = word.partition("=")
        made[key] = value
    return made


@functools.cache
def _composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


def config(*overrides: str) -> RunConfig:
    return read_config(composed(*overrides))


def written_commands() -> list[str]:
    """Every `python run.py ...` in the README, the other documents and the comments of the YAML files."""
    commands = []
    for file in [
        *ROOT.glob("*.md"),
        *sorted(ROOT.glob("docs/*.md")),
        *sorted(CONF.rglob("*.yaml")),
    ]:
        for line in re.findall(r"python run\.py[^`\n#]*", file.read_text(encoding="utf-8")):
            commands.append(line.split(";")[0].split("&&")[0].strip())
    return sorted(set(commands))


# Words that an option needs beside its name.
NEEDED = {
    "model/local.yaml": "model.path=.",
    "experiment/scale.yaml": "model.path=.",
    "model/gemma3-270m.yaml": "model.accept_terms=true",
    "model/hub.yaml": "model.hub_name=owner/some-model",
    "calibration/text.yaml": "calibration.data_files=some.txt",
}


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_says_what_it_is_and_its_command_composes_and_instantiates(
    option: Path, tmp_path: Path
) -> None:
    lines = (CONF / option).read_text(encoding="utf-8").splitlines()
    head = [line for line in lines[:6] if line.startswith("#") and "@package" not in line]
    assert len(head) >= 2
    words = ["=".join(str(option.with_suffix("")).split("/", 1))]
    assert any(words[0] in line for line in head if "python run.py" in line)
    words += [NEEDED[str(option)]] if str(option) in NEEDED else []
    if option.stem == "from_file":
        save_tensors(tmp_path / "permutations.safetensors", {"x": torch.arange(4)})
        words.append(f"permutation.path={tmp_path}")
    methods_of(config(*words))


def defaults_of(kind: type) -> dict[str, Any]:
    """Defaults of a class of settings, and of those inside of it."""
    found: dict[str, Any] = {}
    for one in fields(kind):
        if one.default is not MISSING:
            found[one.name] = one.default
        elif one.default_factory is not MISSING:
            made = one.default_factory()
            found[one.name] = defaults_of(type(made)) if is_dataclass(made) else made
    return found


OF_CLASSES = [
    (group, option) for group in (*METHODS, "temperature") for option in options_of()[group][1]
]


@pytest.mark.parametrize(
    ("group", "option"), [one for one in OF_CLASSES if one[1] not in ("from_file", "lcp-paper")]
)
def test_the_yaml_of_a_method_has_all_of_its_settings_with_the_defaults_of_its_class(
    group: str, option: str
) -> None:
    settings = dict(getattr(config("model=tiny", f"{group}={option}"), group))
    kind = type(instantiate(group, settings))
    written = {
        key: value
        for key, value in settings.items()
        if key not in ("name", "_target_", "block_size", "temperature")
    }
    assert written == (defaults_of(kind) if is_dataclass(kind) else {})


def test_the_yaml_of_the_other_groups_has_the_defaults_of_their_classes() -> None:
    written = composed(
        "model=tiny",
        "calibration=text",
        "evaluation=held-out",
        "calibration.data_files=x",
        "logger=wandb",
    )
    settings = read_config(written)
    chosen = {"name", "source", "architecture", "dataset", "data_files", "sampling"}
    for group in ("model", "calibration", "logger", "export", "paths"):
        usual = defaults_of(type(getattr(settings, group)))
        assert {key: written[group][key] for key in usual.keys() - chosen} == {
            key: usual[key] for key in usual.keys() - chosen
        }
    lm_eval = settings.evaluation.lm_eval
    assert vars(lm_eval) == defaults_of(type(lm_eval))
    assert (
        settings.evaluation.perplexity.batch_tokens
        == defaults_of(type(settings.evaluation.perplexity))["batch_tokens"]
    )


@pytest.mark.parametrize("command", written_commands())
def test_every_written_command_composes(command: str) -> None:
    arguments = [word for word in shlex.split(command)[2:] if word not in ("-m", "--multirun")]
    if "--help" in arguments:
        return
    # A range of a search is no value.
    arguments = [word for word in arguments if not re.search(r"=(tag|interval)\(", word)]
    # A sweep composes each of its values.
    for position in range(max(len(word.split(",")) for word in [*arguments, ""])):
        chosen = []
        for word in arguments:
            key, _, value = word.partition("=")
            values = value.split(",") if not value.startswith(("[", "{")) else [value]
            chosen.append(f"{key}={values[min(position, len(values) - 1)]}")
        config(*chosen)


def test_the_defaults_are_those_of_the_readme() -> None:
    settings = config()
    names = (
        settings.model.name,
        settings.pruner["name"],
        settings.permutation["name"],
        settings.temperature["name"],
    )
    assert names == ("smollm2-135m", "wanda", "lcp", "linear")
    assert settings.sparsity == "2:4"
    assert settings.block_size == settings.permutation["block_size"] == 64
    assert (
        settings.calibration.dataset == settings.evaluation.perplexity.dataset == "boolq-passages"
    )
    assert settings.logger.name == "auto"


def test_models_choose_their_texts_and_explicit_choices_win() -> None:
    hub = config("model=qwen2.5-7b")
    assert (hub.calibration.dataset, hub.evaluation.perplexity.dataset) == ("c4", "wikitext2")
    assert (hub.evaluation.perplexity.seqlen, hub.calibration.samples, hub.calibration.seqlen) == (
        2048,
        128,
        1024,
    )
    tiny = config("model=tiny")
    assert (tiny.calibration.dataset, tiny.evaluation.tasks) == ("builtin", {})
    chosen = config("model=tiny", "calibration=c4", "evaluation.tasks=[piqa]")
    assert (chosen.calibration.dataset, list(chosen.evaluation.tasks)) == ("c4", ["piqa"])
    assert (
        config("model=tiny", "protocol=paper", "calibration=builtin").calibration.dataset
        == "builtin"
    )


def test_a_protocol_is_recipe_texts_and_amounts_and_a_method_or_a_budget_wins() -> None:
    for model in ("tiny", "smollm2-135m", "llama-2-7b"):
        paper, offline = (
            config(f"model={model}", f"protocol={name}") for name in ("paper", "offline")
        )
        assert (paper.calibration.dataset, paper.evaluation.perplexity.dataset) == (
            "c4",
            "wikitext2",
        )
        assert (
            offline.calibration.dataset == offline.evaluation.perplexity.dataset == "boolq-passages"
        )
    assert (
        paper.permutation["name"],
        paper.permutation["epochs"],
        paper.calibration.statistics,
    ) == ("lcp-paper", 50, "dense")
    assert (
        paper.calibration.samples,
        paper.calibration.seqlen,
        paper.evaluation.perplexity.limit,
    ) == (128, 1024, None)
    assert (offline.permutation["name"], offline.permutation["epochs"]) == ("lcp", 3)
    assert (
        config("budget=quick", "protocol=paper").permutation.items()
        >= {"name": "lcp-paper", "epochs": 2}.items()
    )
    for words, statistics in ((["protocol=paper"], "sequential"), ([], "dense")):
        baseline = config(*words, "method=wanda-cp")
        assert (baseline.permutation["name"], baseline.calibration.statistics) == (
            "heuristic",
            statistics,
        )
    for mask in ("score", "refined"):  # which are found with the dense model's
        masks = config("protocol=paper", "permutation=heuristic", f"mask={mask}")
        assert masks.calibration.statistics == "dense"
        methods_of(masks)


def test_a_run_keeps_the_method_that_was_typed_and_is_the_same_run_without_it() -> None:
    typed, settings = config("method=wanda-cp"), config("permutation=heuristic")
    assert (typed.resolved["method"], settings.resolved["method"]) == ("wanda-cp", None)
    assert typed.hash == settings.hash
    for file in sorted(CONF.glob("method/**/*.yaml")):
        name = str(file.relative_to(CONF / "method").with_suffix(""))
        assert config(f"method={name}").method == name


def test_one_gpu_is_as_good_as_another() -> None:
    one, other, cpu = (
        config("model=tiny", f"model.device={device}") for device in ("cuda", "cuda:1", "cpu")
    )
    assert run_directory(other) == run_directory(one) != run_directory(cpu)


@pytest.mark.parametrize(
    ("model", "billions"),
    [("qwen2.5-0.5b", 0.494), ("qwen2.5-1.5b", 1.544), ("qwen2.5-7b", 7.616), ("qwen3-8b", 8.191), ("llama-2-7b", 6.738),
     ("llama-2-13b", 13.016), ("llama-3.2-1b", 1.236), ("llama-3.1-8b", 8.030), ("mistral-7b", 7.242), ("opt-125m", 0.125),
     ("opt-1.3b", 1.316), ("opt-6.7b", 6.658), ("smollm2-135m", 0.1345), ("gemma3-270m", 0.2681), ("llama-7b", 6.738),
     ("llama-13b", 13.016)],
)  # fmt: skip
def test_architectures_have_the_published_number_of_parameters(model: str, billions: float) -> None:
    built = meta_model(config(f"model={model}", "plan=true").model)
    assert sum(parameter.numel() for parameter in built.parameters()) / 1e9 == pytest.approx(
        billions, rel=2e-3
    )
    assert all(group.channels % 8 == 0 for group in channel_groups(built))


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (
            "logger=none force=true runs_dir=elsewhere paths.runs_dir=there paths.cache_dir=/scratch",
            True,
        ),
        ("evaluation.tasks=[piqa] evaluation.perplexity.seqlen=32", True),
        ("seed=1", False),
        ("permutation.epochs=4", False),
        # Classes of this package may move. A class of another package stays, because no other
        # setting names it.
        ("pruner._target_=permllm.pruning.wanda.Wanda", True),
        ("temperature._target_=permllm.permutation.temperature.Linear", True),
        ("pruner._target_=mine.Wanda", False),
    ],
)
def test_identity_is_what_changes_a_pruned_model(words: str, same: bool) -> None:
    assert (config("model=tiny", *words.split()).hash == config("model=tiny").hash) == same


def test_a_folder_of_runs_is_named_twice() -> None:
    assert config("model=tiny", "paths.runs_dir=elsewhere").runs_dir == "elsewhere"
    assert config("model=tiny", "paths.runs_dir=elsewhere", "runs_dir=here").runs_dir == "here"


@pytest.mark.parametrize("permutation", ["none", "heuristic", "lcp", "lcp-paper"])
def test_what_a_method_does_not_use_is_no_part_of_the_identity(permutation: str) -> None:
    learned = permutation.startswith("lcp")
    base = config("model=tiny", f"permutation={permutation}")
    for other in ("block_size=32", "temperature=cosine", "temperature.end=0.2"):
        assert (
            config("model=tiny", f"permutation={permutation}", other).hash != base.hash
        ) == learned
    assert ("block_size" in base.identity) == ("temperature" in base.identity) == learned


def test_a_method_is_given_the_settings_at_the_top_that_it_uses() -> None:
    method = methods_of(config("block_size=16", "temperature=cosine")).permutation
    assert (method.block_size, type(method.temperature).__name__) == (16, "Cosine")


def test_how_a_model_is_evaluated_has_a_digest_of_its_own(tmp_path: Path) -> None:
    base = config("model=tiny").evaluation_identity
    batches = ["evaluation.perplexity.batch_tokens=1", "evaluation.lm_eval.batch_size=1"]
    assert config("model=tiny", *batches).evaluation_identity == base
    asked = [["evaluation.tasks=[rte]", *more] for more in ([], ["evaluation.lm_eval.limit=2"])]
    asked += [["evaluation.tasks=[rte]", "evaluation.lm_eval.add_bos_token=false"]]
    values = ("seqlen=32", "limit=1", "dataset=boolq-passages", "dataset=null")
    asked += [[f"evaluation.perplexity.{value}"] for value in values]
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        asked.append([f"evaluation.perplexity.data_files={tmp_path / name}"])
    digests = [
        digest_of(evaluation)
        for evaluation in (base, *(config("model=tiny", *one).evaluation_identity for one in asked))
    ]
    assert len(set(digests)) == len(digests)


def test_terms_must_be_accepted_and_change_no_run() -> None:
    said = r"^model=gemma3-270m .* read https://ai\.google\.dev/gemma/terms, and type model\.accept_terms=true"
    with pytest.raises(ConfigError, match=said):
        config("model=gemma3-270m")
    accepted = config("model=gemma3-270m", "model.accept_terms=true")
    assert accepted.resolved["model"]["accept_terms"] is True
    assert config("model=gemma3-270m", "plan=true").hash == accepted.hash
    assert config("model=gemma3-270m", "model.terms=null").hash == accepted.hash


def test_bos_before_windows_is_part_of_how_a_model_is_evaluated() -> None:
    tasks = "evaluation.tasks=[rte]"
    with_bos, without = (
        config("model=tiny", f"model.bos={bos}", tasks) for bos in ("true", "false")
    )
    assert with_bos.evaluation_identity["perplexity"] == without.evaluation_identity[
        "perplexity"
    ] | {"bos": True}
    how, usual = (one.evaluation_identity["tasks"]["rte"] for one in (with_bos, without))
    assert how == usual | {"add_bos_token": True}
    chosen = config("model=tiny", "model.bos=true", "evaluation.lm_eval.add_bos_token=false")
    assert chosen.evaluation.lm_eval.add_bos_token is False


@pytest.mark.parametrize(
    ("option", "sampling"),
    [("c4", "documents"), ("pile", "documents"), ("wikitext2", "overlapping")],
)
def test_an_option_of_calibration_says_how_the_papers_code_draws_windows(
    option: str, sampling: str
) -> None:
    chosen = config("model=tiny", f"calibration={option}")
    assert chosen.identity["calibration"]["sampling"] == sampling
    # By its name alone a text is drawn from as the chosen option says.
    named = config("model=tiny", f"calibration.dataset={option}")
    assert named.calibration.sampling == "disjoint"
    assert (
        config(
            "model=tiny", f"calibration={option}", "calibration.sampling=null"
        ).calibration.sampling
        == "disjoint"
    )


def test_held_out_texts_are_an_evaluation_of_the_same_run() -> None:
    held_out, small = (config(f"evaluation={option}") for option in ("held-out", "small"))
    assert held_out.evaluation.perplexity.names == ["boolq-passages", "wikitext2", "sciq-support"]
    assert held_out.hash == small.hash
    assert [
        job.evaluation.perplexity.limit
        for job in (held_out, config("evaluation=held-out", "budget=quick"))
    ] == [32, 32]
    alone = config("evaluation=small", "evaluation.perplexity.dataset=[boolq-passages]")
    assert alone.evaluation_identity == small.evaluation_identity


def test_a_model_of_the_hub_by_its_name_alone_names_the_run() -> None:
    settings = config("model=hub", "model.hub_name=owner/Some-Model-1.5B", "permutation=none")
    assert settings.name == "Some-Model-1.5B-wanda-none-2x4"
    assert settings.model.architecture == {}
    assert config("model=qwen2.5-0.5b", "model.architecture=null").model.architecture == {}
    with pytest.raises(ConfigError, match=r"^model=hub needs model\.hub_name=OWNER/NAME"):
        config("model=hub")
