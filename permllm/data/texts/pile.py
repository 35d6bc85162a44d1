"""The Pile's validation documents, which the papers' code shuffles."""

from permllm.data.texts.base import HubText

TEXT = HubText("mit-han-lab/pile-val-backup", calibration_file="val.jsonl.zst", shuffled=True)
