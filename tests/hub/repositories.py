"""Repositories for the hub on loopback: real names and layouts, little text, tiny models."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
import zstandard
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM

from permllm.data.texts import TEXTS
from tests.conftest import FAMILY_SETTINGS, tiny_config

GLUE, WIKITEXT = "nyu-mll/glue", "wikitext-2-raw-v1"


def model_name(family: str) -> str:
    return f"small/{family.replace('_', '-')}"


def write_repositories(root: Path) -> None:
    """Write a model of each family, the texts of the hub, and the data of the task rte."""
    for family in FAMILY_SETTINGS:
        write_model(root / "models" / model_name(family), family)
    paragraphs = [line for line in TEXTS["builtin"].evaluation().splitlines() if line]
    # Some shorter than a window, most longer.
    documents = ["short", *("\n".join(paragraphs[n : n + 3]) for n in range(len(paragraphs)))]
    rows = [{"text": text, "timestamp": "2019-04-25T12:57:54Z"} for text in documents]
    lines = [json.dumps(row) + "\n" for row in rows]
    data = root / "datasets"
    c4, wikitext = data / "allenai" / "c4", data / "Salesforce" / "wikitext"
    pile, glue = data / "mit-han-lab" / "pile-val-backup", data / GLUE
    for folder in (c4 / "en", wikitext / WIKITEXT, pile, glue / "rte"):
        folder.mkdir(parents=True)
    for file in ("train.00000-of-01024", "train.00001-of-01024", "validation.00000-of-00008"):
        content = lines[::2] if "validation" in file else lines
        (c4 / "en" / f"c4-{file}.json.gz").write_bytes(gzip.compress("".join(content).encode()))
    (pile / "val.jsonl.zst").write_bytes(zstandard.compress("".join(lines).encode()))
    card = "---\nconfigs:\n- config_name: rte\n  data_files:\n"
    pairs = [{"sentence1": one, "sentence2": one, "label": 1, "idx": 0} for one in paragraphs]
    for split in ("train", "test", "validation"):
        name, texts = f"{split}-00000-of-00001.parquet", [f" = {split} = \n", "", *paragraphs]
        Dataset.from_dict({"text": texts}).to_parquet(wikitext / WIKITEXT / name)
        Dataset.from_list(pairs).to_parquet(glue / "rte" / name)
        card += f"  - split: {split}\n    path: rte/{split}-*\n"
    (glue / "README.md").write_text(f"{card}---\n")


def write_model(folder: Path, family: str, seed: int = 0) -> None:
    """Write a random model in shards, with a tokenizer of bytes that puts BOS before a text.

    OPT has its weights as .bin alone and no tokenizer.json, as on the hub.
    """
    folder.mkdir(parents=True, exist_ok=True)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    ids = {f"{name}_id": number for number, name in enumerate(special)}
    settings = tiny_config(family) | ids
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    alphabet = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: number for number, token in enumerate(alphabet)}
    named: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"} | special
    if family == "opt":
        for file in folder.glob("model*"):
            file.unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "vocab.json").write_text(json.dumps(vocabulary))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        named |= {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}
    else:
        tokenizer = Tokenizer(models.BPE(vocabulary, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        bos = ("<s>", vocabulary["<s>"])
        tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
        tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    # The makers' own files, which nobody needs.
    (folder / "consolidated.safetensors").write_bytes(bytes(5000))
    (folder / "original").mkdir(exist_ok=True)
    (folder / "original" / "params.json").write_text("{}")
