"""The files of a run directory, what is in each of them, and the file of runs that are kept."""

# Of `metrics.json`.
SCHEMA_VERSION = 3
# In the metadata of a safetensors file, and in a JSON object of ours.
CHECKSUM = "crc32"

CONFIG = "config.yaml"
METRICS = "metrics.json"
EVALUATIONS = "evaluations"
SCORES = "scores.json"
HISTORY = "history.jsonl"
PERMUTATIONS = "permutations.safetensors"
MASKS = "masks.safetensors"
WEIGHTS = "weights.safetensors"
ENVIRONMENT = "environment.json"
LOG = "run.log"
CHECKPOINT = "lcp_checkpoint.pt"
MASK_CHECKPOINT = "mask_checkpoint.pt"
DISTILL_CHECKPOINT = "distill_checkpoint.pt"
PRUNED_LAYERS = "pruned_layers"
BEST_SO_FAR = "best_so_far.safetensors"
EXPORT = "export"
WRITTEN_EXPORT = "export.new"

# Runs that are kept, a line each, and what the name of any such file ends with.
RECORDS = "records.jsonl"
LINES = ".jsonl"
