"""The hub on loopback, filled, and an environment in which the real clients know no other."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.hub.repositories import write_repositories
from tests.hub.server import Hub


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Running. What a test changes of its repositories it puts back."""
    root = tmp_path_factory.mktemp("hub")
    write_repositories(root)
    with Hub(root) as running:
        yield running


@pytest.fixture(scope="session")
def environment(
    hub: Hub, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, str]]:
    """Variables for a process whose caches are those of this name, and that knows no token and no other hub."""
    places = tmp_path_factory.mktemp("caches")

    def variables(name: str) -> dict[str, str]:
        return {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(places / name / "hf"),
            "PERMLLM_CACHE": str(places / name / "results"),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
            "NO_PROXY": "127.0.0.1,localhost",
            "TQDM_DISABLE": "1",
        }

    return variables
