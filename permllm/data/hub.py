"""Files of the hub's repositories at a commit that is resolved once, and what its failures mean for the person who waits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

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

# A connection that fails raises the errors of the HTTP library that huggingface_hub speaks through,
# httpx or httpx2 by its version. They are no OSError; the hub's own errors derive from their base.
_HTTP_ERROR: type[Exception] = next(
    base for base in HfHubHTTPError.__bases__ if base is not OSError
)
_FAILURES = (OSError, ValueError, RuntimeError, DatasetGenerationError, _HTTP_ERROR)
_LOG_IN = "log in with a token that may read it (`hf auth login`, or HF_TOKEN)"


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the hub.

    Attributes:
        path: where it lies in the local cache.
        source: `repository@commit/file`; another commit may hold another file.
    """

    path: Path
    source: str


@contextmanager
def hub_access(what: str, revision: str | None = None) -> Iterator[None]:
    """What goes wrong with the hub inside becomes one line.

    Args:
        what: is asked for, such as `model OWNER/NAME`.
        revision: of it that is asked for; None is the default branch.

    Raises:
        DataError: with the line.
    """
    try:
        yield
    except _FAILURES as error:
        raise DataError(_failure(what, revision, error)) from error


def hub_snapshot(model: str, revision: str | None, patterns: list[str]) -> Path:
    """Download files of a model repository.

    Args:
        model: `OWNER/NAME`.
        revision: branch, tag or commit; None is the default branch.
        patterns: of the files, in its top folder unless they name another; those that match none
            are not downloaded.

    Returns:
        The folder in the local cache, whose name is the commit. Where the hub is out of reach or
        not to be asked it is what the cache holds of that revision, which can lack files.

    Raises:
        DataError: they cannot be had.
    """
    below = (
        None if any("/" in pattern for pattern in patterns) else ["*/*"]
    )  # a star matches what lies below, too
    with hub_access(f"model {model}", revision):
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=patterns, ignore_patterns=below
            )
        )


@cache
def hub_file(repository: str, file: str) -> HubFile:
    """Download a file of a data set by its name: the default branch as it was when this process first asked.

    `datasets` finds what it has cached only where it is asked for in the same words, and not at all
    by a file's name when the hub is out of reach; a file by its name is found whatever else was
    asked for.

    Raises:
        DataError: it cannot be had.
    """
    with hub_access(f"data set {repository}"):
        path = Path(hf_hub_download(repository, file, repo_type="dataset"))
    commit = path.parents[len(Path(file).parts) - 1].name
    return HubFile(path, f"{repository}@{commit}/{file}")


def _failure(what: str, revision: str | None, error: BaseException) -> str:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__

    def first(*kinds: type[BaseException]) -> BaseException | None:
        return next((link for link in chain if isinstance(link, kinds)), None)

    lost = first(DatasetNotFoundError)  # whose cause `datasets` drops
    answers = {link.response.status_code for link in chain if isinstance(link, HfHubHTTPError)}
    if first(GatedRepoError) or (lost and "is a gated dataset" in str(lost)):
        return f"{what} is gated: accept its licence on its hub page, then {_LOG_IN}"
    if first(RevisionNotFoundError):
        return f"{what} has no branch, tag or commit {revision or 'main'!r} on the hub"
    if first(RepositoryNotFoundError) or lost:
        return f"{what} is not on the hub under this name; if it is private, {_LOG_IN}"
    if 401 in answers:
        return f"{what}: the hub refuses the token as invalid or expired; {_LOG_IN}, or remove it"
    if constants.HF_HUB_OFFLINE and first(LocalEntryNotFoundError, ConnectionError):
        return f"{what} is not whole in the local hub cache, and HF_HUB_OFFLINE=1 says not to ask the hub"
    if missing := first(RemoteEntryNotFoundError):
        return f"{what} on the hub lacks a file: {' '.join(str(missing).split())}"
    if answers:
        return f"{what}: the hub answers {max(answers)}: {first_line(error)}"
    broken = first(_HTTP_ERROR, ConnectionError, TimeoutError)
    if broken or first(LocalEntryNotFoundError):
        reason = f"{type(broken).__name__}: {first_line(broken)}" if broken else first_line(error)
        return (
            f"{what} is not whole in the local hub cache and the hub cannot be reached ({reason}): check the network, "
            "HF_ENDPOINT and HF_HOME; the same command continues"
        )
    return f"{what} cannot be had from the hub or its local cache: {first_line(error)}"
