"""Adapters of several dialects on the Hub: what is told of them from their headers is what is told of their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from dialect_samples import DIALECTS, PARTS

import loratool

if TYPE_CHECKING:
    from hub_client import Client
    from hub_server import HubServer

# Three of them have their alpha in a tensor, which no header tells.
SAMPLES = {**DIALECTS, **PARTS}
NAMES = ("kohya", "comfy", "kohya, DoRA", "diffusers", "mlx", "gguf")


def without_place(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in ("schema", "path", "cost", "name")}


@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_is_inspected_on_the_hub_as_on_this_disk(
    name: str, hub: HubServer, client: Client, tmp_path: Path
) -> None:
    """With every alpha and scaling, also where these are the values of small tensors."""
    here = SAMPLES[name].write(tmp_path / "adapter")
    hub.add("org/adapter", tmp_path / "adapter")
    there = json.loads(client.works("inspect", "org/adapter", "--json").out)["results"][0]
    assert without_place(there) == without_place(json.loads(json.dumps(loratool.inspect(here).to_dict())))
