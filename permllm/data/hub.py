"""Files from repositories of the hub, and errors of one line for its failures."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TypeVar

from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from permllm.errors import DataError, first_line

Kind = TypeVar("Kind", bound=BaseException)

# Base class of the errors of httpx or httpx2, whichever huggingface_hub uses; not an OSError.
_HTTP_ERROR: type[Exception] = next(
    base for base in HfHubHTTPError.__bases__ if base is not OSError
)
_FAILURES = (OSError, ValueError, RuntimeError, DatasetGenerationError, _HTTP_ERROR)
_LOG_IN = "log in with a token that may read it (`hf auth login`, or HF_TOKEN)"


@contextmanager
def hub_access(what: str, revision: str | None = None) -> Iterator[None]:
    """Turn failures of the hub inside the context into a DataError of one line.

    Args:
        what: the thing that is asked for, such as `model OWNER/NAME`.
        revision: its revision that is asked for; None: the default branch.
    """
    try:
        yield
    except _FAILURES as error:
        raise DataError(_failure(what, revision or "main", error)) from error


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
    below = ["*/*"]  # because a star also matches files in subfolders
    with hub_access(f"model {model}", revision):
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=patterns, ignore_patterns=below
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


def _failure(what: str, revision: str, error: BaseException) -> str:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__

    def first(*kinds: type[Kind]) -> Kind | None:
        """Return the first error of these kinds in the chain of causes."""
        return next((link for link in chain if isinstance(link, kinds)), None)

    lost = first(DatasetNotFoundError)  # `datasets` drops the cause of this error
    answer = first(HfHubHTTPError)
    broken = first(_HTTP_ERROR, ConnectionError, TimeoutError)
    absent = first(LocalEntryNotFoundError)
    if first(GatedRepoError) or (lost and "is a gated dataset" in str(lost)):
        return f"{what} is gated: accept its licence on its hub page, then {_LOG_IN}"
    if first(RevisionNotFoundError):
        return f"{what} has no branch, tag or commit {revision!r} on the hub"
    if first(RepositoryNotFoundError) or lost:
        return f"{what} is not on the hub under this name; if it is private, {_LOG_IN}"
    incomplete = f"{what} is not complete in the local hub cache"
    if constants.HF_HUB_OFFLINE and (absent or first(ConnectionError)):
        return f"{incomplete}, and HF_HUB_OFFLINE=1 forbids access to the hub"
    if missing := first(RemoteEntryNotFoundError):
        return f"{what} on the hub lacks a file: {' '.join(str(missing).split())}"
    if answer and answer.response.status_code == 401:
        return f"{what}: the hub refuses the token as invalid or expired; {_LOG_IN}, or remove it"
    if answer:
        return f"{what}: the hub answers {answer.response.status_code}: {first_line(answer)}"
    if broken or absent:
        reason = f"{type(broken).__name__}: {first_line(broken)}" if broken else first_line(error)
        return (
            f"{incomplete} and the hub cannot be reached ({reason}): check the network, "
            "HF_ENDPOINT and HF_HOME; the same command continues"
        )
    return f"{what} cannot be read from the hub or its local cache: {first_line(error)}"
