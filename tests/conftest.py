"""Shared pieces: random tiny models of every family, with a byte tokenizer, and a private cache."""

from __future__ import annotations

import os

os.environ["TQDM_DISABLE"] = "1"  # progress bars would drown the report of a failure

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from permllm.config import register_resolvers
from permllm.record.cache_folder import cache_directory

ROOT = Path(__file__).parent.parent

FAMILY_SETTINGS: dict[str, dict[str, object]] = {
    "llama": {"num_key_value_heads": 2},
    "mistral": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 16},
    "opt": {"ffn_dim": 64, "max_position_embeddings": 256, "word_embed_proj_dim": 32},
}


def tiny_config(family: str) -> dict[str, object]:
    """Architecture of a two-layer model with 32 and 64 channels."""
    settings: dict[str, object] = {
        "model_type": family,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 259,
        "tie_word_embeddings": False,
    }
    if family != "opt":
        settings["intermediate_size"] = 64
    return settings | FAMILY_SETTINGS[family]


def tiny_model(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A random model of `tiny_config`, with biases that are not zero."""
    settings = tiny_config(family)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings), dtype=dtype)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().requires_grad_(False)


@pytest.fixture(autouse=True, scope="session")
def _resolvers() -> None:
    register_resolvers()


@pytest.fixture(autouse=True, scope="session")
def _fresh_results(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache directory of this session alone, but for what is downloaded: kept results would hide what the code now does."""
    downloads, private = cache_directory(), tmp_path_factory.mktemp("cache")
    for name in ("wheels", "models"):
        (downloads / name).mkdir(exist_ok=True)
        (private / name).symlink_to((downloads / name).resolve())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PERMLLM_CACHE", str(private))
        yield


@pytest.fixture(autouse=True)
def _quiet_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A private cache directory for this test."""
    monkeypatch.setenv("PERMLLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def run_command(*overrides: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python run.py OVERRIDES` as a person would type it, with `cwd` as the working directory."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    variables |= {"PERMLLM_CACHE": str(cwd / "cache"), "HF_HUB_OFFLINE": "1"} | environment
    return subprocess.run(
        [sys.executable, str(ROOT / "run.py"), *overrides],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def run_module(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m MODULE ARGUMENTS`."""
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)


def script(name: str) -> ModuleType:
    """A module of scripts/."""
    specification = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module
