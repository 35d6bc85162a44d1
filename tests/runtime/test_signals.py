"""How a command ends that a person, a scheduler or a reader of its output ends early."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from permllm import job
from permllm.cli import call
from permllm.runtime.signals import (
    CONTINUES,
    Terminated,
    ending_signals,
    exit_code,
    raise_if_interrupted,
)
from permllm.settings.config import read_config
from tests.conftest import ROOT
from tests.settings.test_config import composed

QUICK = ("model=tiny-random", "logger=none", "calibration.samples=4", "calibration.seqlen=16")
QUICK += ("evaluation.perplexity.limit=1",)


@pytest.fixture
def handlers() -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_schedulers_signal_ends_the_work_once(handlers: None, number: int, code: int) -> None:
    def work() -> None:
        try:
            os.kill(os.getpid(), number)
        finally:
            os.kill(os.getpid(), number)  # while the record is written

    with ending_signals(), pytest.raises(Terminated) as caught:
        work()
    assert exit_code(caught.value) == code
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_python_drops_is_raised_on_demand(
    handlers: None, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dropped:
        def __del__(self) -> None:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    with ending_signals():
        raise_if_interrupted()
        Dropped()
        with pytest.raises(KeyboardInterrupt) as caught:
            raise_if_interrupted()
        assert exit_code(caught.value) == 128 + number
    raise_if_interrupted()  # of the next command


def test_handlers_of_others_stay_and_so_does_what_is_ignored(handlers: None) -> None:
    seen: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))  # of a launcher
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    with ending_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
    assert seen == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def started(folder: Path, *words: str) -> subprocess.Popen[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"PERMLLM_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    environment["OMP_NUM_THREADS"] = "1"
    # In the background it is ignored, and would be there too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    command, pipe = [sys.executable, str(ROOT / "run.py"), *words], subprocess.PIPE
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True
    )


@pytest.mark.slow
def test_a_sweep_that_a_scheduler_ends_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    sweep = ("-m", "permutation.epochs=1,100000", *QUICK, "permutation.compile=false")
    process = started(tmp_path, *sweep)
    give_up = time.monotonic() + 200
    while not any(len(file.read_text()) > 1000 for file in tmp_path.rglob("history.jsonl")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up
        time.sleep(0.05)
    process.terminate()
    out, error = process.communicate(timeout=100)
    assert process.returncode == 143, error
    said = f"interrupted by SIGTERM: {CONTINUES}"
    assert error.splitlines()[-1] == said
    assert "Traceback" not in error
    # The table of the sweep, and what became of its jobs.
    assert said in " ".join(out.split())
    seconds = [json.loads(file.read_text())["seconds"] for file in tmp_path.rglob("metrics.json")]
    assert len(seconds) == 2
    assert all(found["permute"] > 0 for found in seconds)


def test_an_early_interruption_is_one_line(tmp_path: Path) -> None:
    for patience in (0.8, 2.5):
        process = started(tmp_path, *QUICK)
        time.sleep(patience)
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=100)
        # On a busy machine Python itself may still start, and then it ends with 1.
        if process.returncode != 1:
            break
    assert (process.returncode, out) == (130, "")
    assert len(error.splitlines()) == 1
    assert error.startswith("interrupted")


@contextmanager
def unread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let nobody read what is printed."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        yield


def test_where_nobody_reads_a_job_goes_on_and_where_the_disk_is_full_a_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    with unread(monkeypatch):
        job.run(read_config(composed(*QUICK, "permutation=none", f"run_dir={run}")))
    assert json.loads((run / "metrics.json").read_text())["status"] == "finished"
    with unread(monkeypatch):
        assert call("results", [str(run)]) == 141
    assert not [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    with open("/dev/full", "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert call("results", [str(run)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "No space left on device" in error
    assert error.count("\n") == 1
