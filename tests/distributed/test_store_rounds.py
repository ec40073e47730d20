"""Merges into an object store under faults, kills and races: the output is right, or the run says what is wrong."""

from __future__ import annotations

import dataclasses
import json
import random
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import faults
import pytest
from forks import Forked
from peft_files import save_peft
from servers import free_port, serving
from store_merges import PIECE, SMALLEST, assert_same, make_models, small_parts, write_holes
from store_server import BUCKET, Asked, Fault, StoreServer, stormy

import loratool
from loratool.errors import HubError, InputError, LoratoolError
from loratool.files import stand_ins
from loratool.merging import parted_merge
from loratool.stores import client
from loratool.stores.limits import limits

BASE, ADAPTER = f"s3://{BUCKET}/team/base", f"s3://{BUCKET}/team/adapter"
KILLS, STORMS, RACES = 50, 50, 20
WAIT = 120.0  # seconds that a command may take


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    make_models(home, shards=3)
    loratool.merge(home / "base", [home / "adapter"], home / "merged")
    return home


def of_tests() -> None:
    """Limits of a thousandth and waits of a tenth, in a process of its own."""
    own = limits
    parted_merge.limits = lambda: dataclasses.replace(own(), smallest=SMALLEST, piece=PIECE)  # type: ignore[attr-defined]
    client.WAITS = (0.1,) * len(client.WAITS)  # type: ignore[assignment]


class Elsewhere(StoreServer):
    """A store in a process of its own, which forks of this process can use."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.port = port


@pytest.fixture(scope="module")
def elsewhere(models: Path) -> Iterator[Elsewhere]:
    port = free_port()
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with serving(words, port, S3_UPLOAD_PART_MIN_SIZE=str(SMALLEST)):
        store = Elsewhere(port)
        for name in ("base", "adapter"):
            store.put(BUCKET, models / name, f"team/{name}")
        yield store


@pytest.fixture
def outside(elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch) -> Iterator[Elsewhere]:
    for name, value in elsewhere.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(client, "WAITS", (0.1,) * len(client.WAITS))
    yield elsewhere
    stand_ins.forget()


@pytest.fixture
def inside(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreServer]:
    """A store in this process, with faults and a count of bytes."""
    small_parts(monkeypatch)
    with StoreServer() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(client, "WAITS", (0.05,) * len(client.WAITS))
        for name in ("base", "adapter"):
            store.put(BUCKET, models / name, f"team/{name}")
        yield store
        store.fault = lambda _asked: None
        stand_ins.forget()


def is_told_apart(out: str) -> None:
    """A prefix is a whole model, or is said to be none."""
    try:
        code, said = loratool.verify(out).exit_code, ""
    except InputError as error:
        code, said = error.exit_code, str(error)
    assert code == 0 or "unfinished merge" in said or "no such object" in said, said


def words(out: str, *more: str) -> list[str]:
    return ["merge", BASE, ADAPTER, "-o", out, "-q", *more]


def killed(commands: Sequence[list[str]], drawn: random.Random, most: float) -> None:
    """Run some commands at once, each of which is killed at a moment within `most` seconds."""
    runs = [(Forked(each, of_tests), drawn.uniform(0, most)) for each in commands]
    began = time.monotonic()
    for run, moment in sorted(runs, key=lambda each: each[1]):
        time.sleep(max(0.0, began + moment - time.monotonic()))
        run.kill()
        run.communicate(WAIT)


def ended(command: list[str]) -> tuple[int | None, str]:
    return how_it_ended(Forked(command, of_tests))


def how_it_ended(run: Forked) -> tuple[int | None, str]:
    said = run.communicate(WAIT)[1]
    return run.returncode, said


def test_killed_at_any_moment_it_goes_on_or_leaves_nothing(outside: Elsewhere, models: Path) -> None:
    """Workers and the one that publishes die by SIGKILL; a rerun makes the same bytes, and an abort leaves nothing."""
    began = time.monotonic()
    assert ended(words(f"s3://{BUCKET}/kills/whole"))[0] == 0
    most = time.monotonic() - began
    for number in range(KILLS):
        drawn = random.Random(number)
        prefix = f"kills/{number}"
        out = f"s3://{BUCKET}/{prefix}"
        commands = drawn.choice(
            [[words(out)], [words(out), words(out)], [words(out, "--part", "1/2"), words(out, "--part", "2/2")]]
        )
        for _ in range(drawn.randint(1, 3)):
            killed(commands, drawn, most)
            is_told_apart(out)
        if drawn.random() < 0.3:
            with suppress(LoratoolError):
                loratool.abort_merge(out)
            left = outside.objects(BUCKET, prefix)
            assert not left or "loratool.json" in left
        code, said = ended(words(out))
        assert code == 0 or ("already exists" in said and loratool.verify(out).exit_code == 0), (number, said)
        assert_same(outside, prefix, models / "merged")
        assert outside.uploads(BUCKET) == [], number


def test_faults_of_every_kind_end_in_the_right_bytes_or_in_a_sentence(inside: StoreServer, models: Path) -> None:
    """503 and 500 storms, resets, slow answers, bodies that end early, wrong ETags, answers that are lost."""
    told = 0
    for seed in range(STORMS):
        prefix = f"storms/{seed}"
        out = f"s3://{BUCKET}/{prefix}"
        inside.fault = stormy(seed, lost=True, share=0.3 + 0.5 * (seed % 2), most=3 + 6 * (seed % 2))
        try:
            loratool.merge(BASE, [ADAPTER], out)
        except (HubError, InputError):  # the latter of an object whose ETag is wrong each time that it is asked for
            told += 1
            inside.fault = lambda _asked: None
            if seed % 4 == 1:
                with suppress(LoratoolError):
                    loratool.abort_merge(out)
                left = inside.objects(BUCKET, prefix)
                assert not left or "loratool.json" in left
                assert inside.uploads(BUCKET) == []
            with suppress(LoratoolError):  # complete already, where only the last answer was lost
                loratool.merge(BASE, [ADAPTER], out)
        inside.fault = lambda _asked: None
        assert_same(inside, prefix, models / "merged")
        assert loratool.verify(out).exit_code == 0
        assert inside.uploads(BUCKET) == []
    assert told


def test_a_store_that_is_restarted_is_waited_for(inside: StoreServer, models: Path) -> None:
    """It is gone for a moment in the middle of a merge; what it holds is still there afterwards."""
    for number in range(10):
        seen = [0]

        def restart(asked: Asked, seen: list[int] = seen, at: int = 3 + 4 * number) -> Fault:
            seen[0] += 1
            if seen[0] == at:
                threading.Thread(target=again).start()
                return "reset"
            return None

        def again() -> None:
            inside.stop()
            time.sleep(0.1)
            inside.start()

        inside.fault = restart
        loratool.merge(BASE, [ADAPTER], f"s3://{BUCKET}/restarts/{number}")
        inside.fault = lambda _asked: None
        assert_same(inside, f"restarts/{number}", models / "merged")


def test_of_two_runs_at_once_both_end_with_the_one_output(outside: Elsewhere, models: Path) -> None:
    for number in range(RACES):
        prefix = f"races/{number}"
        out = f"s3://{BUCKET}/{prefix}"
        if number % 2:
            assert ended(words(out, "--part", "1/1"))[0] == 0
            commands = [words(out, "--finish"), words(out, "--finish")]
        else:
            commands = [words(out), words(out)]
        runs = [Forked(each, of_tests) for each in commands]
        both = [how_it_ended(run) for run in runs]
        # moto breaks down where an upload is gone, as another run has completed it; S3 says that there is none
        both = [ended(each) if "status 500" in told[1] else told for each, told in zip(commands, both, strict=True)]
        assert 0 in [code for code, _ in both], both
        assert all(code == 0 or "already exists" in said or "no part of" in said for code, said in both), both
        assert_same(outside, prefix, models / "merged")
        assert outside.uploads(BUCKET) == []


def test_an_attention_only_merge_moves_what_it_edits_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the limits of S3 itself: at most 1.1 times the edited tensors' bytes come in, and as much goes out."""
    hidden, layers = 2048, 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (8192, hidden)}
    for number in range(layers):
        layer = f"model.layers.{number}"
        shapes |= {f"{layer}.input_layernorm.weight": (hidden,)}
        shapes |= {f"{layer}.mlp.{name}.weight": (2 * hidden, hidden) for name in ("gate_proj", "up_proj")}
        shapes |= {f"{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "koqv"}
    write_holes(tmp_path / "base" / "model.safetensors", "BF16", shapes)
    (tmp_path / "base" / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    faults.make_adapter(tmp_path / "adapter", layers=layers, hidden=hidden, rank=4)
    config: dict[str, Any] = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    attention_only(tmp_path / "adapter", config, layers, hidden)
    edited = layers * 4 * hidden * hidden * 2
    with StoreServer() as store:
        for name, value in store.environment.items():
            monkeypatch.setenv(name, value)
        for name in ("base", "adapter"):
            store.put("large", tmp_path / name, f"in/{name}")
        loratool.merge("s3://large/in/base", ["s3://large/in/adapter"], "s3://large/out")
        read = sum(each.sent for each in store.requests if each.kind == "get" and "in/base/" in each.key)
        sent = sum(each.came for each in store.requests)
        assert read <= 1.1 * edited
        assert sent <= 1.1 * edited
        assert loratool.verify("s3://large/out").exit_code == 0
        stand_ins.forget()


def attention_only(folder: Path, config: dict[str, Any], layers: int, hidden: int) -> None:
    """The adapter of a folder for the four projections of attention alone."""
    import torch

    factors = {}
    for number in range(layers):
        for name in "koqv":
            at = f"base_model.model.model.layers.{number}.self_attn.{name}_proj"
            factors[f"{at}.lora_A.weight"] = torch.randn(4, hidden)
            factors[f"{at}.lora_B.weight"] = torch.randn(hidden, 4)
    config["target_modules"] = [f"{name}_proj" for name in "koqv"]
    save_peft(folder, factors, **config)
