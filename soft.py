"""Run a job of mask=gumbel, and measure the soft masks of its last step beside the result: python soft.py OVERRIDES..."""
import json, sys
sys.path.insert(0, ".")
import torch
from transformers import AutoTokenizer
import permllm
from permllm.mask import gumbel

original_keep = gumbel.GumbelLearner.keep
original_mask = gumbel.Gates.mask
original_init = gumbel.GumbelLearner.__init__
soft_now = False

def init(self, regularization, problem, *stage):
    original_init(self, regularization, problem, *stage)
    self.problem = problem

def mask(self):
    return self.soft_masked(1.0) if soft_now else original_mask(self)

def keep(self):
    global soft_now
    original_keep(self)
    model = self.problem.model
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    gates = [linear.scores for linear in self.linears.values()]
    peak = [float(part.soft().amax(0).mean()) for part in gates]
    line = {"largest y, mean": sum(peak) / len(peak), "temperature": gates[0].temperature, "scale": gates[0].scale}
    for text in ("boolq-passages", "wikitext2", "sciq-support"):
        for name, value in (("argmax", False), ("soft", True)):
            soft_now = value
            try:
                line[f"{text} {name}"] = permllm.perplexity(model, tokenizer, text, seqlen=256, limit=32)
            except Exception as error:
                line[f"{text} {name}"] = repr(error)
    soft_now = False
    print(json.dumps(line))
    open("soft.jsonl", "a").write(json.dumps({"words": sys.argv[1:]} | line) + "\n")

gumbel.GumbelLearner.__init__ = init
gumbel.Gates.mask = mask
gumbel.GumbelLearner.keep = keep
from permllm.cli import run_command
sys.exit(run_command())
