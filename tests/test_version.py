"""The version stands in `permllm/runtime/version.py`; what repeats it says the same."""

from __future__ import annotations

import re
import tomllib

from permllm.runtime.version import __version__
from tests.conftest import ROOT


def test_the_package_takes_it_from_the_module() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" not in project["project"]
    assert project["project"]["dynamic"] == ["version"]
    assert (ROOT / project["tool"]["hatch"]["version"]["path"]).read_text(encoding="utf-8").count(
        f'"{__version__}"'
    ) == 1


def test_the_changelog_has_a_part_for_it() -> None:
    """In the order of versions, the newest first."""
    heads = re.findall(
        r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$",
        (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        re.M,
    )
    versions = [(name, date) for name, date in heads if name != "Unreleased"]
    assert versions[0][0] == __version__
    assert versions == sorted(
        versions, key=lambda head: tuple(map(int, head[0].split("."))), reverse=True
    )
    assert all(date for _, date in versions)
