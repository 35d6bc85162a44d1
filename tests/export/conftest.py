"""Exports of one model in each form, which the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from permllm.export.write import export_run, present_export
from permllm.settings.config import ExportConfig
from tests.export.pruned import make_run, variant_model


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of an export in each form, and of the runs and dense models they are from."""
    folder = tmp_path_factory.mktemp("exports")
    constraints = {"folded": "foldable", "gathered": "free", "simulate": "foldable"}
    for form, constraint in constraints.items():
        run = make_run(folder / f"of-{form}", variant_model("llama"), constraint)
        summary = export_run(run, ExportConfig(form), folder / form)
        assert summary == present_export(folder / form)
    return folder
