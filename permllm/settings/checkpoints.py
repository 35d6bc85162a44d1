"""Files of a checkpoint in a folder that transformers reads."""

import json
from pathlib import Path

from permllm.errors import DataError

# Index of several files, and name of a single file, in the order in which transformers looks.
WEIGHT_FILES = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
# Patterns of the names of a tokenizer's files.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
# Patterns of the names of all files of a model but its weights.
MODEL_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)


def weight_files(folder: Path) -> list[Path]:
    """Return the files from which transformers reads the weights of a folder.

    Raises:
        DataError: the folder has no weights, or its index is damaged.
    """
    for index, single in WEIGHT_FILES:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            return [folder / name for name in indexed_files(folder / index)]
    raise DataError(f"{folder} has no weights: {' or '.join(single for _, single in WEIGHT_FILES)}")


def indexed_files(index: Path) -> list[str]:
    """Return the names of the files in an index of weights; all lie in the index's folder."""
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        if names and all(Path(name).name == name for name in names):
            return names
    except (ValueError, KeyError, AttributeError, TypeError):
        pass
    raise DataError(f"{index}: weight_map: expected a file name of this folder for each tensor")
