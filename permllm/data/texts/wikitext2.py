"""WikiText-2, raw: its training rows, and its test rows joined by a blank line."""

from permllm.data.texts.base import HubText

TEXT = HubText(
    "Salesforce/wikitext",
    calibration_file="wikitext-2-raw-v1/train-00000-of-00001.parquet",
    evaluation_file="wikitext-2-raw-v1/test-00000-of-00001.parquet",
)
