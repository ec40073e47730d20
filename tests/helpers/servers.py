"""Servers that tests start on this machine: on 127.0.0.1 alone, and stopped by the ids of their processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

STARTED = 90.0  # seconds within which a server must answer
STOPPED = 30.0  # seconds within which it must end when it is told to


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster of one node."""

    address: str  # for a driver on this machine
    client: str  # for a driver anywhere, ray://HOST:PORT
    settings: Mapping[str, str]  # environment of a driver
    server: subprocess.Popen[bytes]

    @property
    def workers(self) -> list[int]:
        """The ids of the processes that run tasks of loratool now."""
        return [pid for pid in descendants(self.server.pid) if b"ray::make_share" in command_line(pid)]


@contextmanager
def serving(words: Sequence[str], port: int, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that listens on a port; it and all that it has started end with this."""
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=said, stderr=said, env={**os.environ, **settings}
        )
        try:
            wait_for(server, port, said)
            yield server
        finally:
            stop(server)


def wait_for(server: subprocess.Popen[bytes], port: int, said: IO[bytes]) -> None:
    """Wait until a server listens. Raises `AssertionError` with what it said where it does not."""
    deadline = time.monotonic() + STARTED
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    said.seek(0)
    raise AssertionError(f"{server.args!r} does not answer: {said.read()[-3000:]!r}")


def stop(server: subprocess.Popen[bytes]) -> None:
    """End a server and its descendants, those that do not end by themselves by force."""
    family = descendants(server.pid)
    server.terminate()
    with suppress(subprocess.TimeoutExpired):
        server.wait(STOPPED)
    for pid in (server.pid, *family):
        with suppress(OSError):
            if command_line(pid):  # an id that is free again is nobody's
                os.kill(pid, signal.SIGKILL)
    server.wait()


def descendants(pid: int) -> list[int]:
    """The ids of the processes that a process has started, and those that these have started."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        own = children.get(todo.pop(), [])
        found += own
        todo += own
    return found


def command_line(pid: int) -> bytes:
    """The words of a process; empty where there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
