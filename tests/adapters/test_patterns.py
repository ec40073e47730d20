"""`rank_pattern` and `alpha_pattern` match what PEFT itself matches."""

from __future__ import annotations

import re

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


PLACES = st.text("ab.-_", max_size=6)
LITERAL = st.tuples(
    st.sampled_from(["", "^"]),
    st.lists(st.sampled_from(["a", "b", ".", r"\.", r"\-", "-", "_"]), min_size=1, max_size=5).map("".join),
    st.sampled_from(["", "$"]),
).map("".join)


@settings(max_examples=200, deadline=None)
@given(st.sets(LITERAL, min_size=1, max_size=4), st.sets(PLACES, min_size=1, max_size=4))
def test_patterns_that_are_looked_up_match_as_expressions_do(patterns: set[str], paths: set[str]) -> None:
    """Those of one length, in which a dot may be any character, or escaped."""
    found = match_patterns(patterns, paths)
    for path in paths:
        matching = {pattern for pattern in patterns if re.match(rf"^(.*\.)?({pattern})$", path)}
        assert found[path] == matching or (not matching and found[path] == {path})


def test_an_adapter_may_have_a_pattern_for_each_of_thousands_of_modules() -> None:
    """Anchored or not, as resizing writes them; tried one by one they took longer than the time limit."""
    paths = [f"model.layers.{number // 100}.mlp.experts.{number % 100}.up_proj" for number in range(4000)]
    patterns = [path if number % 2 else f"^{path}" for number, path in enumerate(paths)]
    assert match_patterns(patterns, paths) == {path: {own} for path, own in zip(paths, patterns, strict=True)}


def test_a_pattern_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratool.adapters.patterns.PATTERN_SECONDS", 0.5)
    with pytest.raises(ValueError, match="takes too long"):
        match_patterns(["(([a-z.]+)+)+!"], ["model.layers.zero.self.attn.q.proj.and.more.of.it"])
