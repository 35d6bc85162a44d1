"""Write text of the dense model itself, for a pruned model to learn from.

python scripts/write_text.py own.jsonl --documents 1200 calibration=reading-tasks
python run.py calibration=text calibration.data_files=own.jsonl

Each document is a window that begins as one of the calibration text, and that the model continues
at temperature 1.
"""

import argparse
import sys
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))

from permllm.data.lookup import calibration_text
from permllm.data.windows import calibration_windows
from permllm.models.load import load_model
from permllm.settings.composition import composed
from permllm.settings.config import read_config

BEGINNING = 16  # tokens of a document that are not the model's
BATCH = 64


def main(words: list[str]) -> int:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--documents", type=int, default=1200)
    parser.add_argument("settings", nargs="*", help="of run.py: model, calibration, seed")
    options = parser.parse_intermixed_args(words)
    config = read_config(composed([*options.settings, f"calibration.samples={options.documents}"]))
    loaded = load_model(config.model, config.seed)
    text = calibration_text(config.calibration)
    windows = calibration_windows(
        loaded.tokenizer, text, config.calibration, config.seed, loaded.bos
    )
    # A document that is read again may have fewer tokens than were written.
    length = config.calibration.seqlen + BEGINNING
    torch.manual_seed(config.seed)
    documents: list[str] = []
    for batch in tqdm(windows[:, :BEGINNING].split(BATCH), desc="write", unit="batch"):
        tokens = loaded.model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            do_sample=True,
            top_k=0,
            min_length=length,
            max_length=length,
        )
        documents += loaded.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    Dataset.from_dict({"text": documents}).to_json(options.file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
