"""Results of dense models, computed once for a model, protocol and software version."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any

from filelock import FileLock

from permllm.data.wheels import cache_directory
from permllm.results.environment import versions
from permllm.results.files import write_json


def cached_dense_result(identity: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result kept under `identity` and the present software versions, or that of `compute`, which is then kept.

    Args:
        identity: plain values that the result depends on: model, protocol, text.
        compute: gives plain values.
    """
    key = json.dumps({"identity": identity, "versions": versions()}, sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:24]
    file = cache_directory() / "dense" / f"{digest}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock")):
        if file.is_file():
            try:
                return dict(json.loads(file.read_text(encoding="utf-8"))["result"])
            except (ValueError, KeyError):
                file.unlink()
        result = compute()
        write_json(file, {"identity": identity, "versions": versions(), "result": result})
        return result
