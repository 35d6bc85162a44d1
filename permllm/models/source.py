"""Dense model from which a pruned model is written, one tensor at a time."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from permllm.models.checkpoint import check_checkpoint, skeleton_like, tensor_reader
from permllm.models.load import dense_folder, folder_identity, load_model
from permllm.models.offload import ReadTensor
from permllm.settings.checkpoints import TOKENIZER_FILES
from permllm.settings.config import ModelConfig


@dataclass(frozen=True)
class DenseSource:
    """Dense model from which a pruned model is made.

    Attributes:
        skeleton: the model on the meta device, with its generation settings.
        save_tokenizer: function that writes the tokenizer's files into a folder.
        identity: as in `LoadedModel`.
        read: function that returns a tensor by its name, on the host, in the model's dtype.
    """

    skeleton: PreTrainedModel
    save_tokenizer: Callable[[Path], Any]
    identity: str
    read: ReadTensor


def dense_source(config: ModelConfig, seed: int) -> DenseSource:
    """Open the dense model that the settings name.

    A checkpoint is read tensor by tensor if its safetensors files have the names of the model's
    state dict. Any other model, such as a random one, is loaded as a whole.

    Raises:
        DataError: the model cannot be downloaded, or its files and its config do not agree.
    """
    folder = dense_folder(config)
    if folder is not None:
        skeleton = check_checkpoint(folder)
        read = tensor_reader(folder, skeleton, getattr(torch, config.dtype))
        if read is not None:
            return DenseSource(
                skeleton,
                partial(_copy_tokenizer, folder),
                folder_identity(config, folder),
                # Copied, because the tensor would keep the file in memory.
                lambda name: read(name).clone(),
            )
    loaded = load_model(replace(config, placement="device", device="cpu"), seed)
    state = loaded.model.state_dict()
    return DenseSource(
        skeleton_like(loaded.model),
        loaded.tokenizer.save_pretrained,
        loaded.identity,
        lambda name: state[name].cpu(),
    )


def _copy_tokenizer(source: Path, target: Path) -> None:
    for pattern in TOKENIZER_FILES:
        for file in source.glob(pattern):
            if file.is_file():
                shutil.copyfile(file, target / file.name)
