"""An option that has no effect where it is given says so: it is refused, or there is a note with a code.

Every option of every command is in one of the tables here, so that whoever adds one answers the question for it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import click
import pytest
from malformed import write_adapter, write_base

import loratool
from loratool import cli

MERGE, PLAN, VERIFY = "merge base adapter -o out", "plan base adapter", "verify merged --base base --adapter adapter"
STREAM = "merge base adapter --stream --push-to-hub me/repo"
PUSHING = {"merge": MERGE, "rescale": "rescale adapter -o out --scale 2", "resize": "resize adapter -o out --rank 1"}
PUSHING |= {"combine": "combine adapter other -o out", "convert": "convert adapter -o out --to mlx"}
PUSHING |= {"extract": "extract base merged -o out", "expand": "expand fleet other -o out"}
PUSHING |= {"rebase": "rebase adapter --from base --onto merged -o out"}
OF_RATES = ("--bandwidth 2GB", "--store-bandwidth 2GB", "--compute-rate 2GB", "--copy-rate 3GB", "--startup 2")
# Command line → what the refusal says.
REFUSED = {
    **{f"{words} {flag}": f"{flag} needs --push-to-hub" for words in PUSHING.values() for flag in ("--public",)},
    **{f"{words} --allow-secret a": "--allow-secret needs --push-to-hub" for words in PUSHING.values()},
    f"{MERGE} --exclude a": "--exclude needs --push-to-hub",
    f"{MERGE} --num-cpus 2": "--num-cpus needs --workers ray",
    f"{MERGE} --num-gpus 2": "--num-gpus needs --workers ray",
    f"{MERGE} --card": "--card needs --stream",
    **{
        f"{words} --into folder": "--into needs --part or --finish"
        for words in (VERIFY, PUSHING["extract"], "inspect adapter")
    },
    f"{STREAM} --verify": "does not take --verify",
    f"{STREAM} --sha256": "does not take --sha256",
    f"{STREAM} --shard-size 1GB": "neither -o nor --shard-size",
    f"{PLAN} --overwrite": "--overwrite needs -o, --html or --svg",
    **{f"{PLAN} {words}": "need --simulate" for words in (*OF_RATES, "--object-store")},
    **{
        f"{words} {more}": said
        for words in (MERGE, PLAN)
        for more, said in {
            "--accept-loss": "--accept-loss needs --requantize or --gguf-type",
            "--requantize": "--requantize is for a quantised BASE",
        }.items()
    },
    **{
        f"{words} {more}": said
        for words in (MERGE, PLAN, VERIFY)
        for more, said in {
            "--gguf-type q8_0": "--gguf-type is for a GGUF BASE",
            "--dequantize": "--dequantize is for a quantised BASE",
            "--only unet": "--only is for image and video models",
            "--component-weight unet=2": "--component-weight is for image and video models",
            "--block-weights IN01=2": "the adapter changes nothing in IN01",
            "--also-load nothing": "--also-load nothing: no such file",
            "--ignore-files nothing": "--ignore-files nothing matches no weight file",
        }.items()
    },
    **{
        f"verify merged {words}": f"{words.split()[0]}: needs --adapter"
        for words in (
            *("--workers 2", "--max-memory 2GB", "--device cpu", "--weight 2", "--dtype float32", "--rounding twice"),
            *("--fan-in-fan-out", "--allow-new-tensors", "--map zzz=b", "--input-alpha 2", "--adapter-name a"),
        )
    },
    **{
        f"{words} --overwrite": "--overwrite needs --html or --svg"
        for words in (VERIFY, "inspect base", "compare adapter other")
    },
    "estimate base --rank 2 --target q_proj --overwrite": "--overwrite needs --html or --svg",
    "inspect adapter --top 3": "--top needs --near",
    "inspect adapter --map zzz=b": "--map needs --base",
    "inspect adapter --fan-in-fan-out": "--fan-in-fan-out needs --base",
    "inspect adapter --device cuda": "--device needs --values",
    "inspect adapter other --where rank>0 --device cuda --values": "--device: for one adapter at a time",
    "inspect adapter other --where rank>0 --tensors": "--tensors: for one adapter at a time",
    "inspect adapter other --where rank>0 --metadata": "--metadata: for one adapter at a time",
    "inspect adapter other --where rank>0 --base-config base/config.json": "--base-config: for one adapter at a time",
    "inspect base --near index": "not an adapter, so --near does not apply",
    "rescale adapter -o out --scale 2 --each": "--each needs --frobenius or --spectral",
    "rescale adapter -o out --scale 2 --dtype float16": "--dtype needs --bake",
    "rescale adapter -o out --match zzz=2": "no adapted module matches zzz",
    "rescale adapter -o out --block-weights IN01=2": "the adapter changes nothing in IN01",
    "resize adapter -o out --rank 1 --layer-weights weights.json": "--layer-weights needs --budget",
    "combine adapter other -o out --rank-policy ctm": "--rank-policy ctm needs --rank",
    "combine adapter other -o out --space core": "--space does not apply to linear",
    "combine adapter other -o out --density 0.5": "--density does not apply to linear",
    "combine adapter other -o out --method linear-factors --svc": "--svc does not apply",
    "combine adapter other -o out --method linear-factors --match-norm max": "--match-norm does not apply",
    "combine adapter other -o out --method slerp --normalize": "--normalize applies only to",
    "combine adapter other -o out --block-weights IN01=2": "the adapter changes nothing in IN01",
    **{
        f"combine adapter other -o out {words}": f"{words.split()[0]} applies only to"
        for words in (
            *("--rule ties", "--window 0.1", "--outliers 0.1", "--sign frequency"),
            *("--iso-beta 0.5", "--row-wise", "--seed 3"),
        )
    },
    "convert adapter -o out --for vllm --architecture sdxl": "these are not modules of sdxl",
    "extract base merged -o out --rank 2 --max-rank 3": "--max-rank is for --rank auto",
    "extract base merged -o out --exact --seed 3": "--seed is for the sketch",
    "extract base merged -o out --include zzz": "no module matches 'zzz'",
    "extract base merged -o out --exclude zzz": "no module matches 'zzz'",
    **{
        f"compress adapter --into fleet {words}": f"--{words.split()[0][2:]} does not apply to --into"
        for words in ("--rank 2", "--energy 0.5", "--budget 2MB")
    },
}
READING = {
    "--expert-layout grouped-by-expert": "expert-layout-not-used",
    "--adapter-name zzz": "adapter-name-not-used",
    "--input-alpha 7": "input-alpha-not-used",
}
READERS = {
    *(MERGE, PLAN, VERIFY, "compare adapter other", "inspect adapter", "compress adapter other -o out --rank 1"),
    *(PUSHING[name] for name in ("rescale", "resize", "combine", "convert")),
    f"{PUSHING['rebase']} --force",
}
WITH_MODEL = {"rescale", "resize", "combine", "compare", "compress"}
OF_PARTS = ("--device cpu", "--workers 2", "--max-memory 2GB", "--sha256", "--digests full", "--verify")
# Command line → the code of the note.
NOTED = {
    **{f"{words} {more}": code for words in READERS for more, code in READING.items()},
    **{f"inspect base {more}": "options-for-adapters" for more in READING},
    "inspect base --base base": "options-for-adapters",
    "inspect base --base-config base/config.json": "options-for-adapters",
    "inspect base --metadata": "options-for-adapters",
    "inspect base --values": "values-not-measured",
    **{f"{words} --base base": "base-not-used" for words in READERS if words.split()[0] in WITH_MODEL},
    "index adapter other -o sketched --base base --overwrite": "base-not-used",
    f"{MERGE} --rounding stochastic": "rounding-unused",
    f"{PLAN} --rounding stochastic": "rounding-unused",
    f"{MERGE} --map zzz=b": "map-unused",
    f"{PLAN} --map zzz=b": "map-unused",
    f"{VERIFY} --map zzz=b": "map-unused",
    f"{PUSHING['rebase']} --force --map zzz=b": "map-unused",
    "inspect adapter --base base --map zzz=b": "map-unused",
    **{f"merge base adapter -o out --status {more}": "options-not-used" for more in OF_PARTS},
    "push adapter me/repo --dry-run --include zzz": "pattern-without-file",
    "push adapter me/repo --dry-run --exclude zzz": "pattern-without-file",
    "push adapter me/repo --dry-run --allow-secret zzz": "pattern-without-file",
}
# Options that have an effect wherever they can be given, or ask for what is so anyway.
EFFECTIVE = {
    "of what is computed": "alpha bake scale frobenius spectral weights weights_file method factor to server dtype rank "
    "energy error ratio cumulative budget uniform calibration exact normalize shard_size",
    "of what is shown": "pairs check format tensors where sort simulate values base_config from_file as_csv as_lines html svg "
    "as_json quiet verbose learn",
    "of what may be used": "device workers max_memory",
    "of what is looked at": "base named_base adapters onto folders near include exclude fan_in_fan_out preset target",
    "of where things go": "out push_to_hub into revision message create_pr card dry_run also",
    "of how it is done": "stream part finish status abort",
    "of how sure things are": "sha256 digests verify strip_metadata",
    "permissions": "overwrite force public allow_secret allow_new_tensors accept_loss saved",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("idle")
    write_base(home / "base")
    write_adapter(home / "adapter")
    write_adapter(home / "other", lora_alpha=2)
    loratool.merge(home / "base", home / "adapter", home / "merged", device="cpu")
    loratool.compress([home / "adapter", home / "other"], home / "fleet", rank=2)
    (home / "weights.json").write_text('{"q_proj": 2}')
    return home


@pytest.fixture
def here(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(made)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.rmtree(made / "out", ignore_errors=True)
    return made


def options_of(command: str) -> dict[str, set[str]]:
    """The options of a command by their parameters, each with its flags."""
    every = [each for each in cli.command(command).params if isinstance(each, click.Option)]
    return {str(each.name): {*each.opts, *each.secondary_opts} for each in every}


@pytest.mark.parametrize("words", REFUSED)
def test_an_option_without_effect_is_refused(words: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(os.listdir(here))
    code = cli.run(shlex.split(words))
    said = " ".join(capsys.readouterr().err.split())
    assert code in (2, 3), said
    assert REFUSED[words] in said
    assert sorted(os.listdir(here)) == before


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("words", sorted(NOTED))
def test_an_option_without_effect_is_noted(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([*shlex.split(words), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (result,) = found.get("results", [found])
    assert NOTED[words] in [note["code"] for note in result["notes"]]


def test_an_abort_says_which_options_it_does_not_use(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It needs nothing but OUT, and may be the command of a worker with another last word."""
    loratool.merge_part(here / "base", here / "adapter", here / "out", "1/1", device="cpu")
    assert cli.run(shlex.split("merge base adapter -o out --sha256 --weight 2 --abort --json")) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert note == {"code": "options-not-used", "text": "--abort does not use --sha256, --weight"}
    assert not (here / "out.partial").exists()


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_option_is_in_a_table(command: str) -> None:
    words = {word for line in (*REFUSED, *NOTED) if line.split()[0] == command for word in shlex.split(line)}
    always = {name for names in EFFECTIVE.values() for name in names.split()}
    assert {name for name, flags in options_of(command).items() if not flags & words} - always == set()


def test_a_plan_says_what_is_read_again_for_digests(made: Path) -> None:
    """The bytes of all files, to compare them, and those of weight files, for the SHA-256 of each."""
    weights = (made / "merged" / "model.safetensors").stat().st_size
    config = (made / "merged" / "config.json").stat().st_size
    base, adapter = made / "base", made / "adapter"
    plans = {
        0: loratool.plan(base, adapter),
        weights: loratool.plan(base, adapter, sha256=True),
        weights + config: loratool.plan(base, adapter, verify=True),
    }
    for size, plan in plans.items():
        assert plan.bytes_read_again == plan.to_dict()["bytes_read_again"] == size
        assert ("would read again" in str(plan)) == (size > 0)
