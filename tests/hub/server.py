"""A hub on loopback, spoken to by huggingface_hub, datasets and lm-eval as they are installed.

It serves a folder of repositories, `models/OWNER/NAME` and `datasets/OWNER/NAME`, each with one
branch, and reads it anew at each request. As on the hub, a commit is 40 hex digits, here of the
content, and failures have an X-Error-Code. Files mark a repository: `.gated`, which `GRANTED`
reads, and `.limit`, a number of bytes after which the body of a file breaks.
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
_API = re.compile(r"/api/(\w+)/([^/]+/[^/]+)(?:/(revision|tree)/[^/]+(?:/(.*))?)?")
_FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")


def entries(folder: Path) -> dict[str, dict[str, Any]]:
    """The files and folders of a repository, as the hub lists them."""
    found = {}
    for path in sorted(folder.rglob("[!.]*")):
        name, content = str(path.relative_to(folder)), path.read_bytes() if path.is_file() else b""
        found[name] = {"type": "file" if path.is_file() else "directory", "path": name}
        found[name] |= {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    return found


def commit(folder: Path) -> str:
    """The commit of a repository."""
    return hashlib.sha1(json.dumps([folder.name, entries(folder)]).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        kind = name = what = under = ""
        if of_file := _FILE.fullmatch(path):
            kind, what = "datasets" if of_file[1] else "models", "file"
            name, under = of_file[2], of_file[3]
        elif of_api := _API.fullmatch(path):
            kind, name, what, under = of_api.groups(default="")
        folder = self.server.root / kind / name
        found = entries(folder)
        gated = (folder / ".gated").exists()
        if not name or not folder.is_dir():
            self._send(404, {"X-Error-Code": "RepoNotFound"})
        elif what != "file":
            files = [{"rfilename": one} for one in found if found[one]["type"] == "file"]
            value: Any = {"id": name, "sha": commit(folder), "gated": gated, "siblings": files}
            if what == "tree":
                below = [one for one in found if Path(under) in Path(one).parents]
                deep = "recursive=true" in self.path
                value = [found[one] for one in below if deep or Path(one).parent == Path(under)]
            self._send(200, {}, json.dumps(value).encode())
        elif gated and self.headers.get("Authorization") != f"Bearer {GRANTED}":
            message = f"Access to {name} is restricted"
            self._send(401, {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
        elif under not in found:
            self._send(404, {"X-Error-Code": "EntryNotFound"})
        else:
            headers = {"X-Repo-Commit": commit(folder), "ETag": f'"{found[under]["oid"]}"'}
            content, limit = (folder / under).read_bytes(), folder / ".limit"
            headers["Content-Length"] = str(len(content))
            self._send(200, headers, content[: int(limit.read_text()) if limit.exists() else None])

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """The server keeps its own list."""

    def _send(self, status: int, headers: dict[str, str], content: bytes = b"") -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class Hub(ThreadingHTTPServer):
    """The hub of a folder, on a free port; `requests` are the method and path of each."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root, self.requests = root, list[str]()
        threading.Thread(target=self.serve_forever, daemon=True).start()
