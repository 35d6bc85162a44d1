"""GGUF files, converted once into transformers folders with float32 weights."""

import logging
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from permllm.errors import DataError, first_line
from permllm.models.checkpoint import skeleton_like
from permllm.store.cache import cache_directory
from permllm.store.files import file_sha256, new_folder

log = logging.getLogger(__name__)


def gguf_folder(file: Path) -> Path:
    """Return a transformers folder of a GGUF file, which is converted once.

    Raises DataError if transformers cannot convert the file, or the disk is full.
    """
    name = f"gguf-{file_sha256(file)[:12]}"
    folder = cache_directory() / "models" / name
    with FileLock(cache_directory() / f"{name}.lock"):
        if not folder.is_dir():
            with new_folder(folder) as target, TemporaryDirectory(dir=target) as scratch:
                # transformers looks for other files beside it, which may be of another model.
                (Path(scratch) / "model.gguf").symlink_to(file.absolute())
                try:
                    convert_gguf(Path(scratch) / "model.gguf", target)
                except (ImportError, KeyError, ValueError) as error:
                    raise DataError(
                        f"{file}: transformers cannot convert it: {first_line(error)}"
                    ) from error
    return folder


def convert_gguf(file: Path, target: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into a folder.

    Raises ValueError if the file lacks weights, which transformers would draw at random.
    """
    of_class: Any = AutoModelForCausalLM
    loaded, loading = of_class.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"it lacks {missing[0]}")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers does not save a model from GGUF, so its tensors move into a fresh model.
    fresh = skeleton_like(loaded)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)


def quantisation(file: Path) -> str:
    """Return the dtypes of a GGUF file's tensors, with the number of weights in each."""
    weights: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    return ", ".join(f"{count / 1e6:.1f}M in {name}" for name, count in weights.most_common())
