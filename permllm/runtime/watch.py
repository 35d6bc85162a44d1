"""Notice at once when another process of torchrun dies, whatever this one waits for, and end with one line that says so.

A process that is killed leaves the others in a sum that never comes, and torchrun ends them without a word on what becomes of
the run. So each helper keeps a connection to the first process. The operating system closes it when a process dies; a process
that ends by itself says before how.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from permllm.runtime.interruption import CONTINUES, Terminated

# How a process ends: its work is done; it failed and has said why; it was interrupted, as all processes of a command are.
DONE, FAILED, INTERRUPTED = b".", b"!", b"^"
# Seconds that the first process has to end by itself when a command is interrupted, and that the watch has to end a process
# whose communication failed.
_GRACE = 10.0
# Seconds within which a closed connection is seen. A process that dies closes it before torchrun can know.
_NEWS = 2.0
# Seconds for the helpers to connect.
_CONNECT = 300.0
# A machine that has lost its power or its network closes nothing; it is given up after 15 + 3 * 5 s.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
_TOKEN_BYTES, _RANK_BYTES = 16, 4


class Watch:
    """The connections of one process: of the first to all helpers, of a helper to the first.

    Args:
        rank: of this process.
        world_size: number of processes.
        broadcast: gives all processes a plain value of the first.

    Raises:
        OSError: a helper cannot reach the first process.
    """

    def __init__(self, rank: int, world_size: int, broadcast: Callable[[Any], Any]) -> None:
        self._first = rank == 0
        # One line for a death: of the first process, or of a helper on each machine when the first one died.
        self._speaks = rank <= 1 or os.environ.get("LOCAL_RANK") == "0"
        self._peers = _accepted(world_size - 1, broadcast) if self._first else {0: _connected(rank, broadcast)}
        self._closing = threading.Event()
        self._ending = threading.Lock()
        self._listeners: list[threading.Thread] = []
        for number, peer in self._peers.items():
            peer.settimeout(None)
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, seconds in _KEEPALIVE.items():
                if hasattr(socket, option):
                    peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
            listener = threading.Thread(target=self._listen, args=(number, peer), daemon=True)
            listener.start()
            self._listeners.append(listener)
        # torchrun sends it to all others when a process has died. By default they would end before they have said anything.
        self._before = signal.signal(signal.SIGTERM, self._terminated)

    def give_time(self) -> None:
        """Let the watch end this process where communication failed because another one is gone; else return after a while."""
        time.sleep(_GRACE)

    def close(self, word: bytes) -> None:
        """Tell the others how this process ends (`DONE`, `FAILED`, `INTERRUPTED`), and watch no more."""
        self._closing.set()
        signal.signal(signal.SIGTERM, self._before)
        self._say(word)
        # No thread may be left in a call when the interpreter ends.
        for peer in self._peers.values():
            with contextlib.suppress(OSError):
                peer.shutdown(socket.SHUT_RDWR)
        for listener in self._listeners:
            listener.join(_NEWS)
        for peer in self._peers.values():
            peer.close()

    def _say(self, word: bytes) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # it is gone
                peer.sendall(word)

    def _listen(self, rank: int, peer: socket.socket) -> None:
        try:
            word = peer.recv(1)
        except OSError:
            word = b""
        if word == INTERRUPTED and self._first:
            self._closing.wait(_GRACE)
        if word == DONE or self._closing.is_set():
            return
        with self._ending:  # not left again
            self._say(FAILED)
            if word == b"" and self._speaks:
                reason = "killed, crashed, or lost with its machine"
                print(f"\nerror: the process of rank {rank} died ({reason}): {CONTINUES}", file=sys.stderr, flush=True)
            # Whatever the main thread waits for may never come. A record is made for a process that ends at any time.
            os._exit(1)

    def _terminated(self, *_: Any) -> None:
        time.sleep(_NEWS)
        raise Terminated(signal.SIGTERM)


def _accepted(helpers: int, broadcast: Callable[[Any], Any]) -> dict[int, socket.socket]:
    """In the first process: a connection of each helper, by rank."""
    token = secrets.token_bytes(_TOKEN_BYTES)
    both = socket.has_dualstack_ipv6()
    peers: dict[int, socket.socket] = {}
    with socket.create_server(
        ("", 0), family=socket.AF_INET6 if both else socket.AF_INET, backlog=helpers, dualstack_ipv6=both
    ) as server:
        server.settimeout(_CONNECT)
        broadcast([server.getsockname()[1], token.hex()])
        while len(peers) < helpers:
            peer, _ = server.accept()
            peer.settimeout(_CONNECT)
            hello = peer.recv(_TOKEN_BYTES + _RANK_BYTES, socket.MSG_WAITALL)
            if secrets.compare_digest(hello[:_TOKEN_BYTES], token):
                peers[int.from_bytes(hello[_TOKEN_BYTES:], "big")] = peer
            else:
                peer.close()
    return peers


def _connected(rank: int, broadcast: Callable[[Any], Any]) -> socket.socket:
    """In a helper: the connection to the first process, which runs where torchrun's meeting point is."""
    port, token = broadcast(None)
    peer = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=_CONNECT)
    peer.sendall(bytes.fromhex(token) + rank.to_bytes(_RANK_BYTES, "big"))
    return peer
