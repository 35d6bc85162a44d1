"""A hub on loopback, spoken to by huggingface_hub, transformers, datasets and lm-eval as they are installed.

It serves a folder of repositories, read anew at each request, so that a test changes the hub by
changing files:

    models/OWNER/NAME/...            the files of the branch main models/OWNER/NAME@BRANCH/...
    another branch or tag; a slash in it is written %2F datasets/OWNER/NAME/...          the same
    for data sets .../NAME/.gated                  gated: all see what it holds, the token
    hf_granted reads it .../NAME/.cut                    a number: every body ends after so many
    bytes, the next request may ask for the rest .../NAME/.limit                  a number: no body
    goes beyond this place of a file, the connection breaks there

As on the hub, a commit is 40 hex digits (here of the branch's content), large files are redirected
to another host (302, X-Linked-Etag, X-Linked-Size) and small ones served (ETag), and failures carry
X-Error-Code: RepoNotFound (401 without a token, 404 with one), GatedRepo (401 without, 403 with one
that was not granted), RevisionNotFound, EntryNotFound. The tokens are hf_granted and hf_known; any
other is refused (401) everywhere. Commits of history are not kept, Xet is not spoken, nothing can
be uploaded.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, quote, unquote, urlsplit

GRANTED, KNOWN = "hf_granted", "hf_known"
_LARGE = 20_000  # bytes from which a file is one of git LFS
_DATE = "2025-01-01T00:00:00.000Z"
_PULL = "refs/pr/"
_WHAT = "revision|tree|paths-info|commits|refs|discussions"
_API = re.compile(rf"/api/(models|datasets)/([^/]+/[^/]+)(?:/({_WHAT})(?:/([^/]+)(?:/(.*))?)?)?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_LARGE_FILE = re.compile(r"/cdn/(models|datasets)/([^/]+/[^/]+)/([0-9a-f]{40})/(.+)")
_MARKS = (".gated", ".cut", ".limit")


class Request(NamedTuple):
    """One that was answered: method, status, path and the range that was asked for."""

    method: str
    status: int
    path: str
    range: str | None


class Refused(Exception):
    """An answer that is an error: status, X-Error-Code and message."""


@cache
def _digests(path: Path, size: int, changed: int) -> tuple[str, str]:
    """Git blob id and sha256 of a file; the last two arguments say when it is another one."""
    content = path.read_bytes()
    return hashlib.sha1(f"blob {size}\0".encode() + content).hexdigest(), hashlib.sha256(
        content
    ).hexdigest()


def _directory(path: str) -> dict[str, Any]:
    return {
        "type": "directory",
        "path": path,
        "size": 0,
        "oid": hashlib.sha1(path.encode()).hexdigest(),
    }


class Revision:
    """The files of one branch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, Any]] = {}
        for path in sorted(
            path for path in folder.rglob("*") if path.is_file() and path.name not in _MARKS
        ):
            status = path.stat()
            blob, sha256 = _digests(path, status.st_size, status.st_mtime_ns)
            entry = {
                "type": "file",
                "path": path.relative_to(folder).as_posix(),
                "size": status.st_size,
                "oid": blob,
            }
            if status.st_size >= _LARGE:
                entry["lfs"] = {"oid": sha256, "size": status.st_size, "pointerSize": 134}
            self.files[str(entry["path"])] = entry
        self.commit = hashlib.sha1(
            json.dumps([folder.name, self.files], sort_keys=True).encode()
        ).hexdigest()

    def mark(self, name: str) -> int | None:
        """The number in a file that marks the repository."""
        file = self.folder / name
        return int(file.read_text()) if file.is_file() else None

    def entries(self, under: str, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders below a folder, as /tree lists them."""
        prefix = f"{under}/" if under else ""
        found: dict[str, dict[str, Any]] = {}
        for path, entry in self.files.items():
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                folder = prefix + "/".join(parts[:depth])
                found[folder] = _directory(folder)
            if len(parts) == 1 or recursive:
                found[path] = entry
        return [found[path] for path in sorted(found)]


class Repository:
    """The branches of a repository that a token may know of.

    Raises:
        Refused: there is none of this name.
    """

    def __init__(self, root: Path, kind: str, name: str, token: str | None) -> None:
        self.kind, self.name, self.token = kind, name, token
        main = root / kind / name
        if not main.is_dir():
            raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        self.gated = (main / ".gated").exists()
        others = {
            unquote(folder.name.partition("@")[2]): folder
            for folder in sorted(main.parent.glob(f"{main.name}@*"))
        }
        self.branches = {
            branch: Revision(folder) for branch, folder in {"main": main, **others}.items()
        }

    def revision(self, name: str) -> Revision:
        """A branch by its name or commit."""
        for branch, revision in self.branches.items():
            if name in (branch, revision.commit):
                return revision
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {name}")

    def check_access(self) -> None:
        """Raise Refused where the token may not read files."""
        if self.gated and self.token != GRANTED:
            text = f"Access to {self.kind.rstrip('s')} {self.name} is restricted. You must have access to it"
            raise Refused(
                403 if self.token else 401,
                "GatedRepo",
                f"{text} and be authenticated to access it.",
            )

    def info(self, found: Revision) -> dict[str, Any]:
        """What /api/models/ID answers."""
        return {
            "_id": "0" * 24,
            "id": self.name,
            "sha": found.commit,
            "private": False,
            "gated": "manual" if self.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": _DATE,
            "createdAt": _DATE,
            "siblings": [{"rfilename": file} for file in found.files],
        }

    def commits(self, found: Revision) -> list[dict[str, Any]]:
        """The newest commit of a branch, and main's, which it is based on."""
        ids = dict.fromkeys((found.commit, self.branches["main"].commit))
        return [
            {"id": commit, "authors": [], "date": _DATE, "title": "files", "message": ""}
            for commit in ids
        ]

    def refs(self) -> dict[str, Any]:
        """What /refs answers."""
        heads = {
            name: found.commit
            for name, found in self.branches.items()
            if not name.startswith(_PULL)
        }
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in heads.items()
        ]
        return {"branches": branches, "converts": [], "tags": [], "pullRequests": []}

    def discussions(self) -> dict[str, Any]:
        """The pull requests of the bot that adds safetensors."""
        numbers = [
            int(name.removeprefix(_PULL)) for name in self.branches if name.startswith(_PULL)
        ]
        shared = {
            "title": "Adding `safetensors` variant of this model",
            "status": "open",
            "isPullRequest": True,
            "createdAt": _DATE,
            "author": {"name": "SFconvertbot"},
            "repo": {"name": self.name, "type": self.kind.rstrip("s")},
        }
        return {
            "count": len(numbers),
            "start": 0,
            "discussions": [shared | {"num": number} for number in numbers],
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """The server keeps its own list."""

    def _answer(self) -> None:
        self._status = 0
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ").strip() or None
        try:
            self._route(urlsplit(self.path).path, body, token)
        except Refused as refusal:
            status, code, message = refusal.args
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self._send_value(
                {"error": message}, status, {key: value for key, value in headers.items() if value}
            )
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        self.server.requests.append(
            Request(self.command, self._status, self.path, self.headers.get("Range"))
        )

    def _route(self, path: str, body: str, token: str | None) -> None:
        root = self.server.root
        if token not in (None, GRANTED, KNOWN):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        if match := _API.fullmatch(path):
            kind, name, what, revision, under = match.groups()
            self._send_value(
                self._of_api(
                    Repository(root, kind, name, token), what, revision, unquote(under or ""), body
                )
            )
        elif match := _FILE.fullmatch(path):
            kind = "datasets" if match[1] else "models"
            self._send_file(
                Repository(root, kind, match[2], token), unquote(match[3]), unquote(match[4])
            )
        elif match := _LARGE_FILE.fullmatch(
            path
        ):  # whoever has the address may read it, as on the hub
            found = Repository(root, match[1], match[2], token).revision(match[3])
            entry = found.files[unquote(match[4])]
            self._send_content(found, entry, {"ETag": f'"{entry["lfs"]["oid"]}"'})
        else:
            raise Refused(404, "", f"no such page: {path}")

    def _of_api(
        self, repository: Repository, what: str | None, revision: str | None, under: str, body: str
    ) -> Any:
        found = repository.revision(unquote(revision or "main"))
        if what in (None, "revision"):
            return repository.info(found)
        if what == "commits":
            return repository.commits(found)
        if what == "refs":
            return repository.refs()
        if what == "discussions":
            return repository.discussions()
        if what == "tree":
            recursive = parse_qs(urlsplit(self.path).query).get("recursive", [""])[0].lower() in (
                "true",
                "1",
            )
            entries = found.entries(under, recursive)
            if not entries:
                raise Refused(404, "EntryNotFound", f"{under} does not exist")
            return entries
        paths = (json.loads(body) if body.startswith("{") else parse_qs(body)).get("paths", [])
        folders = {str(parent) for file in found.files for parent in Path(file).parents}
        return [
            found.files.get(path) or _directory(path)
            for path in paths
            if path in found.files or path in folders
        ]

    def _send_file(self, repository: Repository, revision: str, path: str) -> None:
        found = repository.revision(revision)
        repository.check_access()
        entry = found.files.get(path)
        headers = {"X-Repo-Commit": found.commit}
        if entry is None:
            headers |= {
                "X-Error-Code": "EntryNotFound",
                "X-Error-Message": f"{path} does not exist",
            }
            self._send_value({"error": "Entry not found"}, 404, headers)
        elif "lfs" in entry:
            headers |= {
                "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"',
                "X-Linked-Size": str(entry["size"]),
            }
            # Another host, as on the hub: clients follow redirects to the same one by themselves
            # and would miss these headers.
            where = quote(f"/cdn/{repository.kind}/{repository.name}/{found.commit}/{path}")
            self._send_value(
                {},
                302,
                headers | {"Location": f"http://localhost:{self.server.server_port}{where}"},
            )
        elif self.headers.get("If-None-Match") == f'"{entry["oid"]}"':
            self._send_value(None, 304, headers)
        else:
            self._send_content(found, entry, headers | {"ETag": f'"{entry["oid"]}"'})

    def _send_content(
        self, found: Revision, entry: dict[str, Any], headers: dict[str, str]
    ) -> None:
        size = int(entry["size"])
        first, last = 0, size - 1
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if asked:
            if asked[1]:
                first, last = int(asked[1]), min(int(asked[2] or last), last)
            else:
                first = max(0, size - int(asked[2]))
            if first > last:
                raise Refused(416, "", "Range Not Satisfiable")
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{size}"}
        length = last - first + 1
        self._begin(
            206 if asked else 200,
            headers | {"Accept-Ranges": "bytes", "Content-Length": str(length)},
        )
        if self.command == "HEAD":
            return
        sent = min(length, found.mark(".cut") or length)
        limit = found.mark(".limit")
        if limit is not None:
            sent = max(0, min(sent, limit - first))
        self.close_connection = sent < length
        with open(found.folder / entry["path"], "rb") as stream:
            stream.seek(first)
            self.wfile.write(stream.read(sent))

    def _send_value(
        self, value: Any, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        content = json.dumps(value).encode() if value is not None else b""
        self._begin(
            status,
            {"Content-Type": "application/json", "Content-Length": str(len(content))}
            | (headers or {}),
        )
        if self.command != "HEAD":
            self.wfile.write(content)

    def _begin(self, status: int, headers: dict[str, str]) -> None:
        self._status = status
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()


class Hub(ThreadingHTTPServer):
    """The hub of a folder, on a free port, while it is entered.

    Attributes:
        root: the folder.
        requests: all that were answered.
    """

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.requests: list[Request] = []

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()
