"""`rank_pattern` and `alpha_pattern` match what PEFT itself matches."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st
from peft.utils.other import get_pattern_key

from loratool.adapters.patterns import match_patterns

PATHS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.0.mlp.gate_proj",
    "q_proj",
    "lm_head",
    "xq_proj",
]
PATTERNS = [
    "q_proj",
    "proj",
    "self_attn",
    "layers.1",
    "0.self_attn.q_proj",
    "model.layers.0.self_attn.q_proj",
    "^model.layers.0.self_attn.q_proj",
    "^q_proj",
    r".*\.q_proj",
    r"layers\.(0|1)\.self_attn\.q_proj",
    "q_proj|lm_head",
    ".*",
    r"layers\.\d+\.mlp\..*",
    "q.proj",
    "lm_hea.",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_pattern_matches_as_in_peft(pattern: str) -> None:
    found = match_patterns([pattern], PATHS)
    for path in PATHS:
        # PEFT gives back the pattern that matches, else the path itself
        assert (pattern in found[path]) == (get_pattern_key([pattern], path) == pattern), path


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from([p for p in PATTERNS if not set(p) & set("*+?{(")]), min_size=1, max_size=4, unique=True)
)
def test_the_first_match_is_that_of_peft(patterns: list[str]) -> None:
    found = match_patterns(patterns, PATHS)
    for path in PATHS:
        first = next((p for p in patterns if p in found[path]), path)
        assert first == get_pattern_key(patterns, path)


def test_a_pattern_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.adapters.patterns.PATTERN_SECONDS", 0.5)
    with pytest.raises(ValueError, match="takes too long"):
        match_patterns(["(([a-z.]+)+)+!"], ["model.layers.zero.self.attn.q.proj.and.more.of.it"])
