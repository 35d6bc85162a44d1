"""`permllm.prune` and `permllm.save`: a model in memory is pruned and written as the command does it."""

from __future__ import annotations

import copy
import json
import random
import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch.nn.utils import parametrizations
from transformers import AutoModelForCausalLM, ByT5Tokenizer, PreTrainedModel

import permllm
from permllm.config import read_config
from permllm.errors import ConfigError, DataError
from permllm.export.verify import verify
from permllm.job import run
from permllm.models.families import linear_at
from permllm.runs.tensors import load_masks, load_orders
from tests.conftest import ROOT, run_python, tiny_model

TEXT = (ROOT / "permllm" / "data" / "builtin.txt").read_text(encoding="utf-8")
FEW = {"calibration__samples": 8, "calibration__seqlen": 16}
WINDOWS = torch.full((2, 16), 7)
SMALL = FEW | {"permutation__epochs": 1, "block_size": 16}


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def tokenizer() -> ByT5Tokenizer:
    return ByT5Tokenizer(extra_ids=0, bos_token="<unk>")


@pytest.mark.parametrize(
    ("pruner", "permutation", "extra"),
    [
        ("wanda", "lcp", {}),
        ("ria", "heuristic", {"permutation__constraint": "foldable"}),
        ("sparsegpt", "none", {"sparsity": "4:8", "seed": 3, "model__bos": True}),
        ("wanda", "heuristic", {"mask": "score", "mask__learning_rate": 0.1}),
    ],
)
def test_it_finds_what_the_command_finds(
    pruner: str,
    permutation: str,
    extra: dict[str, Any],
    model: PreTrainedModel,
    tokenizer: ByT5Tokenizer,
    tmp_path: Path,
) -> None:
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    settings = SMALL | {"calibration__samples": 8} | extra
    if permutation != "lcp":
        settings.pop("permutation__epochs")
    words = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    words += [
        f"pruner={pruner}",
        f"permutation={permutation}",
        "model=local",
        f"model.path={tmp_path / 'dense'}",
    ]
    words += [
        "model.dtype=float32",
        "calibration=text",
        f"calibration.data_files={tmp_path / 'text.txt'}",
        "logger=none",
    ]
    words += ["evaluation=builtin", f"run_dir={tmp_path / 'run'}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        result = run(read_config(compose("config", overrides=words)))
    assert result is not None
    metrics, _ = result

    found = permllm.prune(
        model, tokenizer, pruner=pruner, permutation=permutation, texts=[TEXT], **settings
    )

    orders = load_orders(tmp_path / "run" / "permutations.safetensors")
    assert orders.keys() == found.orders.keys()
    assert all(torch.equal(order, found.orders[name]) for name, order in orders.items())
    masks = load_masks(tmp_path / "run" / "masks.safetensors")
    assert all(torch.equal(masks[path], mask) for path, mask in found.masks.items())
    for key in ("sparsity", "retained_saliency", "output_error", "moved_channels", "compute_dtype"):
        assert found.report[key] == metrics[key]
    assert found.report["sparsity"]["violations"] == 0
    assert len(found.report["history"]) == (permutation == "lcp" or "mask" in extra)
    for path, mask in found.masks.items():
        assert not linear_at(model, path).weight[~mask].any()


def test_layers_stay_dense_and_modules_have_patterns_of_their_own(
    model: PreTrainedModel, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    before = copy.deepcopy(model)
    settings: dict[str, Any] = FEW | {
        "keep_dense": [0],
        "sparsity_of": {"down_proj": "4:8"},
        "permutation": "heuristic",
    }
    found = permllm.prune(
        model, tokenizer, texts=[TEXT], permutation__constraint="foldable", **settings
    )
    assert all(path.startswith("model.layers.1.") for path in found.masks)
    for name, parameter in model.named_parameters():
        assert name.removesuffix(".weight") in found.masks or torch.equal(
            parameter, before.get_parameter(name)
        )
    permllm.save(model, tmp_path / "out")
    report = verify(tmp_path / "out")
    assert report.passed, report.problems
    assert len(report.dense) == 7
    assert [layer.pattern for layer in report.layers] == ["4:8", *["2:4"] * 6]
    with pytest.raises(
        ConfigError, match="keep_dense: the model has no layer 5; valid are -2 to 1"
    ):
        permllm.prune(before, tokenizer, texts=[TEXT], keep_dense=[5], **FEW)


def test_texts_may_be_tokens_or_a_name(model: PreTrainedModel, tokenizer: ByT5Tokenizer) -> None:
    tokens = torch.randint(0, 256, (4, 16), generator=torch.Generator().manual_seed(0))
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    first = permllm.prune(one, tokenizer, texts=tokens, permutation="none")
    second = permllm.prune(other, tokenizer, texts=tokens, permutation="none")
    assert all(torch.equal(mask, second.masks[path]) for path, mask in first.masks.items())
    named = permllm.prune(
        model, tokenizer, texts="builtin", permutation="none", calibration__samples=2
    )
    assert named.report["sparsity"]["fraction"] == 0.5


def test_the_caller_finds_everything_else_as_it_was(
    model: PreTrainedModel, tokenizer: ByT5Tokenizer
) -> None:
    model.train().requires_grad_(True)
    model.model.layers[0].eval()
    left = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = left[name]
    own = model.model.layers[1].forward
    model.model.layers[1].forward = patched = partial(own)
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = (
        random.Random(1).random(),
        np.random.RandomState(1).rand(),
        torch.rand(1, generator=torch.manual_seed(1)),
    )
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        theirs = GlobalHydra.instance().hydra
        permllm.prune(model, tokenizer, texts=[TEXT], **SMALL)
        assert GlobalHydra.instance().hydra is theirs
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected
    assert model.training
    assert not model.model.layers[0].training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(
        parameter.grad is left[name] and bool((left[name] == 1).all())
        for name, parameter in model.named_parameters()
    )
    assert model.model.layers[1].forward is patched


def test_gradients_that_were_left_are_no_part_of_what_is_found(tokenizer: ByT5Tokenizer) -> None:
    found = []
    for left in (False, True):
        model = tiny_model("llama")
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 3.0) if left else None
        permllm.prune(
            model, tokenizer, texts=[TEXT], permutation="none", reconstruction="distill", **FEW
        )
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_gradients_may_be_switched_off(tokenizer: ByT5Tokenizer) -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    with torch.inference_mode():
        found = permllm.prune(model, tokenizer, texts=[TEXT], **SMALL)
    expected = permllm.prune(other, tokenizer, texts=[TEXT], **SMALL)
    assert all(torch.equal(order, expected.orders[name]) for name, order in found.orders.items())


def test_tokens_and_windows_that_the_model_does_not_know_are_one_line(
    model: PreTrainedModel, tokenizer: ByT5Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer.add_tokens(["<new>"])
    line = "texts: there is a token 259, and the model knows 259 from 0 on: is it its tokenizer?"
    for call in (
        lambda: permllm.prune(model, tokenizer, texts=["<new>" * 400], permutation="none", **FEW),
        lambda: permllm.perplexity(model, tokenizer, ["<new>" * 400], window=16),
    ):
        with pytest.raises(DataError, match=re.escape(line)):
            call()
    model.config.max_position_embeddings = 8
    permllm.perplexity(model, tokenizer, [TEXT], window=16)
    assert "texts: windows of 16 tokens, and the model has positions for 8" in caplog.text
    learned = tiny_model("opt")
    longer = learned.config.max_position_embeddings + 1
    with pytest.raises(
        DataError, match=f"windows of {longer} tokens, and the model has positions for {longer - 1}"
    ):
        permllm.perplexity(learned, tokenizer, [TEXT * 10], window=longer)


class Rounded(torch.nn.Linear):
    """As a quantised linear, which is one by its class and computes otherwise."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.round())


def test_a_quantised_linear_is_named(model: PreTrainedModel, tokenizer: ByT5Tokenizer) -> None:
    model.model.layers[0].mlp.down_proj.__class__ = Rounded
    with pytest.raises(
        ConfigError, match="down_proj is a Rounded, not a Linear of floats: quantised or adapted"
    ):
        permllm.prune(model, tokenizer, texts=[TEXT], permutation="none", **FEW)


def test_what_names_other_weights_or_code_does_not_go_into_an_export(
    model: PreTrainedModel, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    """A model that came from GGUF says so although its weights are unpacked; remote code is none of an export."""
    permllm.prune(model, tokenizer, texts=[TEXT], permutation="none", **FEW)
    model.config.quantization_config = {"quant_method": "gguf"}
    model.config.auto_map = {"AutoConfig": "configuration_x.XConfig"}
    permllm.save(model, tmp_path / "out", form="simulate")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not {"quantization_config", "auto_map"} & written.keys()
    assert model.config.auto_map
    assert (
        AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", trust_remote_code=True
        ).config.model_type
        == "llama"
    )


@pytest.mark.parametrize("form", ["folded", "gathered"])
def test_what_is_saved_computes_what_the_model_computes(
    form: str, model: PreTrainedModel, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    constraint = {"permutation__constraint": "foldable"} if form == "folded" else {}
    permllm.prune(model, tokenizer, texts=[TEXT], permutation="heuristic", **FEW, **constraint)
    summary = permllm.save(model, tmp_path / "out", form=form)
    assert summary["form"] == form
    report = verify(tmp_path / "out")
    assert report.passed, report.problems
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))
    opened = [permllm.load(tmp_path / "out")]
    if form == "folded":
        opened.append(AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval())
    with torch.no_grad():
        for one in opened:
            torch.testing.assert_close(
                one(tokens).logits, model(tokens).logits, rtol=1e-4, atol=1e-4
            )
    assert "pruned to 2:4" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_weights_that_were_trained_afterwards_are_saved_under_the_masks(
    model: PreTrainedModel, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    found = permllm.prune(model, tokenizer, texts=[TEXT], permutation="none", **FEW)
    path = next(iter(found.masks))
    linear_at(model, path).weight.data += 1.0
    permllm.save(model, tmp_path / "out", form="simulate")
    saved = linear_at(permllm.load(tmp_path / "out"), path).weight
    assert torch.equal(saved, torch.where(found.masks[path], linear_at(model, path).weight, 0.0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pruner": "wandaa"}, "pruner/wandaa"),
        ({"sparsity": "4:2"}, "4:2"),
        ({"permutation__epoch": 3}, "permutation.epoch=3: "),
        ({"sede": 1}, "sede=1: "),
        ({"permutation__learning_rate": -1.0}, "learning_rate"),
        ({"model__dtype": "float16"}, "model.dtype=float16: permllm.prune takes only settings"),
        ({"texts": torch.zeros(3)}, "texts: expected int64 tokens (samples, seqlen)"),
        (
            {"texts": WINDOWS, "reconstruction": "distill", "reconstruction__samples": 3},
            "texts has 2 windows of tokens",
        ),
        (
            {"texts": WINDOWS, "calibration__seqlen": 7},
            "calibration__seqlen: texts are windows of tokens, and are",
        ),
        ({"texts": "nowhere"}, "texts='nowhere': expected a list of documents, or one of"),
        ({"texts": []}, "texts: expected at least one document"),
        ({"texts": [1, 2]}, "texts: expected at least one document, a str each"),
        ({"texts": torch.full((2, 16), 100_000)}, "texts: expected tokens from 0 to "),
    ],
)
def test_bad_settings_are_one_line(
    settings: dict[str, Any], message: str, model: PreTrainedModel, tokenizer: ByT5Tokenizer
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ConfigError) as error:
        permllm.prune(model, tokenizer, **({"texts": [TEXT]} | settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_too_little_text_says_how_much_is_needed_and_costs_no_random_number(
    model: PreTrainedModel, tokenizer: ByT5Tokenizer
) -> None:
    random.seed(1)
    np.random.seed(1)
    with pytest.raises(DataError, match="need"):
        permllm.prune(model, tokenizer, texts=["short"])
    assert (random.random(), np.random.rand()) == (
        random.Random(1).random(),
        np.random.RandomState(1).rand(),
    )


def test_a_model_without_weights_is_one_line(
    model: PreTrainedModel, tokenizer: ByT5Tokenizer
) -> None:
    with pytest.raises(
        ConfigError, match="its weights in the memory of one device, and they are on meta"
    ):
        permllm.prune(model.to("meta"), tokenizer, texts=[TEXT], **FEW)


def test_what_is_no_model_with_a_head_is_one_line(
    model: PreTrainedModel, tokenizer: ByT5Tokenizer
) -> None:
    for given in (model.model, torch.nn.Sequential(model)):
        with pytest.raises(
            ConfigError,
            match=r"^model: expected one that AutoModelForCausalLM gave, with its head, and it is",
        ):
            permllm.prune(given, tokenizer, texts=[TEXT], **FEW)


def test_tokens_need_no_tokenizer(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokenizer: only texts that are tokens need none"):
        permllm.prune(model, None, texts=[TEXT], **FEW)
    permllm.prune(
        model, None, texts=WINDOWS, permutation="heuristic", permutation__constraint="foldable"
    )
    permllm.save(model, tmp_path / "out")
    assert verify(tmp_path / "out").passed
    assert permllm.load(tmp_path / "out").config.model_type == "llama"


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([TEXT], {"window": 1}, "window=1: expected a whole number of at least 2"),
        ([TEXT], {"limit": 0}, "limit=0: expected a whole number of at least 1"),
        ([], {}, "texts: expected at least one document, a str each"),
        (
            WINDOWS,
            {"window": 8},
            "window=8: texts are windows of 16 tokens, and are taken as they are",
        ),
    ],
)
def test_what_perplexity_cannot_be_measured_on_is_one_line(
    texts: Any,
    settings: dict[str, Any],
    message: str,
    model: PreTrainedModel,
    tokenizer: ByT5Tokenizer,
) -> None:
    with pytest.raises(ConfigError) as error:
        permllm.perplexity(model, tokenizer, texts, **settings)
    assert message in str(error.value)


@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_is_that_of_the_formula(bos: bool, tokenizer: ByT5Tokenizer) -> None:
    model = tiny_model("llama", dtype=torch.float64)
    tokens = torch.tensor(
        tokenizer(TEXT[:200] + "\n\n" + TEXT[200:500], add_special_tokens=not bos)["input_ids"]
    )
    piece = 32 - bos
    windows = tokens[: 5 * piece].view(5, piece)
    if bos:
        windows = torch.cat([torch.full((5, 1), tokenizer.bos_token_id), windows], dim=1)
    with torch.no_grad():
        logs = model(windows).logits[:, :-1].log_softmax(-1).gather(2, windows[:, 1:, None])
    expected = float(logs.mean().neg().exp())
    documents = [TEXT[:200], TEXT[200:500]]
    found = permllm.perplexity(
        model, tokenizer, documents, window=32, limit=5, bos=bos, batch_tokens=64
    )
    assert found == pytest.approx(expected, rel=1e-6)  # the logarithms are taken in float32
    assert permllm.perplexity(model, None, windows) == pytest.approx(expected, rel=1e-6)


def test_perplexity_of_a_text_by_its_name(
    cache: Path, model: PreTrainedModel, tokenizer: ByT5Tokenizer
) -> None:
    assert permllm.perplexity(model, tokenizer, "builtin", window=64) > 1
    with pytest.raises(
        ConfigError, match=r"evaluation\.perplexity\.dataset='poem' is not valid; valid are"
    ):
        permllm.perplexity(model, tokenizer, "poem")
    with pytest.raises(DataError, match="fewer than one"):
        permllm.perplexity(model, tokenizer, ["short"])


def test_a_model_that_was_pruned_in_part_is_not_saved(
    model: PreTrainedModel,
    tokenizer: ByT5Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    permllm.prune(model, tokenizer, texts=[TEXT], permutation="none", **FEW)

    def broken(*_: object) -> None:
        raise DataError("no second layer")

    monkeypatch.setattr("permllm.pruning.stages._figures", broken)
    with pytest.raises(DataError, match="no second layer"):
        permllm.prune(model, tokenizer, texts=[TEXT], permutation="heuristic", **FEW)
    with pytest.raises(ConfigError, match=r"permllm\.prune has pruned"):
        permllm.save(model, tmp_path / "out", form="simulate")


def test_a_model_that_was_not_pruned_is_not_saved(model: PreTrainedModel, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"permllm\.prune has pruned"):
        permllm.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_head_of_its_own_is_written_though_the_config_ties_it(
    tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(2 * model.model.embed_tokens.weight.flip(0))
    permllm.prune(
        model,
        tokenizer,
        texts=[TEXT],
        permutation="heuristic",
        permutation__constraint="foldable",
        **FEW,
    )
    permllm.save(model, tmp_path / "out")
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=WINDOWS).logits
        torch.testing.assert_close(found, model(input_ids=WINDOWS).logits, rtol=1e-4, atol=1e-5)


def test_a_tensor_that_no_config_makes_is_said(
    model: PreTrainedModel, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    permllm.prune(model, tokenizer, texts=[TEXT], permutation="none", **FEW)
    model.model.layers[0].mlp.down_proj.bias = torch.nn.Parameter(torch.ones(32))
    with pytest.raises(
        ConfigError, match=r"model\.layers\.0\.mlp\.down_proj\.bias is \(32,\) and none"
    ):
        permllm.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_are_saved_in_the_format_that_they_have(
    tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    _, masks, _ = permllm.prune(model, tokenizer, texts=[TEXT], permutation="none", **FEW)
    model.float()
    path = next(iter(masks))
    weight = linear_at(model, path).weight
    weight.data = torch.where(
        masks[path], weight.data * (1 + 2**-12), 0.0
    )  # as training would, in float32
    assert permllm.save(model, tmp_path / "out")["dtype"] == "float32"
    assert torch.equal(linear_at(permllm.load(tmp_path / "out"), path).weight, weight)


def test_what_is_loaded_takes_the_options_of_transformers_and_is_not_pruned_again(
    model: PreTrainedModel, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    permllm.prune(
        model,
        tokenizer,
        texts=[TEXT],
        permutation="heuristic",
        permutation__constraint="foldable",
        **FEW,
    )
    permllm.save(model, tmp_path / "out", form="gathered")
    kept = permllm.load(tmp_path / "out", attn_implementation="eager")
    assert kept.config._attn_implementation == "eager"
    assert permllm.perplexity(kept, None, WINDOWS) == pytest.approx(
        permllm.perplexity(model, None, WINDOWS), rel=1e-5
    )
    with pytest.raises(
        ConfigError, match="is a gathered checkpoint of a pruned model: give the dense one"
    ):
        permllm.prune(permllm.load(tmp_path / "out"), tokenizer, texts=[TEXT], **FEW)
    with pytest.raises(DataError, match="nowhere is no folder"):
        permllm.load(tmp_path / "nowhere")


def test_generation_settings_that_transformers_does_not_save_are_one_line(
    model: PreTrainedModel, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    permllm.prune(model, tokenizer, texts=[TEXT], permutation="none", **FEW)
    model.generation_config.temperature = 0.5
    with pytest.raises(
        ConfigError, match=r"model\.generation_config cannot be saved by transformers: "
    ):
        permllm.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for size in ("5GB", float("inf"), 0):
        with pytest.raises(ConfigError, match=r"export\.shard_gb="):
            permllm.save(model, tmp_path / "out", shard_gb=size)


def test_free_orders_do_not_fold(
    model: PreTrainedModel, tokenizer: ByT5Tokenizer, tmp_path: Path
) -> None:
    permllm.prune(model, tokenizer, texts=[TEXT], permutation="heuristic", **FEW)
    with pytest.raises(ConfigError, match="foldable"):
        permllm.save(model, tmp_path / "out")


@pytest.mark.parametrize("document", ["README.md", "docs/checkpoints.md"])
def test_the_lines_of_the_documents_work(
    document: str,
    model: PreTrainedModel,
    tokenizer: ByT5Tokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As they stand, with a text that is as small as the model."""
    (lines,) = re.findall(
        r"```python\n(import permllm\n.*?)```",
        (ROOT / document).read_text(encoding="utf-8"),
        re.DOTALL,
    )
    assert len([line for line in lines.splitlines() if line]) <= 6
    monkeypatch.setattr(permllm, "prune", partial(permllm.prune, **SMALL), raising=False)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {"model": model, "tokenizer": tokenizer, "documents": [TEXT]}
    exec(lines, found)
    assert found["report"]["sparsity"]["violations"] == 0
    assert found["orders"].keys() == found["report"]["retained_saliency"].keys()
    assert verify(tmp_path / "my-model").passed


class Adapted(torch.nn.Module):
    """What an adapter puts in the place of a linear."""

    def __init__(self, linear: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = linear

    def forward(self, x: torch.Tensor) -> Any:
        return self.base_layer(x)


def weight_norm(model: PreTrainedModel) -> None:
    parametrizations.weight_norm(linear_at(model, "model.layers.0.mlp.down_proj"))


def own_forward(model: PreTrainedModel) -> None:
    linear = linear_at(model, "model.layers.0.mlp.down_proj")
    linear.forward = partial(torch.nn.functional.linear, weight=2 * linear.weight)  # type: ignore[method-assign]


def adapted_head(model: PreTrainedModel) -> None:
    model.lm_head = Adapted(model.lm_head)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            weight_norm,
            "mlp.down_proj is a ParametrizedLinear, whose weight is computed from others, not a Linear of floats",
        ),
        (
            own_forward,
            "mlp.down_proj is a Linear with a forward of its own, not a Linear of floats",
        ),
        (adapted_head, "its head is a Adapted that is no plain Linear"),
    ],
)
def test_what_computes_otherwise_than_its_weight_says_is_refused(
    change: Any, message: str, model: PreTrainedModel, tokenizer: ByT5Tokenizer
) -> None:
    change(model)
    with pytest.raises(ConfigError, match=message):
        permllm.prune(model, None, texts=WINDOWS, permutation="none")


def test_a_model_that_asks_for_gradient_checkpointing_is_pruned_like_another(
    model: PreTrainedModel,
) -> None:
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable()
    other.enable_input_require_grads()
    other.config.return_dict = False
    settings = {"permutation": "lcp", "permutation__epochs": 1, "block_size": 16}
    ours, theirs = (permllm.prune(one, None, texts=WINDOWS, **settings) for one in (model, other))
    assert all(torch.equal(order, theirs.orders[name]) for name, order in ours.orders.items())
    assert other.model.layers[0].gradient_checkpointing


def test_a_second_call_may_not_forget_what_the_first_has_pruned(model: PreTrainedModel) -> None:
    permllm.prune(model, None, texts=WINDOWS, permutation="none", keep_dense=["mlp"])
    with pytest.raises(
        ConfigError, match=r"an earlier call has pruned model\.layers\.0\.self_attn\.k_proj"
    ):
        permllm.prune(model, None, texts=WINDOWS, permutation="none", keep_dense=["self_attn"])
    permllm.prune(model, None, texts=WINDOWS, permutation="none")


def test_weights_of_several_formats_are_not_rounded_unasked(tmp_path: Path) -> None:
    model = tiny_model("llama")
    permllm.prune(model, None, texts=WINDOWS, permutation="none")
    model.model.embed_tokens.bfloat16()
    with pytest.raises(ConfigError, match="weights are in bfloat16 and float32: `dtype` says"):
        permllm.save(model, tmp_path / "out")
    permllm.save(model, tmp_path / "out", dtype="float32")
    assert torch.equal(permllm.load(tmp_path / "out").lm_head.weight, model.lm_head.weight)


def test_what_is_gathered_can_be_trained_and_pickled(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    permllm.prune(model, None, texts=WINDOWS, permutation="heuristic")
    permllm.save(model, tmp_path / "out", form="gathered")
    loaded = permllm.load(tmp_path / "out", local_files_only=True, trust_remote_code=False)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    torch.save(loaded, tmp_path / "whole.pt")
    code = "import sys, torch, permllm; found = [permllm.load(sys.argv[1]), torch.load(sys.argv[2], weights_only=False)]\n"
    code += "print(*(type(model).__name__ for model in found))"
    again = run_python("-c", code, str(tmp_path / "out"), str(tmp_path / "whole.pt"), fresh=True)
    assert again.stdout.split() == ["SparseLlamaForCausalLM"] * 2, again.stderr
    with pytest.raises(ConfigError, match="output_loading_info"):
        permllm.load(tmp_path / "out", output_loading_info=True)


def test_the_working_directory_is_not_replaced(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    permllm.prune(model, None, texts=WINDOWS, permutation="none")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="is the working directory, which cannot be replaced"):
        permllm.save(model, ".")


def test_a_tokenizers_name_is_none(model: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="expected one that AutoTokenizer gave"):
        permllm.prune(model, "gpt2", texts=["a"])  # type: ignore[arg-type]
