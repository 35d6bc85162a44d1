"""Run a job of mask=gumbel, and measure the soft masks of its last step beside the result: python soft.py OVERRIDES..."""
import json, sys
sys.path.insert(0, ".")
import torch
from transformers import AutoTokenizer
import permllm
from permllm.cli import run_command
from permllm.mask import gumbel

original_keep = gumbel.GumbelLearner.keep
original_init = gumbel.GumbelLearner.__init__
original_mask = gumbel.GumbelLinear.permuted_mask
soft_now = False

def init(self, regularization, problem, *stage):
    original_init(self, regularization, problem, *stage)
    self.model = problem.model

def permuted_mask(self):
    if soft_now:
        return self.scores.soft_masked(1.0, torch.float32)[0]
    return original_mask(self)

def keep(self):
    global soft_now
    original_keep(self)
    gates = [linear.scores for linear in self.linears.values()]
    with torch.no_grad():
        peaks = [float(part.soft().amax(0).mean()) for part in gates]
    line = {"largest y, mean": sum(peaks) / len(peaks), "temperature": gates[0].temperature, "scale": gates[0].scale}
    try:
        tokenizer = AutoTokenizer.from_pretrained(self.model.name_or_path)
        for text in ("boolq-passages", "wikitext2", "sciq-support"):
            for name, soft_now in (("argmax", False), ("soft", True)):
                line[f"{text} {name}"] = permllm.perplexity(self.model, tokenizer, text, seqlen=256, limit=32)
    except Exception as error:
        line["error"] = repr(error)
    soft_now = False
    open("soft.jsonl", "a").write(json.dumps({"words": sys.argv[1:]} | line) + "\n")

gumbel.GumbelLearner.__init__ = init
gumbel.GumbelLinear.permuted_mask = permuted_mask
gumbel.GumbelLearner.keep = keep
sys.exit(run_command())
