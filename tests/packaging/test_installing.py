"""What `make wheel-test` tries: the wheel and the sdist in an empty environment, without a network, and the Dockerfile.

They install torch anew and take minutes, so `make test` skips them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from paths import ROOT

import loratool

pytestmark = pytest.mark.skipif(
    not os.environ.get("LORATOOL_TEST_WHEEL"), reason="installs torch several times; `make wheel-test` runs it"
)
CLEAN = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def run(words: Sequence[str | Path], folder: Path, **more: str) -> str:
    done = subprocess.run(
        list(map(str, words)), cwd=folder, env={**CLEAN, **more}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@dataclass(frozen=True)
class Environment:
    """A virtual environment and how to run what is in it."""

    folder: Path

    @classmethod
    def made(cls, folder: Path) -> Environment:
        run([sys.executable, "-m", "venv", folder], folder.parent)
        return cls(folder)

    @property
    def bin(self) -> Path:
        return self.folder / ("Scripts" if os.name == "nt" else "bin")

    def pip(self, *words: str | Path) -> str:
        return run([self.bin / "python", "-m", "pip", *words], self.folder)

    def loratool(self, *words: str, folder: Path) -> str:
        return run([self.bin / "loratool", *words], folder)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "hatchling", "build", "-d", folder], ROOT)
    return folder


@pytest.fixture(scope="module")
def wheels(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel and everything that it needs, as docs/install.md collects them for a machine without a network."""
    folder, wheel = tmp_path_factory.mktemp("wheels"), next(built.glob("*.whl"))
    constraints = ROOT / "constraints.txt"
    run([sys.executable, "-m", "pip", "download", "-q", "-d", folder, "-c", constraints, wheel, "hatchling"], built)
    return folder


@pytest.fixture(scope="module")
def installed(wheels: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """An empty environment in which only those wheels were installed."""
    made = Environment.made(tmp_path_factory.mktemp("wheel") / "venv")
    made.pip("install", "-q", "--no-index", "--find-links", wheels, "loratool")
    return made


def package_files() -> set[str]:
    tracked = run(["git", "ls-files", "loratool"], ROOT).split("\n")
    return {name for name in tracked if name}


def test_the_wheel_has_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    info = f"loratool-{loratool.__version__}.dist-info/"
    assert {name for name in names if not name.startswith(info)} == package_files()
    assert f"{info}licenses/LICENSE" in names


def test_the_sdist_has_all_that_its_tests_need_and_makes_the_same_package(built: Path) -> None:
    root = f"loratool-{loratool.__version__}/"
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.removeprefix(root) for name in archive.getnames()}
    assert names >= package_files()
    wanted = {"pyproject.toml", "LICENSE", "Makefile", "constraints.txt", "Dockerfile"}
    wanted |= {path.name for path in ROOT.glob("*.md")}  # which link to each other
    assert names >= wanted | {"tests/conftest.py", "docs/install.md", "docs/notebooks/lora.ipynb"}
    assert not {name for name in names if ".git/" in name or "__pycache__" in name or ".venv" in name}


def try_it(environment: Environment, folder: Path) -> None:
    """A command of each kind, in a folder of its own."""
    assert environment.loratool("--version", folder=folder).split()[-1] == loratool.__version__
    where = run([environment.bin / "python", "-c", "import loratool; print(loratool.__file__)"], folder).strip()
    assert Path(where).is_relative_to(environment.folder)
    assert "differ in the last bit, none by more" in environment.loratool("demo", "made", folder=folder)
    environment.loratool("inspect", "made/adapter", "--html", "page.html", folder=folder)
    assert (folder / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    proof = environment.loratool(
        "verify", "made/merged", "--base", "made/base", "--adapter", "made/adapter", folder=folder
    )
    assert "proven: every tensor is what the formula gives" in proof
    words = ("estimate", "--preset", "llama-2-7b", "--rank", "8", "--target", "q_proj,v_proj", "--json")
    assert json.loads(environment.loratool(*words, folder=folder))["ranks"][0]["trainable"] == 4_194_304


def test_the_wheel_works_in_an_empty_environment_installed_without_a_network(
    installed: Environment, tmp_path: Path
) -> None:
    try_it(installed, tmp_path)
    packages = {each["name"].lower() for each in json.loads(installed.pip("list", "--format", "json"))}
    assert not packages & {"peft", "transformers", "pytest", "hatchling", "ray", "boto3", "botocore", "grpcio"}


def test_the_sdist_works_in_the_same_environment(
    installed: Environment, wheels: Path, built: Path, tmp_path: Path
) -> None:
    sdist = next(built.glob("*.tar.gz"))
    installed.pip("install", "-q", "--no-index", "--find-links", wheels, "--force-reinstall", "--no-deps", sdist)
    try_it(installed, tmp_path)


@dataclass
class Image:
    """What a Dockerfile does, done in a folder: its root is the image's, and `bin` is where it has pip and python."""

    root: Path
    bin: Path
    arguments: dict[str, str]
    workdir: str = "/"
    variables: dict[str, str] = field(default_factory=dict)
    entrypoint: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return self.root / self.workdir.lstrip("/")

    def step(self, name: str, rest: str) -> None:
        if name == "ARG":
            key, _, value = rest.partition("=")
            self.variables[key] = self.arguments.get(key, value.strip('"'))
        elif name == "ENV":
            self.variables |= dict(word.split("=", 1) for word in shlex.split(rest))
        elif name == "WORKDIR":
            self.workdir = rest
            self.folder.mkdir(parents=True, exist_ok=True)
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                if (ROOT / source).is_dir():
                    shutil.copytree(ROOT / source, self.folder / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(ROOT / source, self.folder / target)
        elif name == "RUN":
            self.run(["bash", "-euc", rest])
        elif name == "ENTRYPOINT":
            self.entrypoint = json.loads(rest)
        else:
            assert name == "FROM", name

    def run(self, words: Sequence[str]) -> str:
        path = f"{self.bin}{os.pathsep}{CLEAN['PATH']}"
        return run(
            [shutil.which(words[0], path=path) or words[0], *words[1:]], self.folder, PATH=path, **self.variables
        )


def test_the_steps_of_the_dockerfile_make_a_working_command_in_an_empty_folder(tmp_path: Path) -> None:
    """Images cannot be pulled everywhere, so the steps run in a folder and an empty environment instead.

    torch comes from wherever pip finds it here, as with `--build-arg TORCH_FROM=`.
    """
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    steps = re.findall(r"^([A-Z]+) (.+)$", text, re.MULTILINE)
    assert next(name for name, _ in steps) == "FROM"
    image = Image(tmp_path / "image", Environment.made(tmp_path / "python").bin, {"TORCH_FROM": ""})
    for name, rest in steps:
        image.step(name, rest)
    assert image.workdir == "/work"
    assert list(image.folder.iterdir()) == []
    assert "none by more" in image.run([*image.entrypoint, "demo", "made"])
    assert (image.folder / "made" / "merged" / "config.json").is_file()
