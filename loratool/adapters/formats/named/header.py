"""What tools write into the header of a file: which of them made it, how it was trained, and α where no tensor holds it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loratool.errors import Problem, printable
from loratool.files.inputs import json_object
from loratool.files.safefile import SafeFile

CONFIGS = "lora_adapter_metadata"  # of diffusers: PEFT's configs of all components, their fields as `unet.r`
CONTRADICTION = "config-against-tensors"  # the code of a problem
# Which tool wrote a file: the entry that it leaves, and what is found in it.
TOOLS = (
    ("ai-toolkit", "software", re.compile(r'"name"\s*:\s*"ai-toolkit"')),
    ("onetrainer", "ot_revision", re.compile("")),
    ("onetrainer", "ot_branch", re.compile("")),
    ("onetrainer", "ot_config", re.compile("")),
    (
        "musubi",
        "ss_network_module",
        re.compile(r"networks\.lora_(?:wan|framepack|qwen_image|hv_1_5|kandinsky\w*|zimage|flux_2)\b"),
    ),
)
COMPONENT = re.compile(r"(unet|prior|transformer(?:_2)?|text_encoder(?:_[23])?)\.(.+)", re.DOTALL)


@dataclass(frozen=True)
class Header:
    """The metadata of one file."""

    metadata: Mapping[str, str]

    @classmethod
    def of(cls, file: SafeFile) -> Header:
        return cls(file.layout.metadata or {})

    @cached_property
    def tool(self) -> str:
        """The tool that wrote the file, where its entry says so; else empty."""
        held = ((tool, self.metadata[key], mark) for tool, key, mark in TOOLS if key in self.metadata)
        return next((tool for tool, text, mark in held if mark.search(text)), "")

    @property
    def has_configs(self) -> bool:
        return CONFIGS in self.metadata

    @property
    def is_lycoris(self) -> bool:
        return self.metadata.get("ss_network_module", "").startswith("lycoris")

    @property
    def base(self) -> str:
        """The model that was trained, as kohya's tools name it: a file, or a repository on the Hub."""
        return self.metadata.get("ss_sd_model_name", "")

    @property
    def rank(self) -> int | None:
        """The rank that was asked for; modules may have others."""
        text = self.metadata.get("ss_network_dim", "")
        return int(text) if text.isdecimal() and len(text) < 9 else None

    def configs(self, problems: list[Problem]) -> dict[str, dict[str, Any]]:
        """The configs of diffusers' header by component; that of a file without components is under an empty name."""
        text = self.metadata.get(CONFIGS)
        if text is None:
            return {}
        try:
            table = json_object(text.encode("utf-8", "surrogatepass"), lenient=True)
        except ValueError as error:
            problems.append(Problem(f"{CONFIGS} in the header: {printable(error)}", CONTRADICTION))
            return {}
        found: dict[str, dict[str, Any]] = {}
        for key, value in table.items():
            component, name = match.groups() if (match := COMPONENT.fullmatch(key)) else ("", key)
            found.setdefault(component, {})[name] = value
        return found
