"""What the repositories of the tests of fetching hold, and what of it was downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hub_server import HubServer

SHARDS, HIDDEN = 3, 64


NOT_NEEDED = {
    "pytorch_model.bin": "pickled twin",
    "pytorch_model.bin.index.json": "{}",
    "model.gguf": "GGUF",
    "original/consolidated.00.pth": "original",
    "onnx/model.onnx": "onnx",
    "optimizer.pt": "state",
    "checkpoint-10/trainer_state.json": "{}",
    "checkpoint-10/model.safetensors": "state",
    "runs/events.out.tfevents.1": "logs",
    ".gitattributes": "lfs",
    "stale-00001-of-00009.safetensors": "stale",
}


NEEDED = {
    "tokenizer.json": "{}",
    "generation_config.json": "{ }",
    "LICENSE": "terms",
    "extra/notes.txt": "hello, world\n",
}


def downloaded(hub: HubServer, name: str) -> set[str]:
    """The files of a repository of which any byte of content was sent."""
    names = {blob.sha256: path for commit in hub.repos[name].commits.values() for path, blob in commit.items()}
    served = {
        r.path.partition("/resolve/")[2].partition("/")[2] for r in hub.asked("GET", f"^/{name}/resolve/") if r.sent
    }
    return served | {names[r.path.split("/")[2]] for r in hub.asked("GET", "^/cdn/") if r.path.split("/")[2] in names}
