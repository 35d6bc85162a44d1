"""Commands as typed, each in a fork of a process that has imported what takes seconds to import."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from functools import cache
from multiprocessing.context import ForkServerContext
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

ROOT = Path(__file__).parent.parent
SECONDS = 1800
_IMPORTED = [
    "hydra.main",
    "hydra.core.plugins",
    "matplotlib.figure",
    "permllm.job",
    "permllm.cli",
    "permllm.export.write",
    "wandb",
]


def command(
    words: list[str], cwd: Path, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS`: a script, or a module after `-m`.

    Variables that are read at an import are those of now.
    """
    with TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        with pytest.MonkeyPatch.context() as patch:  # the server starts with the first command
            patch.setenv("OMP_NUM_THREADS", "1")  # one thread alone can be forked
            patch.setenv("HF_HUB_OFFLINE", "1")
            process = _server().Process(target=_become, args=(words, cwd, environment, out, err))
            process.start()
        process.join()
        return subprocess.CompletedProcess(
            words, process.exitcode or 0, *(file.read_text("utf-8") for file in (out, err))
        )


@cache
def _server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    return context


def _become(words: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    """Run the command, and end as an interpreter does, but for taking down what was imported."""
    signal.alarm(SECONDS)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate((os.devnull, out, err)):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    code: object = 0
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            if not hasattr(sys.modules.get(words[1]), "__path__"):
                sys.modules.pop(words[1], None)
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)
