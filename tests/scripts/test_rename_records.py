"""Names of methods and amounts of version 2.0 in records and run directories."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from scripts.rename_records import main


def test_records_and_run_directories_get_the_present_names(tmp_path: Path) -> None:
    config = {"method": "order-folded", "budget": {"samples": 8, "steps": 2, "text": 4}, "seed": 0}
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps({"run": "a", "config": config}) + '\n{"metrics": {}}\n')
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    assert main([str(records), str(tmp_path / "run")]) == 0
    budget = {"calibration_windows": 8, "steps": 2, "learning_windows": 4}
    expected = {"method": "lcp-folded", "budget": budget, "seed": 0}
    first, second = map(json.loads, records.read_text().splitlines())
    assert first == {"run": "a", "config": expected}
    assert second == {"metrics": {}}
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text()) == expected
