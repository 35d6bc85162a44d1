"""The files of a run directory, and what is in each of them."""

# Of `metrics.json`.
SCHEMA_VERSION = 1
# In the metadata of a safetensors file, and in a JSON object of ours.
CHECKSUM = "crc32"

CONFIG = "config.yaml"
METRICS = "metrics.json"
SCORES = "scores.json"
HISTORY = "history.jsonl"
PERMUTATIONS = "permutations.safetensors"
MASKS = "masks.safetensors"
WEIGHTS = "weights.safetensors"
ENVIRONMENT = "environment.json"
CHECKPOINT = "lcp_checkpoint.pt"
BEST_SO_FAR = "best_so_far.safetensors"
EXPORT = "export"
WRITTEN_EXPORT = "export.new"
