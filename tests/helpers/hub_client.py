"""The command line as a process of its own that takes a test's server for the Hub.

Each run is a fork of a process that has imported torch and the Hub's client already, for these imports take longer
than all else. The client reads its settings when it is imported: a fork reads them anew, which are those of the run.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import re
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module, reload
from pathlib import Path
from pkgutil import walk_packages
from typing import IO, TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from hub_server import HubServer


PRELOADED = ("safetensors", "torch", "tqdm.auto", "yaml", "concurrent.futures", "huggingface_hub.hf_api")
# what some releases of the Hub's client are built on and import late
CLIENTS = (
    *("httpx2", "httpx", "httpcore2", "httpcore", "h11", "anyio.streams.tls", "truststore", "hf_xet", "rich.console"),
    *("filelock", "configparser", "decimal", "hmac", "secrets", "stringprep", "encodings.idna"),
)


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str


class Nursery:
    """The process that forks."""

    def __init__(self) -> None:
        own = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "SSL_CERT_"))}
        own |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "NO_PROXY": "*"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.busy = False
        atexit.register(self.process.wait)
        atexit.register(self.process.kill)

    @property
    def pipes(self) -> tuple[IO[str], IO[str]]:
        assert self.process.stdin
        assert self.process.stdout
        return self.process.stdin, self.process.stdout

    def fork(self, order: dict[str, Any]) -> int:
        """The process id of a run."""
        send, answers = self.pipes
        if self.busy:  # a test failed before it saw the end of its run
            answers.readline()
        self.busy = True
        send.write(json.dumps(order) + "\n")
        send.flush()
        return int(answers.readline())

    def wait(self) -> int:
        """The exit code of that run; negative is the signal that ended it."""
        self.busy = False
        return int(self.pipes[1].readline())


NURSERY: list[Nursery] = []


@dataclass
class Client:
    """A user with a cache and perhaps a token."""

    hub: HubServer
    home: Path  # the cache, and where output is kept until it is read
    token: str | None = None

    def begin(self, *words: object, cwd: Path | None = None, code: str = "", **more: str) -> int:
        """Start a command, or with `code` a program that sees the words as `sys.argv[1:]`; the process id."""
        self.home.mkdir(exist_ok=True)
        if not NURSERY:
            NURSERY.append(Nursery())
        # without a Xet end point a client that has hf_xet fails to upload: it decides for itself, and asks no server
        settings = {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(self.home), "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"} | (
            {"HF_TOKEN": self.token} if self.token else {}
        )
        settings["SSL_CERT_DIR"] = str(self.home)  # no list of authorities is read for a server that speaks no TLS
        order = {"words": [str(word) for word in words], "settings": settings | more, "home": str(self.home)}
        return NURSERY[0].fork(order | {"cwd": str(cwd or self.home), "code": code})

    def end(self) -> Ran:
        """How the command that was begun ended. Whatever it did, it told nobody a token."""
        code = NURSERY[0].wait()
        out, err = ((self.home / name).read_text() for name in ("stdout", "stderr"))
        for text in (out, err):
            assert not re.search(r"hf_[A-Za-z]{10}", text), text
        return Ran(code, out, err)

    def kill(self, pid: int, number: signal.Signals) -> None:
        """Send a signal to a run, which may have ended."""
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def run(self, *words: object, cwd: Path | None = None, **more: str) -> Ran:
        self.begin(*words, cwd=cwd, **more)
        return self.end()

    def program(self, code: str, *words: object) -> Ran:
        """Run a program of Python."""
        self.begin(*words, code=code)
        return self.end()

    def works(self, *words: object, cwd: Path | None = None, **more: str) -> Ran:
        """Run a command that must work."""
        ran = self.run(*words, cwd=cwd, **more)
        assert ran.code == 0, ran
        return ran

    def refused(self, *words: object, code: int = 7, cwd: Path | None = None, **more: str) -> str:
        """Run a command that must end with `code` and one message, which is returned."""
        ran = self.run(*words, cwd=cwd, **more)
        assert ran.code == code, ran
        assert ran.out == "", ran
        assert [line.startswith("Error:") for line in ran.err.splitlines()].count(True) == 1, ran
        assert "Traceback" not in ran.err, ran
        assert "bug" not in ran.err, ran
        return ran.err


def read_settings() -> None:
    """Let the Hub's client have the settings of this process's environment, also where it keeps copies of them."""
    from huggingface_hub import constants, hf_api

    settings = vars(reload(constants))
    for name, module in list(sys.modules.items()):
        if name.startswith("huggingface_hub.") and module is not constants:
            vars(module).update({key: settings[key] for key in vars(module).keys() & settings if key.isupper()})
    hf_api.api.endpoint = constants.ENDPOINT


def run_program(code: str) -> NoReturn:
    """Run a program and end the process as Python would."""
    failed = 0
    try:
        exec(code, {})
    except BaseException:
        traceback.print_exc()
        failed = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(failed)


def serve() -> None:
    """Fork for each order: print the process id, wait, print the exit code."""
    import loratool
    import loratool.cli

    for name in (*PRELOADED, *(module.name for module in walk_packages(loratool.__path__, "loratool."))):
        import_module(name)
    for name in CLIENTS:
        with suppress(ImportError):
            import_module(name)
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            os.environ.update(order["settings"])
            read_settings()
            os.chdir(order["cwd"])
            for number, name in ((1, "stdout"), (2, "stderr")):
                file = os.open(Path(order["home"], name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
                os.dup2(file, number)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv = ["loratool", *order["words"]]
            if order["code"]:
                run_program(order["code"])
            loratool.cli.main()
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
