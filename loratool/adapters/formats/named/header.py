"""What tools write into the header of a file: which of them made it, how it was trained, and α where no tensor holds it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from loratool.errors import Problem, printable
from loratool.files.safefile import SafeFile
from loratool.files.untrusted import json_object
from loratool.notes import Note

CONFIGS = "lora_adapter_metadata"  # of diffusers: PEFT's configs of all components, their fields as `unet.r`
CONTRADICTION = "config-against-tensors"  # the code of a problem
# Which tool wrote a file: the entry that it leaves, and what is found in it.
TOOLS = (
    ("ai-toolkit", "software", re.compile(r'"name"\s*:\s*"ai-toolkit"')),
    ("onetrainer", "ot_revision", re.compile("")),
    ("onetrainer", "ot_branch", re.compile("")),
    ("onetrainer", "ot_config", re.compile("")),
    ("simpletuner", "lycoris_config", re.compile("")),
    (
        "musubi",
        "ss_network_module",
        re.compile(r"networks\.lora_(?:wan|framepack|qwen_image|hv_1_5|kandinsky\w*|zimage|flux_2)\b"),
    ),
)
ALPHAS = re.compile(r"(?:lora_|network_|ss_network_)?alpha")  # entries of the header
NUMBER = re.compile(r"\d{1,9}(?:\.\d{1,9})?")
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

    @property
    def splits_qkv(self) -> bool:
        """Whether kohya's tools trained parts of fused layers apart."""
        return (
            re.search(r'"split_qkv"\s*:\s*"?true', self.metadata.get("ss_network_args", ""), re.IGNORECASE) is not None
        )

    def idle_alphas(self, ranks: Collection[int]) -> Iterator[Note]:
        """A note for each entry with an alpha, of a file whose modules have none, that differs from one of their ranks."""
        for key, text in self.metadata.items():
            number = NUMBER.fullmatch(text) if ALPHAS.fullmatch(key) else None
            if number and any(float(text) != rank for rank in ranks):
                said = f"the header has {printable(key)} {text}, which tools that read such files do not apply"
                yield Note("alpha-in-header-not-used", f"{said}; pass --input-alpha {text} to apply it")

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
