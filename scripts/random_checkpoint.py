"""Writer of a checkpoint with random weights, with one file of tensors in memory at a time.

    python scripts/random_checkpoint.py DIR model=llama-2-13b model.dtype=bfloat16
    python scripts/random_checkpoint.py DIR model=qwen2.5-7b model.architecture.num_hidden_layers=4

The checkpoint serves to measure time and memory of large models, not quality. Its tokenizer has a
token for each byte. `model=local model.path=FOLDER` loads it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from permllm.export.write import write_shards  # noqa: E402
from permllm.models.checkpoint import parameter_names  # noqa: E402
from permllm.models.load import meta_model  # noqa: E402
from permllm.settings.composition import composed  # noqa: E402
from permllm.settings.config import ModelConfig, read_config  # noqa: E402


def random_tensor(name: str, like: Tensor, deviation: float) -> Tensor:
    """Return a random tensor: normal values for a matrix, ones for a norm, zeros for a bias.

    Args:
        name: name of the tensor, which determines its values.
        like: tensor of the same shape and dtype; may be on the meta device.
        deviation: standard deviation of a matrix.
    """
    if like.dim() < 2:
        return torch.full(like.shape, 0.0 if name.endswith("bias") else 1.0, dtype=like.dtype)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
    generator = torch.Generator().manual_seed(seed)
    return torch.empty(like.shape, dtype=like.dtype).normal_(std=deviation, generator=generator)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token for each byte, which all tokenizer classes can read."""
    tokenizer = Tokenizer(
        models.BPE(
            {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}, []
        )
    )
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def write_random(folder: Path, model: ModelConfig, shard_gb: float) -> None:
    """Write a checkpoint with random weights.

    Args:
        folder: folder to write, new or empty.
        model: settings with the architecture and dtype.
        shard_gb: largest size of a file, in 10^9 bytes, unless a single tensor is larger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty")
    skeleton = meta_model(model)
    state = skeleton.state_dict()
    planned = {name: state[name] for name in parameter_names(skeleton)}
    deviation = float(getattr(skeleton.config, "initializer_range", 0.02))
    write_shards(
        folder,
        planned,
        lambda name: random_tensor(name, planned[name], deviation),
        int(shard_gb * 1e9),
    )
    skeleton.config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


def main() -> None:
    """Write the checkpoint that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings, as for run.py")
    parser.add_argument("--shard-gb", type=float, default=5.0, help="largest size of a file, in GB")
    options = parser.parse_args()
    config = read_config(composed(options.overrides))
    write_random(options.folder, config.model, options.shard_gb)
    print(f"{options.folder}: {config.model.name}, {config.model.dtype}, random weights")


if __name__ == "__main__":
    main()
