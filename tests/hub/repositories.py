"""A small folder of repositories for the hub on loopback: real names, layouts, schemas and READMEs, random tiny models.

All text is the package's own. What matters to the clients is as on the hub: OPT has weights as .bin
alone, its safetensors in the bot's pull request, and no tokenizer.json; LLaMA comes in shards, with
the maker's own files beside; C4 has more files than are read; the Pile is compressed with
zstandard; the READMEs of data sets say what their files are.
"""

from __future__ import annotations

import gzip
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pyarrow
import torch
from datasets import Dataset
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForCausalLM

from permllm.data.texts import TEXTS
from tests.conftest import tiny_config

VOCABULARY = 400
BUILTIN = TEXTS["builtin"]
MODELS = {
    "llama": "huggyllama/llama-7b",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "qwen2": "Qwen/Qwen2.5-0.5B",
    "qwen3": "Qwen/Qwen3-8B",
    "opt": "facebook/opt-125m",
}
_ARCHITECTURES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "opt": "OPT",
}
_SPACE = "▁"


def write_repositories(root: Path) -> None:
    """Write them all."""
    order = random.Random(0)
    paragraphs = [line for line in BUILTIN.evaluation().splitlines() if line]
    sentences = [sentence for line in paragraphs for sentence in line.split(". ") if sentence]
    for family, name in MODELS.items():
        write_model(root / "models" / name, family)
    _write_opt_as_on_the_hub(root / "models" / MODELS["opt"])
    _write_texts(root / "datasets", paragraphs, sentences, order)
    _write_tasks(root / "datasets", sentences, order)


def write_model(folder: Path, family: str, seed: int = 0) -> None:
    """A random model of a family with a tokenizer of its kind."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text("---\nlicense: other\n---\n")
    settings = tiny_config(family) | {
        "vocab_size": VOCABULARY,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    settings |= {"max_position_embeddings": 512}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="40KB" if family == "llama" else "5GB")
    architecture = {
        "architectures": [f"{_ARCHITECTURES[family]}ForCausalLM"],
        "torch_dtype": "bfloat16",
    }
    _write_json(folder / "config.json", settings | architecture)
    if family == "llama":
        (folder / "consolidated.safetensors").write_bytes(bytes(50_000))
        (folder / "original").mkdir(exist_ok=True)
        (folder / "original" / "params.json").write_text("{}")
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    if family == "opt":
        _write_gpt2_tokenizer(folder)
    elif family in ("llama", "mistral"):
        llama_tokenizer(folder)
    else:
        _write_qwen_tokenizer(folder)


def llama_tokenizer(folder: Path) -> None:
    """LLaMA 2's kind: sentencepiece's spaces, bytes as a fallback, one BOS before the text."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(_SPACE, " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # Sentencepiece keeps words apart while it learns; without a pre-tokenizer whole sentences would
    # become tokens.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{_SPACE}[^{_SPACE}]*"), "isolated")
    _train(
        tokenizer,
        trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False),
    )
    saved = json.loads(tokenizer.to_str())
    bos: dict[str, Any] = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text: dict[str, Any] = {"Sequence": {"id": "A", "type_id": 0}}
    pair: dict[str, Any] = {"Sequence": {"id": "B", "type_id": 1}}
    saved |= {
        "pre_tokenizer": None,
        "added_tokens": saved["added_tokens"][:3],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, text],
            "pair": [bos, text, bos, pair],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
    }
    _write_json(folder / "tokenizer.json", saved)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "legacy": False,
            "tokenizer_class": "LlamaTokenizer",
        },
    )


def _write_gpt2_tokenizer(folder: Path) -> None:
    tokenizer = _byte_bpe(["<pad>", "<s>", "</s>", "<unk>"])
    model = json.loads(tokenizer.to_str())["model"]
    _write_json(folder / "vocab.json", model["vocab"])
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    _write_json(folder / "special_tokens_map.json", special)
    _write_json(
        folder / "tokenizer_config.json",
        special
        | {
            "errors": "replace",
            "add_prefix_space": False,
            "add_bos_token": True,
            "tokenizer_class": "GPT2Tokenizer",
        },
    )


def _write_qwen_tokenizer(folder: Path) -> None:
    tokenizer = _byte_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "bos_token": None,
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "Qwen2Tokenizer",
            "unk_token": None,
        },
    )


def _byte_bpe(special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    _train(tokenizer, trainer)
    return tokenizer


def _train(tokenizer: Tokenizer, trainer: Any) -> None:
    tokenizer.train_from_iterator([BUILTIN.evaluation()], trainer)


def _write_opt_as_on_the_hub(folder: Path) -> None:
    pull = folder.with_name(f"{folder.name}@refs%2Fpr%2F49")
    shutil.copytree(folder, pull)
    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


def _write_texts(
    root: Path, paragraphs: list[str], sentences: list[str], order: random.Random
) -> None:
    def document() -> str:
        """Some shorter than a window, most longer, as web pages are."""
        return (
            "\n".join(order.choice(paragraphs) for _ in range(order.randint(0, 4)))
            or order.choice(sentences)[:20]
        )

    def lines(count: int) -> bytes:
        rows = (
            {"text": document(), "timestamp": "2019-04-25T12:57:54Z", "url": f"https://a.org/{i}"}
            for i in range(count)
        )
        return "".join(json.dumps(row) + "\n" for row in rows).encode()

    c4 = _dataset(
        root / "allenai" / "c4",
        {"en": {split: f"en/c4-{split}.*.json.gz" for split in ("train", "validation")}},
    )
    (c4 / "en").mkdir()
    for file, count in (
        ("c4-train.00000-of-01024", 120),
        ("c4-train.00001-of-01024", 3),
        ("c4-validation.00000-of-00008", 60),
        ("c4-validation.00001-of-00008", 3),
    ):
        (c4 / "en" / f"{file}.json.gz").write_bytes(gzip.compress(lines(count)))

    name = "wikitext-2-raw-v1"
    splits = ("test", "train", "validation")
    wikitext = _dataset(
        root / "Salesforce" / "wikitext", {name: {split: f"{name}/{split}-*" for split in splits}}
    )
    (wikitext / name).mkdir()
    for split in splits:
        rows = [
            row
            for part in range(12)
            for row in ("", f" = Part {part} of {split} = \n", f" {order.choice(paragraphs)}\n")
        ]
        _parquet(rows, wikitext / name / f"{split}-00000-of-00001.parquet")

    pile = _dataset(root / "mit-han-lab" / "pile-val-backup", {})
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        rows = [{"text": document(), "meta": {"pile_set_name": "Pile-CC"}} for _ in range(80)]
        stream.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    (pile / "val.jsonl.zst").write_bytes(buffer.getvalue().to_pybytes())


def _write_tasks(root: Path, sentences: list[str], order: random.Random) -> None:
    """Data sets as lm-eval's task files name them: repository, configuration, folder, splits and a row."""

    def sentence() -> str:
        return order.choice(sentences)

    def options(labels: str) -> dict[str, list[str]]:
        return {"text": [sentence() for _ in labels], "label": list(labels)}

    def arc() -> dict[str, Any]:
        return {
            "id": "x",
            "question": f"{sentence()}?",
            "choices": options("ABCD"),
            "answerKey": order.choice("ABCD"),
        }

    tasks = (
        ("Rowan/hellaswag", "default", "data", lambda: {
            "ind": 0, "activity_label": "Reading", "ctx_a": sentence(), "ctx_b": "they", "ctx": sentence(),
            "endings": [sentence() for _ in range(4)], "label": order.choice("0123"),
        }),
        ("allenai/ai2_arc", "ARC-Easy", "ARC-Easy", arc),
        ("allenai/ai2_arc", "ARC-Challenge", "ARC-Challenge", arc),
        ("allenai/openbookqa", "main", "main", lambda: {
            "id": "x", "question_stem": sentence(), "choices": options("ABCD"), "answerKey": order.choice("ABCD"),
        }),
        ("nyu-mll/glue", "rte", "rte", lambda: {
            "sentence1": sentence(), "sentence2": sentence(), "label": order.randint(0, 1), "idx": 0,
        }),
        ("baber/piqa", "default", "data", lambda: {
            "goal": sentence(), "sol1": sentence(), "sol2": sentence(), "label": order.randint(0, 1),
        }),
        ("allenai/winogrande", "winogrande_xl", "winogrande_xl", lambda: {
            "sentence": f"The net was smaller than the page because _ had {sentence()}", "option1": "net", "option2": "page",
            "answer": order.choice("12"),
        }),
        ("aps/super_glue", "boolq", "boolq", lambda: {
            "question": sentence(), "passage": sentence(), "idx": 0, "label": order.randint(0, 1),
        }),
    )  # fmt: skip
    splits = ("train", "validation", "test")
    for name in dict.fromkeys(task[0] for task in tasks):
        configs = {
            config: {split: f"{under}/{split}-*" for split in splits}
            for one, config, under, _ in tasks
            if one == name
        }
        folder = _dataset(root / name, configs)
        for _, _, under, row in (task for task in tasks if task[0] == name):
            (folder / under).mkdir()
            for split in splits:
                table = Dataset.from_list([row() for _ in range(6)])
                table.to_parquet(folder / under / f"{split}-00000-of-00001.parquet")


def _dataset(folder: Path, configs: dict[str, dict[str, str]]) -> Path:
    """A data set whose README says which files its configurations have."""
    folder.mkdir(parents=True)
    readme = "---\nlicense: other\n" + ("configs:\n" if configs else "")
    for config, files in configs.items():
        readme += f"- config_name: {config}\n  data_files:\n"
        readme += "".join(
            f"  - split: {split}\n    path: {path}\n" for split, path in files.items()
        )
    (folder / "README.md").write_text(readme + "---\n")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    return folder


def _parquet(rows: list[str], path: Path) -> None:
    Dataset.from_dict({"text": rows}).to_parquet(path)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2))
