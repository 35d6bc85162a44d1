"""Write text that the dense model itself goes on with, as a file to calibrate and to learn from.

    python scripts/write_text.py own.jsonl --windows 2928 model.dtype=bfloat16 calibration=passages-and-questions
    python scripts/write_text.py own.jsonl --windows 500 --alone model=llama-2-7b calibration=c4
    python run.py calibration=text calibration.data_files=own.jsonl calibration.sampling=disjoint

Each document begins with the first tokens of a calibration window, and the model, asked at temperature 1, writes the rest.
The documents of the calibration text stand in the file first, unless it is to have what the model wrote `--alone`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from tqdm.auto import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from permllm.config import HYDRA_DEFAULTS, conf_directory, read_config, register_resolvers  # noqa: E402
from permllm.data.calibration import calibration_tokens  # noqa: E402
from permllm.data.named import calibration_text  # noqa: E402
from permllm.models.loading import load_model  # noqa: E402
from permllm.nodes import register  # noqa: E402


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines, an object with a `text` each")
    parser.add_argument("--windows", type=int, default=128, help="how many documents the model writes")
    parser.add_argument("--tokens", type=int, default=128, help="that it writes of each")
    parser.add_argument("--prompt", type=int, default=16, help="tokens that it is given")
    parser.add_argument("--batch-size", type=int, default=256, help="documents at a time")
    parser.add_argument("--alone", action="store_true", help="leave the calibration text out")
    parser.add_argument("settings", nargs="*", help="as of run.py: the model, the calibration, the seed")
    options = parser.parse_intermixed_args()
    register_resolvers()
    register()
    with initialize_config_dir(str(conf_directory()), **HYDRA_DEFAULTS):
        config = read_config(compose("config", overrides=["logger=none", *options.settings]))
    loaded = load_model(config.model, config.seed)
    tokenizer, text = loaded.tokenizer, calibration_text(config.calibration).text
    further = max(0, options.windows - config.calibration.samples)
    windows = calibration_tokens(tokenizer, config.calibration, config.seed, config.model.bos, further)[: options.windows]
    torch.manual_seed(config.seed)
    with options.file.open("w", encoding="utf-8") as file:
        for document in () if options.alone else text.calibration(config.seed):
            file.write(json.dumps({"text": document}) + "\n")
        for batch in tqdm(windows[:, : options.prompt].split(options.batch_size), desc="write", unit="batch"):
            prompts = batch.to(loaded.model.device)
            written = loaded.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                min_new_tokens=options.tokens,
                max_new_tokens=options.tokens,
                pad_token_id=tokenizer.pad_token_id or 0,
            )
            for document in tokenizer.batch_decode(written, skip_special_tokens=True):
                file.write(json.dumps({"text": document}) + "\n")


if __name__ == "__main__":
    main()
