"""GGUF files, converted once into transformers folders with float32 weights."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from gguf import GGUFReader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from permllm.models.checkpoint import skeleton_like, transformers_reads
from permllm.runtime.files import cache_directory, cache_lock, input_sha256
from permllm.store.files import new_folder

log = logging.getLogger(__name__)


def gguf_folder(file: Path) -> Path:
    """Return a transformers folder of a GGUF file, which is converted once.

    Raises DataError if the file cannot be converted, or the disk is full.
    """
    name = f"gguf-{input_sha256(file)[:12]}"
    folder = cache_directory() / "models" / name
    with cache_lock(name):
        if not folder.is_dir():
            with new_folder(folder) as target, _alone(file) as linked:
                convert_gguf(linked, target)
    return folder


def gguf_config(file: Path) -> PreTrainedConfig:
    """Read the config of the model in a GGUF file, without its weights.

    Raises DataError if transformers cannot read it.
    """
    with _alone(file) as linked:
        return AutoConfig.from_pretrained(linked.parent, gguf_file=linked.name)


@contextmanager
def _alone(file: Path) -> Iterator[Path]:
    """Yield a link to a file in a folder of its own, and turn errors into a DataError.

    transformers looks for other files beside a GGUF file, which may be of another model.
    """
    with TemporaryDirectory() as folder, transformers_reads(file):
        linked = Path(folder) / "model.gguf"
        linked.symlink_to(file.absolute())
        yield linked


def convert_gguf(file: Path, target: Path) -> None:
    """Write the model and the tokenizer of a GGUF file into a folder.

    Raises ValueError if the file lacks weights, which transformers would draw at random, or has
    others or scales of rotary positions, which transformers would leave out.
    """
    reader = GGUFReader(file)
    names = [tensor.name for tensor in reader.tensors] + list(reader.fields)
    for name in names:
        if name.startswith(("rope_freqs", "rope_factors")) or name.endswith(".rope.scaling.factor"):
            raise ValueError(f"{name}: it does not read scaled positions from GGUF files")
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    weights = sum(int(tensor.n_elements) for tensor in reader.tensors)
    if weights != loaded.num_parameters():
        raise ValueError(
            f"the file has {weights} weights, and the model {loaded.num_parameters()}: the file "
            f"lacks tensors, or it does not read all of a {loaded.config.model_type}'s"
        )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers does not save a model from GGUF, so its tensors move into a fresh model.
    fresh = skeleton_like(loaded)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)
