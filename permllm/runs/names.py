"""Names of the files of a run directory."""

# Of `metrics.json` and of kept records.
SCHEMA_VERSION = 3

CONFIG = "config.yaml"
METRICS = "metrics.json"
EVALUATIONS = "evaluations"
HISTORY = "history.jsonl"
PERMUTATIONS = "permutations.safetensors"
MASKS = "masks.safetensors"
# A file of each layer.
WEIGHTS = "weights"
PRUNED_LAYERS = "pruned_layers"
ENVIRONMENT = "environment.json"
LOG = "run.log"
EXPORT = "export"
CHECKPOINT = "lcp_checkpoint.pt"
MASK_CHECKPOINT = "mask_checkpoint.pt"
DISTILL_CHECKPOINT = "distill_checkpoint.pt"
BEST_SO_FAR = "best_so_far.safetensors"

# `metrics.json` repeats these keys of the evaluation that was asked for last.
COPIED = ("evaluation", "evaluation_hash", "perplexity", "tasks", "evaluated_texts")

# Kept runs, a line each; any such file ends with the suffix.
RECORDS = "records.jsonl"
LINES = ".jsonl"


def layer_file(folder: str, layer: int) -> str:
    """Return the name of a decoder layer's file, in `WEIGHTS` or `PRUNED_LAYERS`."""
    return f"{folder}/{layer:05d}.safetensors"
