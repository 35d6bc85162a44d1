"""The tensors of a dense model, one at a time, without building the model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from permllm.config import ModelConfig
from permllm.models.checkpoint import check_checkpoint, parameter_names, tensor_places, weight_files
from permllm.models.loading import dense_folder, folder_identity, generation_of, load_model, meta_model
from permllm.record.tensor_file import read_tensor

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "spiece.model",
)


class TensorReader(Protocol):
    """Reads one tensor of the model's state dict by its name."""

    def __call__(self, name: str) -> Tensor:
        """The tensor, on the host, in the dtype of the file."""


@dataclass(frozen=True)
class DenseSource:
    """A dense model from which a pruned one is made.

    Attributes:
        skeleton: the model on the meta device.
        save_tokenizer: writes what belongs to the tokenizer into a folder, as it is.
        generation: its generation settings.
        identity: as in `LoadedModel`.
        read: one tensor at a time.
    """

    skeleton: PreTrainedModel
    save_tokenizer: Callable[[Path], Any]
    generation: GenerationConfig
    identity: str
    read: TensorReader


def dense_source(config: ModelConfig, seed: int) -> DenseSource:
    """Open the dense model that the settings name.

    A checkpoint whose safetensors files hold the tensors under the names of the model's own state dict is read tensor by
    tensor; any other (and a random model) is loaded as a whole.

    Raises:
        DataError: it cannot be had, or its files hold another model than its config says.
    """
    folder = dense_folder(config)
    if folder is not None:
        skeleton = meta_model(config, folder)
        read = _files(folder, set(parameter_names(skeleton)))
        if read is not None:
            copy = partial(_copy_tokenizer, folder)
            return DenseSource(skeleton, copy, generation_of(skeleton, folder), folder_identity(config, folder), read)
    loaded = load_model(replace(config, placement="device", device="cpu"), seed)  # whose weights are all there to be read
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(loaded.model.config, dtype=loaded.model.dtype)
    state = loaded.model.state_dict()
    generation = loaded.model.generation_config
    assert generation is not None
    save = loaded.tokenizer.save_pretrained
    return DenseSource(skeleton, save, generation, loaded.identity, lambda name: state[name].cpu())


def _files(folder: Path, wanted: set[str]) -> TensorReader | None:
    check_checkpoint(folder)
    files = weight_files(folder)
    where = tensor_places(files) if files[0].suffix == ".safetensors" else {}
    if not wanted <= where.keys():
        return None

    def read(name: str) -> Tensor:
        return read_tensor(where[name][0], name)

    return read


def _copy_tokenizer(source: Path, target: Path) -> None:
    for pattern in _TOKENIZER_FILES:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)
