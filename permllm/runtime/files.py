"""Cache directory, and digests of input files. The cache directory can be deleted at any time."""

import hashlib
import os
from pathlib import Path

from filelock import BaseFileLock, FileLock
from platformdirs import user_cache_path

from permllm.errors import DataError, first_line

# Size in bytes of files whose digests are kept. Smaller ones are read each time, because they may
# be written twice in the same tick of the clock.
LARGE_FILE = 1 << 24


def cache_directory() -> Path:
    """Return the folder in `PERMLLM_CACHE`, or `permllm` in the user's cache; make it."""
    path = Path(os.environ.get("PERMLLM_CACHE") or user_cache_path("permllm"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def cache_lock(name: str) -> BaseFileLock:
    """Return a lock in the cache directory, which no other process holds at the same time."""
    return FileLock(cache_directory() / f"{name}.lock")


def input_sha256(file: Path) -> str:
    """Return the sha256 of a file. A large file is read only if it has changed. Errors as above."""
    state = file.stat()
    if state.st_size < LARGE_FILE:
        return file_sha256(file)
    version = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
    digest = cache_directory() / "digests" / "-".join(map(str, version))
    digest.parent.mkdir(exist_ok=True)
    with cache_lock(f"digests/{digest.name}"):
        if not digest.exists():
            scratch = digest.with_suffix(".tmp")
            scratch.write_text(file_sha256(file))
            scratch.rename(digest)
    return digest.read_text()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, hexadecimal. Raises DataError if it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}") from error
