"""Train the model of `model=tiny` on the stories of this package, and write it to a folder.

python scripts/train_tiny.py permllm/models/tiny

It takes about ten minutes on one core. Calibration and evaluation read stories of other seeds.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

from permllm.data.grammar import stories
from permllm.data.windows import encode

STORIES = 12_000
STEPS = 1500
BATCH = 16
WINDOW = 128
LEARNING_RATE = 0.003


def main(words: list[str]) -> int:
    """Train and write the model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(words).folder
    torch.manual_seed(0)
    tokenizer = ByT5Tokenizer(extra_ids=0)
    tokens = encode(tokenizer, "\n\n".join(stories("training", STORIES)), special=False)
    config = AutoConfig.for_model(
        "llama",
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    schedule = OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.05)
    for step in (progress := tqdm(range(STEPS))):
        starts = torch.randint(len(tokens) - WINDOW, (BATCH,))
        batch = torch.stack([tokens[start : start + WINDOW] for start in starts])
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
