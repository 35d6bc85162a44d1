"""The first 10,000 documents of the Pile."""

from permllm.data.texts.base import HubText

TEXT = HubText("NeelNanda/pile-10k", calibration_file="data/train-00000-of-00001-4746b8785c874cc7.parquet")
