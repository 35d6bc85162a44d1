"""A hub on loopback, spoken to by huggingface_hub, datasets and lm-eval as they are installed.

It serves a folder of repositories, `models/OWNER/NAME` and `datasets/OWNER/NAME`, each with one
branch, and reads it anew at each request. As on the hub, a commit is 40 hex digits, here of the
content, and failures have an X-Error-Code. `GRANTED` reads gated repositories, and any other token
is refused. Files mark a repository: `.gated`, and `.limit`, a number of bytes after which the body
of a file breaks.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

GRANTED = "hf_granted"
_API = re.compile(r"/api/(\w+)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(?:/(.*))?)?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class Refused(Exception):
    """An answer that is an error: status, X-Error-Code and message."""


class Repository:
    """The files of a repository, and their commit."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, {}
        for path in sorted(folder.rglob("*")):
            if path.is_file() and path.name not in (".gated", ".limit"):
                name, content = path.relative_to(folder).as_posix(), path.read_bytes()
                entry = {"type": "file", "path": name, "size": len(content)}
                self.files[name] = entry | {"oid": hashlib.sha1(content).hexdigest()}
        self.commit = hashlib.sha1(json.dumps([folder.name, self.files]).encode()).hexdigest()

    def tree(self, under: str, recursive: bool) -> list[dict[str, Any]]:
        """Files and folders below a folder."""
        found = {Path(name): entry for name, entry in self.files.items()}
        for folder in [folder for file in found for folder in file.parents[:-1]]:
            found[folder] = {"type": "directory", "path": str(folder), "size": 0, "oid": "0" * 40}
        inside = [path for path in found if Path(under) in path.parents]
        return [found[path] for path in inside if recursive or path.parent == Path(under)]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        self.server.requests.append((self.command, self.path))
        try:
            self._route(unquote(urlsplit(self.path).path))
        except Refused as refusal:
            status, code, message = refusal.args
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self._send(status, json.dumps({"error": message}).encode(), headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """The server keeps its own list."""

    def _route(self, path: str) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        of_api, of_file = _API.fullmatch(path), _FILE.fullmatch(path)
        if token not in (None, GRANTED):
            raise Refused(401, "", "Invalid credentials in Authorization header")
        if of_api:
            kind, name, what, revision, under = of_api.groups(default="")
        elif of_file:
            kind, name, revision = "datasets" if of_file[1] else "models", of_file[2], of_file[3]
        else:
            raise Refused(404, "", f"no such page: {path}")
        if not (self.server.root / kind / name).is_dir():
            raise Refused(404 if token else 401, "RepoNotFound", "Repository not found")
        found = Repository(self.server.root / kind / name)
        gated = (found.folder / ".gated").exists()
        if revision not in ("", "main", found.commit):
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if of_file and gated and token != GRANTED:
            raise Refused(401, "GatedRepo", f"Access to {name} is restricted")
        if of_file:
            return self._send_file(found, of_file[4])
        siblings = [{"rfilename": file} for file in found.files]
        value: Any = {"id": name, "sha": found.commit, "gated": gated, "siblings": siblings}
        if what == "tree":
            value = found.tree(under, "recursive=true" in self.path)
        self._send(200, json.dumps(value).encode(), {})

    def _send_file(self, found: Repository, name: str) -> None:
        if name not in found.files:
            raise Refused(404, "EntryNotFound", f"no {name}")
        headers = {"X-Repo-Commit": found.commit, "ETag": f'"{found.files[name]["oid"]}"'}
        content = (found.folder / name).read_bytes()
        limit = found.folder / ".limit"
        room = int(limit.read_text()) if limit.exists() else len(content)
        self._send(200, content, headers, room)

    def _send(
        self, status: int, content: bytes, headers: dict[str, str], room: int = 1 << 30
    ) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:room])
            self.close_connection = room < len(content)


class Hub(ThreadingHTTPServer):
    """The hub of a folder, on a free port; `requests` are the method and path of each."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.requests: list[tuple[str, str]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()
