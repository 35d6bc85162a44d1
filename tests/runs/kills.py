"""A job is killed before all that it moves, removes or appends to; the same command must end with the same result.

What a kill leaves is the folder as it is at that place: one run makes a copy at each. `python kills.py FOLDER` prints as JSON
how many places there were, and the first difference of those where there was one. Each job is a fork of this process, so that
what is imported once serves all of them.
"""

from __future__ import annotations

import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from permllm import job as runner
from permllm.config import RunConfig, read_config
from permllm.pruning.composition import register_resolvers
from permllm.runs import cache
from tests.test_config import composed

WORDS = (
    "model=tiny",
    "logger=none",
    "pruner=sparsegpt",
    "permutation=lcp",
    "permutation.epochs=2",
    "permutation.batch_size=2",
    "permutation.compile=false",
    "calibration.samples=2",
    "calibration.seqlen=16",
    "calibration.batch_size=4",
    "evaluation.perplexity.limit=1",
    "export=gathered",
)


class Places:
    """Copies a folder at each place: a process that is killed there leaves it so."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self.seen = 0
        self._folder, self._copies = folder, copies

    def before(self, owner: Any, name: str) -> None:
        """Before each call of a function is a place; what is left after it is there before the next."""
        original: Callable[..., Any] = getattr(owner, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            self._here()
            return original(*arguments, **named)

        setattr(owner, name, counted)

    def _here(self) -> None:
        shutil.copytree(self._folder, self._copies / str(self.seen))
        self.seen += 1


def job(config: RunConfig, folder: Path) -> None:
    """Run the job in a folder of its own, its cache too."""
    os.environ["PERMLLM_CACHE"] = str(folder / "cache")
    config.run_dir = str(folder / "run")
    runner.run(config)


def copied(config: RunConfig, folder: Path, copies: Path) -> int:
    """The job with a copy of its folder at each place; the number of places."""
    places = Places(folder, copies)
    for owner, name in (
        (os, "replace"),
        (Path, "rename"),
        (Path, "unlink"),
        (shutil, "rmtree"),
    ):
        places.before(owner, name)
    job(config, folder)
    return places.seen


def forked(work: Callable[[], Any]) -> tuple[int, Any]:
    """Exit code and result of some work in a fork of this process."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        with os.fdopen(writer, "w") as stream:
            json.dump(work(), stream)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as stream:
        text = stream.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), json.loads(text) if text else None


def outcome(folder: Path) -> dict[str, Any]:
    """All that must not depend on where a job was killed: numbers, files, and that nothing else is left."""
    run = folder / "run"
    metrics = json.loads((run / "metrics.json").read_text())
    found = {key: metrics[key] for key in ("status", "perplexity", "sparsity", "retained_saliency", "output_error")}
    metrics["export"].pop("seconds")
    found["export"] = metrics["export"]
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    found["history"] = [
        {key: value for key, value in line.items() if key not in ("step_seconds", "peak_memory_bytes")} for line in lines
    ]
    for file in run.rglob("*.safetensors"):
        found[str(file.relative_to(run))] = hashlib.sha256(file.read_bytes()).hexdigest()
    found["files"] = sorted(str(file.relative_to(run)) for file in run.rglob("*"))
    found["cache"] = sorted(file.name for file in (folder / "cache").rglob(".*"))
    return found


def wrong_at(config: RunConfig, folder: Path, expected: dict[str, Any]) -> str | None:
    """What differs after the job was run again on what a killed one left in a folder."""
    code, _ = forked(partial(job, config, folder))
    if code:
        return f"place {folder.name}: exit code {code}"
    found = outcome(folder)
    shutil.rmtree(folder)
    for key, value in expected.items():
        if found.get(key) != value:
            return f"place {folder.name}: {key} is {found.get(key)}, not {value}"
    return None


def main() -> None:
    """Run again from every place, and report."""
    folder = Path(sys.argv[1])
    register_resolvers()
    cache.git_commit = lambda: None  # a process of its own for each job
    config = read_config(composed(*WORDS))
    gc.collect()
    gc.freeze()  # or each fork copies what the collector touches
    (folder / "whole").mkdir()
    code, places = forked(partial(copied, config, folder / "whole", folder / "killed"))
    assert code == 0
    expected = outcome(folder / "whole")
    with multiprocessing.get_context("fork").Pool(2) as pool:
        work = [(config, folder / "killed" / str(place), expected) for place in range(places)]
        wrong = [text for text in pool.starmap(wrong_at, work, chunksize=1) if text]
    print(json.dumps({"places": places, "wrong": wrong}))


if __name__ == "__main__":
    main()
