"""Repositories for the hub on loopback: real names and layouts, little text, tiny models."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch
import zstandard
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM

from permllm.data.texts import TEXTS
from tests.conftest import tiny_config


def write_data(data: Path) -> None:
    """Write the texts of the hub, and the data of the task rte, into a folder of data sets."""
    paragraphs = [line for line in TEXTS["builtin"].evaluation().splitlines() if line]
    lines = [json.dumps({"text": "\n".join(paragraphs[n : n + 3])}) + "\n" for n in range(20)]
    content = "".join(lines).encode()
    for name, compressed in {
        "allenai/c4/en/c4-train.00000-of-01024.json.gz": gzip.compress(content),
        "allenai/c4/en/c4-train.00001-of-01024.json.gz": gzip.compress(content),
        "mit-han-lab/pile-val-backup/val.jsonl.zst": zstandard.compress(content),
    }.items():
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).write_bytes(compressed)
    pairs = [{"sentence1": one, "sentence2": one, "label": 1, "idx": 0} for one in paragraphs]
    card = "---\nconfigs:\n- config_name: rte\n  data_files:\n"
    for split in ("train", "test", "validation"):
        file = f"{split}-00000-of-00001.parquet"
        wikitext = Dataset.from_dict({"text": [f" = {split} = \n", "", *paragraphs]})
        wikitext.to_parquet(data / "Salesforce/wikitext/wikitext-2-raw-v1" / file)
        Dataset.from_list(pairs).to_parquet(data / "nyu-mll/glue/rte" / file)
        card += f"  - split: {split}\n    path: rte/{split}-*\n"
    (data / "nyu-mll/glue/README.md").write_text(f"{card}---\n")


def write_model(folder: Path, family: str) -> None:
    """Write a random model in shards, with a tokenizer of bytes that puts BOS before a text."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    ids = {f"{name}_id": number for number, name in enumerate(special)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(**tiny_config(family) | ids)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB")
    alphabet = [*special.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bos = ("<s>", ids["bos_token_id"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast"} | special
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    (folder / "consolidated.safetensors").write_bytes(bytes(5000))  # which nobody needs
