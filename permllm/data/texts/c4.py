"""C4: a training shard; the first validation documents, joined and cut as in Wanda's protocol."""

from permllm.data.texts.base import HubText

TEXT = HubText(
    "allenai/c4",
    calibration_file="en/c4-train.00000-of-01024.json.gz",
    evaluation_file="en/c4-validation.00000-of-00008.json.gz",
    first=1100,
    joiner=" ",
    max_windows=256,
)
