"""A Hub and a store on loopback for commands on simulated systems, and the commands that read and write there.

Both are the servers of all tests of the Hub and of stores, and the clients are the real ones. Each system finds both as
the one before it did: `cleared` takes away what its commands have made.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from hub_client import read_settings
from hub_server import WRITER, HubServer
from store_server import StoreServer

from loratool.cli import run

INPUTS, MADE = "inputs-elsewhere", "made-elsewhere"  # buckets
BASE, ADAPTER, OUT = f"s3://{INPUTS}/base", f"s3://{INPUTS}/adapter", f"s3://{MADE}"
ONE = ["merge", f"s3://{INPUTS}/one.safetensors", "org/adapter", "-o", f"{OUT}/one.safetensors", "-v"]
STEPS = f"steps:\n- rescale: {{adapter: org/adapter, scale: 2, output: {OUT}/doubled}}\n"

# Each takes several kinds of places at once, for they cost requests.
COMMANDS = [
    ["merge", "auto", "org/adapter", "-o", "made/from-hub", "--digests", "full", "-v"],
    ["merge", "hf://org/base@main", ADAPTER, "--stream", "--push-to-hub", "alice/streamed", "-v"],
    ["merge", BASE, ADAPTER, "-o", f"{OUT}/merged", "--also", "made/also=org/adapter", "-v"],
    [*ONE, "--part", "1/2"],
    ["merge", "-o", f"{OUT}/one.safetensors", "--abort", "-v"],
    *([*ONE, *way] for way in (["--part", "1/1"], ["--status"], ["--finish"])),
    ["verify", f"{OUT}/merged", "-v"],
    ["verify", "alice/streamed", "--base", "org/base", "--adapter", ADAPTER, "-v"],
    ["inspect", "org/base", "org/adapter", BASE, ADAPTER, "-v"],
    ["inspect", "org/adapter", "--base", "org/base", "--values", "--check", "-v"],
    ["rescale", "org/adapter", "-o", f"{OUT}/scaled", "--scale", "0.5", "--push-to-hub", "alice/scaled", "-v"],
    ["rescale", ADAPTER, "-o", "made/rescaled", "--scale", "0.5", "-v"],
    ["resize", ADAPTER, "-o", f"{OUT}/small", "--rank", "1", "--push-to-hub", "alice/small", "-v"],
    ["resize", "alice/scaled", "-o", "made/resized", "--rank", "1", "-v"],
    ["combine", "org/adapter", f"{OUT}/scaled", "-o", f"{OUT}/both", "--push-to-hub", "alice/both", "-v"],
    [
        "extract",
        "org/base",
        f"{OUT}/merged",
        "-o",
        f"{OUT}/difference",
        "--rank",
        "2",
        "--push-to-hub",
        "alice/it",
        "-v",
    ],
    ["compare", "org/adapters@main:style", f"{OUT}/scaled", "-v"],
    ["estimate", "org/base", "--rank", "4", "--target", "q_proj", "-v"],
    ["estimate", BASE, "--rank", "4", "--target", "q_proj", "-v"],
    ["plan", "org/base", ADAPTER, "--simulate", "1,2", "-v"],
    ["convert", "org/adapter", "-o", f"{OUT}/mlx", "--to", "mlx", "--base", BASE, "--push-to-hub", "alice/mlx", "-v"],
    ["convert", ADAPTER, "-o", f"{OUT}/adapter.gguf", "--to", "gguf", "--base", BASE, "-v"],
    ["compress", "org/adapter", f"{OUT}/scaled", "-o", f"{OUT}/fleet", "--rank", "2", "-v"],
    ["expand", f"{OUT}/fleet", "scaled", "-o", f"{OUT}/expanded", "--push-to-hub", "alice/expanded", "-v"],
    ["expand", "org/fleet", "scaled", "-o", "made/from-fleet", "-v"],
    [
        *("rebase", "org/adapter", "--from", BASE, "--onto", f"{OUT}/merged", "--force"),
        *("-o", f"{OUT}/rebased", "--push-to-hub", "alice/rebased", "-v"),
    ],
    ["index", "org/adapter", f"{OUT}/scaled", "-o", "made/places.index", "-v"],
    ["record", f"{OUT}/merged", "-v"],
    ["reproduce", f"{OUT}/scaled", "-o", f"{OUT}/again", "-v"],
    ["run", "in/elsewhere.yaml", "-v"],
    ["run", "in/elsewhere.yaml", "-v"],
    ["push", "made/from-hub", "alice/pushed", "-v"],
    ["push", f"{OUT}/merged", "alice/from-store", "-v"],
]
# Those that make something.
MAKING = [words for words in COMMANDS if {"-o", "--push-to-hub", "push", "run"} & {*words} and "--status" not in words]


def kinds_of(words: Sequence[str]) -> set[str]:
    """What kinds of places a command was given."""
    found = set()
    for before, word in zip(("", *words), words, strict=False):
        distant = "Hub" if re.match(r"(org|alice)/|hf://", word) else "store" if word.startswith("s3://") else ""
        match before, distant:
            case _, "":
                pass
            case (("-o" | "--output"), _):
                found.add(f"into a {distant}")
            case "--push-to-hub", _:
                found.add("to the Hub")
            case _:
                found.add(distant)
    return found


@dataclass(frozen=True)
class Elsewhere:
    """Both servers, with models and adapters in each."""

    hub: HubServer
    store: StoreServer

    def settings(self, root: Path) -> dict[str, str]:
        """The environment of a process that uses both and keeps what it needs below `root`."""
        (root / "temp").mkdir()
        client = {"HF_ENDPOINT": self.hub.endpoint, "HF_HOME": str(root / "cache"), "HF_TOKEN": WRITER}
        client |= {f"HF_HUB_{name}": "1" for name in ("DISABLE_XET", "DISABLE_TELEMETRY", "DISABLE_SYMLINKS_WARNING")}
        more = {"HF_HUB_OFFLINE": "0", "SSL_CERT_DIR": str(root), "TMPDIR": str(root / "temp")}
        return {**client, **more, **self.store.environment}

    def cleared(self) -> dict[str, bytes]:
        """All that commands have put there, by its address; afterwards it is gone."""
        own = [name for name in self.hub.repos if name.startswith("alice/")]
        found = {f"{name}/{path}": content for name in own for path, content in self.hub.files(name).items()}
        assert self.store.uploads(MADE) == []
        for name in own:
            del self.hub.repos[name]
        objects = self.store.everything(MADE)
        if objects:  # else the request itself is wrong
            self.store.client.delete_objects(Bucket=MADE, Delete={"Objects": [{"Key": name} for name in objects]})
        return found | {f"{OUT}/{name}": content for name, content in objects.items()}


@contextmanager
def serving(inputs: Path, scratch: Path) -> Iterator[Elsewhere]:
    """Both servers, with the folders base, adapter and fleet and the file one.safetensors of `inputs`."""
    shutil.copytree(inputs / "adapter", scratch / "styles" / "style")
    named = shutil.copytree(inputs / "adapter", scratch / "named")
    config = json.loads((named / "adapter_config.json").read_bytes())
    (named / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/base"}))
    with HubServer() as hub, StoreServer() as store:
        for name, folder in (("base", inputs / "base"), ("fleet", inputs / "fleet")):
            hub.add(f"org/{name}", folder)
        hub.add("org/adapter", named)
        hub.add("org/adapters", scratch / "styles")
        for name in ("base", "adapter"):
            store.put(INPUTS, inputs / name, name)
        body = (inputs / "one.safetensors").read_bytes()
        store.client.put_object(Bucket=INPUTS, Key="one.safetensors", Body=body)
        store.client.create_bucket(Bucket=MADE)
        yield Elsewhere(hub, store)


def run_apart(commands: Sequence[Sequence[str]], root: Path, settings: dict[str, str]) -> list[int]:
    """The exit codes of commands in a forked copy of this process, in which the Hub's client has these settings."""
    codes, told = os.pipe()
    if not (pid := os.fork()):
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            os.environ.update(settings)
            tempfile.tempdir = None  # where it was is known already
            read_settings()
            os.chdir(root)
            os.write(told, bytes(run([*words]) for words in commands))
        finally:
            os._exit(0)
    os.close(told)
    with os.fdopen(codes, "rb") as stream:
        found = [*stream.read()]
    os.waitpid(pid, 0)
    return found
