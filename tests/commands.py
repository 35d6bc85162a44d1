"""Commands as a person types them, each in a fork of one process that has imported what they need: imports cost seconds each.

`python -m tests.commands` is that process. It reads an `Order` as JSON a line, and answers with a line: the exit code.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
SECONDS = 1800
_IMPORTED = (
    "hydra.main",
    "hydra.core.plugins",
    "matplotlib.figure",
    "permllm.job",
    "permllm.cli",
    "permllm.export.checkpoint",
    "wandb",
)


@dataclass(frozen=True)
class Order:
    """A command: `python WORDS` in the folder `cwd`, with the variables `environment` and its output in two files."""

    words: list[str]
    cwd: str
    environment: dict[str, str]
    stdout: str
    stderr: str


def command(words: list[str], cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """What `python WORDS` does: a script, or a module after `-m`. Variables that are read at an import are those of now."""
    process = _process()
    assert process.stdin is not None
    assert process.stdout is not None
    with TemporaryDirectory() as folder:
        out, err = (Path(folder) / name for name in ("out", "err"))
        order = Order(words, str(cwd), environment, str(out), str(err))
        print(json.dumps(asdict(order)), file=process.stdin, flush=True)
        code = int(process.stdout.readline())
        return subprocess.CompletedProcess(words, code, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


def close() -> None:
    """End the process that serves, where one has been asked; it would end with this one too."""
    if _process.cache_info().currsize:
        _process().communicate()
        _process.cache_clear()


@cache
def _process() -> subprocess.Popen[str]:
    variables = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}  # one thread alone can be forked
    words = [sys.executable, "-m", "tests.commands"]
    return subprocess.Popen(words, cwd=ROOT, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def main() -> None:
    """Serve; a fork becomes the command."""
    for name in _IMPORTED:
        import_module(name)
    gc.collect()
    gc.freeze()  # or each fork copies what the collector touches
    for line in sys.stdin:
        order = Order(**json.loads(line))
        child = os.fork()
        if not child:
            _become(order)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(order: Order) -> None:
    """Run the command, and end as an interpreter does, but for taking down what was imported."""
    signal.alarm(SECONDS)
    os.chdir(order.cwd)
    os.environ.clear()
    os.environ.update(order.environment)
    for number, file in enumerate((os.devnull, order.stdout, order.stderr)):
        opened = os.open(file, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    code: object = 0
    try:
        if order.words[0] == "-m":
            sys.argv = order.words[1:]
            if not hasattr(sys.modules.get(order.words[1]), "__path__"):
                sys.modules.pop(order.words[1], None)
            runpy.run_module(order.words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = order.words
            runpy.run_path(order.words[0], run_name="__main__")
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


if __name__ == "__main__":
    main()
