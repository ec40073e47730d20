"""The command line in a forked copy of this process, for the import of torch takes longer than a small merge does.

What runs is `loratool.cli.main`, in a process group of its own and with the handlers of signals that a new process has.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import IO

import torch

from loratool import cli

for name in ("loratool.commands.merge", "loratool.results.merge"):
    import_module(name)  # here, so that no fork has to


def nameless_file() -> IO[str]:
    return tempfile.TemporaryFile("w+", encoding="utf-8", errors="surrogateescape")


class Forked:
    """A command under way; what `subprocess.Popen` has of names means the same here."""

    def __init__(self, words: Sequence[str], prepare: Callable[[], object] | None = None) -> None:
        """Begin `loratool WORDS`, after `prepare` in its process."""
        self.returncode: int | None = None
        self.streams = [nameless_file() for _ in range(2)]
        self.pid = os.fork()
        if not self.pid:
            try:
                self.work(words, prepare)
            except BaseException:
                os.write(2, traceback.format_exc().encode())
            finally:
                os._exit(99)

    def work(self, words: Sequence[str], prepare: Callable[[], object] | None) -> None:
        gc.freeze()
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, stream in enumerate(self.streams, 1):
            os.dup2(stream.fileno(), number)
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ["LORATOOL_TEST_SYNC"] = "1"
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        if prepare is not None:
            prepare()
        sys.argv = ["loratool", *words]
        cli.main()

    def poll(self) -> int | None:
        """The exit status; -n after signal n, None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """All it said on stdout and on stderr, when it has ended."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill()
                raise TimeoutError(f"still running after {timeout} s")
            time.sleep(0.002)
        said = []
        for stream in self.streams:
            stream.seek(0)
            said.append(stream.read())
            stream.close()
        return said[0], said[1]
