"""Every YAML composes and agrees with its class; every written command works; identity of a run."""

from __future__ import annotations

import copy
import functools
import re
import shlex
from contextlib import nullcontext
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import get_class
from omegaconf import DictConfig

from permllm.errors import ConfigError
from permllm.models.families import channel_groups
from permllm.models.load import meta_model
from permllm.pruning.methods import METHODS, methods_of
from permllm.report.read import collect
from permllm.settings.composition import check_amounts
from permllm.settings.config import RunConfig, identity_of, read_config
from permllm.settings.identity import digest_of
from permllm.settings.values import flatten
from permllm.store.tensors import save_tensors
from tests.conftest import ROOT

CONF = ROOT / "conf"
OPTIONS = sorted(path.relative_to(CONF) for path in CONF.glob("*/**/*.yaml"))


def composed(*overrides: str) -> DictConfig:
    """Compose the settings of a command line.

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


def commands_in(text: str) -> list[str]:
    """Every `python run.py ...` of a text."""
    found = re.findall(r"python run\.py[^`\n#]*", text)
    return [line.split(";")[0].split("&&")[0].strip() for line in found]


def chosen(command: str, position: int = 0) -> list[str]:
    """Words of a command; of a sweep the values at a position, each list's last one at its end."""
    words = []
    for word in shlex.split(command)[2:]:
        key, _, value = word.partition("=")
        values = value.split(",") if not value.startswith(("[", "{")) else [value]
        # A range of a search is no value.
        if key != "-m" and not re.search(r"=(tag|interval)\(", word):
            words.append(f"{key}={values[min(position, len(values) - 1)]}")
    return words


@pytest.fixture(scope="module")
def permutations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a permutation."""
    folder = tmp_path_factory.mktemp("run")
    save_tensors(folder / "permutations.safetensors", {"x": torch.arange(4)})
    return folder


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_every_option_says_what_it_is_and_its_command_composes_and_instantiates(
    option: Path, permutations: Path
) -> None:
    lines = (CONF / option).read_text(encoding="utf-8").splitlines()
    head = [line for line in lines[:6] if line.startswith("#") and "@package" not in line]
    assert len(head) >= 2
    group, _, name = str(option.with_suffix("")).partition("/")
    # A part of a protocol is chosen by the protocol.
    chooses = group if name.startswith("statistics/") else f"{group}={name}"
    commands = [line for line in commands_in("\n".join(head)) if f" {chooses}" in line]
    assert commands
    for command in commands:
        settings = config(*chosen(command.replace("runs/RUN", str(permutations))))
        methods_of(settings)
        assert group != "method" or settings.method == name
        if "experiment=" not in command and " -m " not in command:
            words = chosen(command)
            check_amounts(words, composed(*words), settings)


def test_every_command_in_the_documents_composes() -> None:
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), CONF / "config.yaml"]
    found = {line for file in files for line in commands_in(file.read_text(encoding="utf-8"))}
    assert found
    for command in sorted(found):
        if "--help" not in command:
            for position in range(max(word.count(",") for word in command.split()) + 1):
                config(*chosen(command, position))


@pytest.mark.parametrize("group", [*METHODS, "temperature"])
def test_the_yaml_of_a_method_has_all_settings_of_its_class(group: str) -> None:
    for option in (file.stem for file in (CONF / group).glob("[!_]*.yaml")):
        words = ("permutation.path=x",) if option == "from_file" else ()
        settings = getattr(config("model=tiny-random", f"{group}={option}", *words), group)
        target = settings["_target_"]
        kind = get_class(target) if target else None  # the method of an idle option is None
        names = {one.name for one in fields(kind)} if is_dataclass(kind) else set()
        if option == "lcp":  # lcp-paper alone has it
            names.remove("norm_tokens")
        assert settings.keys() - {"name", "_target_"} == names


def test_the_yaml_of_the_other_groups_has_the_defaults_of_their_classes() -> None:
    words = ("calibration=text", "evaluation=held-out", "calibration.data_files=x", "logger=wandb")
    settings = config("model=tiny-random", *words)
    named = {"name", "source", "architecture", "dataset", "data_files"}
    groups = [settings.model, settings.calibration, settings.logger, settings.export]
    groups += [settings.evaluation.lm_eval]
    for group in groups:
        own = {key: value for key, value in vars(group).items() if key in named}
        assert group == type(group)(**own)
    perplexity = settings.evaluation.perplexity
    assert perplexity.batch_tokens == type(perplexity)("x", 2).batch_tokens


# Words of a command, and some of the settings that they give. Explicit choices win over the texts
# of a model, the recipe and amounts of a protocol, and those of a budget.
CHOICES = """
model=tiny-random -> calibration.dataset: builtin, evaluation.tasks: null, permutation.steps: null
model=tiny-random calibration=c4 -> calibration.dataset: c4
model=tiny-random evaluation.tasks=[piqa] -> evaluation.tasks.piqa.limit: null
model=tiny-random protocol=paper calibration=builtin -> calibration.dataset: builtin
model=qwen2.5-7b -> calibration.dataset: c4, evaluation.perplexity.dataset: wikitext2
model=qwen2.5-7b -> calibration.samples: 128, calibration.seqlen: 1024, permutation.epochs: 3
model=qwen2.5-7b -> evaluation.perplexity.seqlen: 2048
model=MODEL protocol=paper -> calibration.dataset: c4, evaluation.perplexity.dataset: wikitext2
model=MODEL protocol=paper -> calibration.samples: 128, evaluation.perplexity.limit: null
model=MODEL protocol=paper -> permutation.name: lcp-paper, permutation.epochs: 50
model=MODEL protocol=offline -> evaluation.perplexity.dataset: [boolq-passages, sciq-support]
model=MODEL protocol=offline -> calibration.dataset: boolq-passages, permutation.name: lcp
model=MODEL protocol=offline -> permutation.epochs: 3
budget=quick protocol=paper -> permutation.name: lcp-paper, permutation.epochs: 2
model=smollm2-135m -> permutation.epochs: 2
model=smollm2-135m permutation=lcp-paper -> permutation.epochs: 50
model=smollm2-135m budget.epochs=4 -> permutation.epochs: 4
AMOUNTS permutation=lcp -> permutation.steps: 40, permutation.samples: 160
AMOUNTS method=permllm-wanda -> permutation.steps: 40, permutation.samples: 160
AMOUNTS method=lcp -> permutation.steps: 28, permutation.samples: 112
AMOUNTS permutation=lcp-paper -> permutation.steps: null, permutation.samples: null
method=deploy budget.tokens=1e6 -> reconstruction.steps: 1954, reconstruction.samples: 7813
method=deploy -> calibration.samples: 512
method=deploy calibration=c4 -> calibration.samples: 128
method=deploy budget=quick budget.calibration_windows=64 -> calibration.samples: 64
method=masks-cp budget.tokens=3e4 calibration.seqlen=100 -> mask.steps: 75, mask.samples: 300
AMOUNTS method=permllm-wanda protocol=paper -> permutation.steps: null, permutation.samples: null
AMOUNTS method=lcp-paper-short -> permutation.steps: 7, permutation.samples: null
protocol=paper -> calibration.statistics: dense
protocol=paper method=wanda-cp -> calibration.statistics: sequential
protocol=paper method=wanda -> calibration.statistics: sequential
method=wanda -> calibration.statistics: dense
protocol=paper permutation=heuristic mask=score -> calibration.statistics: dense
protocol=paper permutation=heuristic mask=refined -> calibration.statistics: dense
protocol=paper method=wanda calibration.statistics=dense -> calibration.statistics: dense
protocol=paper method=deploy -> calibration.statistics: dense
protocol=paper method=wanda allocation=sensitive -> calibration.statistics: dense
"""


@pytest.mark.parametrize(
    ("words", "given"), [line.split(" -> ") for line in CHOICES.strip().splitlines()]
)
def test_choices_give_settings_and_explicit_ones_win(words: str, given: str) -> None:
    words = words.replace(
        "AMOUNTS", "model=tiny-random budget.steps=40 budget.learning_windows=160"
    )
    for model in ("tiny", "smollm2-135m", "llama-2-7b") if "MODEL" in words else ("",):
        settings = config(*words.replace("MODEL", model).split())
        methods_of(settings)
        found = flatten(settings.resolved)
        for key, value in yaml.safe_load(f"{{{given}}}").items():
            assert found.get(key) == value


@pytest.mark.parametrize("amount", ["steps=-5", "epochs=0", "learning_windows=880.5"])
def test_an_amount_of_a_budget_is_a_count(amount: str) -> None:
    with pytest.raises(ConfigError, match=rf"^budget\.{amount.partition('=')[0]}"):
        config(f"budget.{amount}", "method=masks")


@pytest.mark.parametrize(
    ("words", "unread"),
    [
        ("budget.steps=10 budget.learning_windows=40", None),
        ("permutation=heuristic budget.steps=10", "budget.steps=10"),
        (
            "permutation=heuristic mask=score +budget.learning_windows=4",
            r"\+budget.learning_windows=4",
        ),
        ("permutation=lcp-paper budget.epochs=2", None),
        ("permutation=lcp-paper budget.steps=10", "budget.steps=10"),
        ("method=masks-folded budget.learning_windows=10", None),
        ("method=masks-folded budget.epochs=1", "budget.epochs=1"),
        ("method=masks-folded budget.steps=10 mask.steps=4", "budget.steps=10"),
        (
            "method=lcp-paper-short budget.steps=1 budget.learning_windows=1",
            "budget.learning_windows=1",
        ),
        ("calibration=c4 budget.calibration_windows=128", None),
        ("evaluation=paper budget.evaluation_windows=null", None),
        (
            "evaluation.perplexity.dataset=null budget.evaluation_windows=2",
            "budget.evaluation_windows=2",
        ),
        ("method=wanda budget=quick", None),
        ("method=deploy budget.tokens=1e6", None),
        ("method=wanda-cp budget.tokens=1e6", "budget.tokens=1e6"),
        ("method=deploy budget.tokens=1e6 budget.steps=9", "budget.steps=9"),
    ],
)
def test_an_amount_that_is_typed_and_not_read_is_refused(words: str, unread: str | None) -> None:
    typed = words.split()
    settings = composed("model=tiny-random", *typed)
    refused = nullcontext() if unread is None else pytest.raises(ConfigError, match=f"^{unread}: ")
    with refused:
        check_amounts(typed, settings, read_config(settings))


@pytest.mark.parametrize(
    ("model", "billions"),
    [("qwen2.5-0.5b", 0.494), ("qwen2.5-1.5b", 1.544), ("qwen2.5-7b", 7.616), ("qwen3-8b", 8.191),
     ("llama-2-7b", 6.738), ("llama-2-13b", 13.016), ("llama-3.2-1b", 1.236),
     ("llama-3.1-8b", 8.03),
     ("mistral-7b", 7.242), ("opt-125m", 0.125), ("opt-1.3b", 1.316), ("opt-6.7b", 6.658),
     ("smollm2-135m", 0.1345), ("gemma3-270m model.accept_terms=true", 0.2681), ("llama-7b", 6.738),
     ("llama-13b", 13.016), ("qwen2.5-coder-0.5b", 0.6302), ("qwen2.5-coder-1.5b", 1.777)],
)  # fmt: skip
def test_architectures_have_the_published_number_of_parameters(model: str, billions: float) -> None:
    built = meta_model(config(*f"model={model}".split()).model)
    found = sum(parameter.numel() for parameter in built.parameters())
    assert found / 1e9 == pytest.approx(billions, rel=2e-3)
    assert all(group.channels % 8 == 0 for group in channel_groups(built))


LEARNED = [("none", True), ("heuristic", True), ("lcp", False), ("lcp-paper", False)]
UNUSED = ("block_size=32", "temperature=cosine")


@pytest.mark.parametrize(
    ("words", "others", "same"),
    [
        ("logger=none force=true runs_dir=elsewhere", "", True),
        ("evaluation.tasks=[piqa] evaluation.perplexity.seqlen=32", "", True),
        ("seed=1", "", False),
        ("permutation.epochs=4", "", False),
        ("permutation.micro_batch_size=1 permutation.activation_checkpointing=true", "", True),
        ("permutation.compile=false", "", True),
        # Classes of this package may move. Nothing but its class names another package's method.
        ("pruner._target_=permllm.pruner.wanda.Wanda", "", True),
        ("pruner._target_=mine.Wanda", "", False),
        ("model.device=cuda", "", False),
        ("model.device=cuda", "model.device=cuda:1", True),
        ("model.terms=x model.accept_terms=true", "", True),
        ("model.base_model=some/model", "", True),
        ("keep_dense=[0,-1]", "", False),
        ("keep_dense=[0,-1]", "keep_dense=[-1,0]", True),
        ("method=wanda-cp", "permutation=heuristic", True),
        *((f"permutation={p} {word}", f"permutation={p}", same)
          for p, same in LEARNED for word in UNUSED),
    ],
)  # fmt: skip
def test_identity_is_what_changes_a_pruned_model(words: str, others: str, same: bool) -> None:
    one, other = (config("model=tiny-random", *text.split()) for text in (words, others))
    assert (one.hash == other.hash) == same


def test_defaults_that_were_written_otherwise_before_keep_the_identity() -> None:
    for words, settings in (
        ("permutation=lcp", {"select_from": 2}),
        ("permutation=lcp budget.epochs=1", {"select_from": 2}),
        ("permutation=lcp permutation.select_from=0", {"select_from": 0}),
        ("permutation=lcp-paper", {"select_from": 1}),
        ("permutation=lcp-paper permutation.norm_tokens=64", {"norm_tokens": 64}),
    ):
        identity = config("model=tiny-random", *words.split()).identity["permutation"]
        assert identity.items() >= settings.items()
        assert ("norm_tokens" in identity) == ("norm_tokens" in settings)


def test_the_place_of_a_file_makes_no_other_run(tmp_path: Path) -> None:
    hashes = []
    for name, content in (("a.txt", "one"), ("there/a.txt", "one"), ("elsewhere/a.txt", "two")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        words = ("calibration=text", f"calibration.data_files={tmp_path / name}")
        hashes.append(config(*words).hash)
    first, same, another = hashes
    assert first == same != another


def test_how_a_model_is_evaluated_has_a_digest_of_its_own(tmp_path: Path) -> None:
    base = config("model=tiny-random").evaluation_identity
    assert "tasks" not in base
    same = ["evaluation.perplexity.dataset=[builtin]", "evaluation.perplexity.batch_tokens=1"]
    batches = [*same, "evaluation.lm_eval.batch_size=1"]
    assert config("model=tiny-random", *batches).evaluation_identity == base
    asked = [["evaluation.tasks=[rte]", *more] for more in ([], ["evaluation.lm_eval.limit=2"])]
    asked += [["evaluation.tasks=[rte]", "evaluation.lm_eval.add_bos_token=false"]]
    asked += [[f"evaluation.tasks={{rte: {{{own}}}}}"] for own in ("limit: 9", "num_fewshot: 5")]
    values = ("seqlen=32", "limit=1", "dataset=boolq-passages", "dataset=null")
    asked += [[f"evaluation.perplexity.{value}"] for value in values]
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        asked.append([f"evaluation.perplexity.data_files={tmp_path / name}"])
    found = [base, *(config("model=tiny-random", *one).evaluation_identity for one in asked)]
    assert len({digest_of(evaluation) for evaluation in found}) == len(found)


def test_pins_of_wheels_are_in_no_record() -> None:
    words = ("model=gemma3-270m", "model.accept_terms=true")
    assert len(composed(*words).model.pins.wheels) == 4
    assert "pins" not in config(*words).resolved["model"]


def test_terms_must_be_accepted_and_change_no_run() -> None:
    with pytest.raises(ConfigError, match=r"model\.accept_terms=true"):
        config("model=gemma3-270m")
    accepted = config("model=gemma3-270m", "model.accept_terms=true")
    assert accepted.resolved["model"]["accept_terms"] is True
    assert config("model=gemma3-270m", "plan=true").hash == accepted.hash
    assert config("model=gemma3-270m", "model.terms=null").hash == accepted.hash


def test_bos_before_windows_is_part_of_how_a_model_is_evaluated() -> None:
    words = ("model=tiny-random", "evaluation.tasks=[rte]")
    with_bos, without = (config(*words, f"model.bos={bos}") for bos in ("true", "false"))
    usual = without.evaluation_identity
    assert with_bos.evaluation_identity["perplexity"] == usual["perplexity"] | {"bos": True}
    tasks = {"rte": usual["tasks"]["rte"] | {"add_bos_token": True}}
    assert with_bos.evaluation_identity["tasks"] == tasks
    chosen = config("model=tiny-random", "model.bos=true", "evaluation.lm_eval.add_bos_token=false")
    assert chosen.evaluation.lm_eval.add_bos_token is False


def test_a_model_of_the_hub_needs_its_name_and_gives_it_to_runs() -> None:
    with pytest.raises(ConfigError, match=r"^model=hub needs model\.hub_name=OWNER/NAME"):
        config("model=hub")
    words = ("model=hub", "model.hub_name=owner/Some-1.5B", "permutation=none")
    assert config(*words).name == "Some-1.5B-wanda-none-2x4"
    assert config("model=local", "model.path=folder/mine/").name == "mine-wanda-lcp-2x4"


def test_another_seed_joins_the_rows_of_published_records() -> None:
    rows = {}
    for run in collect([ROOT / "experiments" / "sizes" / "records.jsonl"]).runs:
        row = rows.setdefault((run.config["model"]["name"], run.config["method"]), run)
        assert run.key("seed") == row.key("seed")
    for (model, method), run in rows.items():
        words = [f"model={model}", "model.accept_terms=true", f"method={method}", "seed=7"]
        job = config("experiment=sizes", *words)
        assert replace(run, config=job.resolved).key("seed") == run.key("seed")
        assert identity_of(run.config) | {"seed": 7} == job.identity
