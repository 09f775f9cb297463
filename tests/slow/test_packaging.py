"""Every way of installing gives the same package: with `granite_jax.convert`, without `convert`, and without torch."""

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import hf_fixture
import numpy as np
import pytest
import soundfile
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
SOURCES = ["granite_jax", "convert", "checkpoints", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]
HEAVY = {"torch", "torchaudio", "transformers", "tensorflow"}


def run(code: str, *arguments: str | Path, path: Path) -> str:
    """Runs `code` with packages from `path`, then this environment's, without what is installed as editable here."""
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    program = (
        f"import site, sys; sys.path += {packages}; sys.path.insert(0, {str(path)!r}); site.addsitedir(sys.path[0])"
    )
    command = [sys.executable, "-W", "error", "-P", "-S", "-c", f"{program}; {code}", *map(str, arguments)]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def build_automaton(kind: str, source: Path, destination: Path) -> Path:
    """Calls setuptools as pip does."""
    destination.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    command = [sys.executable, "-c", f"import sys; {code}", str(destination)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return destination / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree: building leaves files in it."""
    tree = tmp_path_factory.mktemp("source")
    ignore = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        copy = tree / name
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy, symlinks=True, ignore=ignore)
        else:
            shutil.copyfile(ROOT / name, copy)
    return tree


def unpack(wheel: Path, destination: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(destination)
    return destination


@pytest.fixture(scope="module", params=["wheel", "sdist", "editable"])
def installed(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of packages after an installation from the tree, from a source distribution, or editable."""
    work = tmp_path_factory.mktemp(request.param)
    tree = source
    if request.param == "sdist":
        with tarfile.open(build_automaton("sdist", source, work / "sdist")) as archive:
            archive.extractall(work, filter="data")
        (tree,) = (path for path in work.glob("granite_jax-*") if path.is_dir())
        assert not (tree / "tests").exists()
    kind = "editable" if request.param == "editable" else "wheel"
    return unpack(build_automaton(kind, tree, work / "dist"), work / "site")


def test_an_installation_is_complete(installed: Path, source: Path) -> None:
    # Given an installation, when the package is imported from elsewhere, then it is that one, convert and demo included
    code = (
        "import json, granite_jax, granite_jax.convert, importlib.util as util;"
        "from granite_jax.checkpoint import source;"
        "print(json.dumps([granite_jax.__file__, granite_jax.convert.__file__, str(source.DEMO.parent),"
        "util.find_spec('convert') is None, granite_jax.__version__]))"
    )
    package, convert, checkpoints, no_convert, version = json.loads(run(code, path=installed))
    home = Path(package).parent
    assert home in (installed / "granite_jax", source / "granite_jax")
    assert Path(convert).parent == home / "convert"
    assert Path(checkpoints) == home / "checkpoints"
    assert no_convert, "convert must not install as a module of its own"
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

    # And it has every file of the source tree
    files = {
        file.relative_to(ROOT)
        for top in ("granite_jax", "convert", "checkpoints")
        for file in (ROOT / top).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert len(files) > 30
    inside = [path if path.parts[0] == "granite_jax" else "granite_jax" / path for path in sorted(files)]
    assert [str(path) for path in inside if not (home.parent / path).is_file()] == []


def test_the_template_worker_works_where_it_is_installed(installed: Path) -> None:
    # Given an installation, when a chat template is rendered, by a process of its own, then there is a prompt
    hf_fixture.make_tokenizer().save(str(installed / "tokenizer.json"))
    code = (
        "from granite_jax.text.tasks import ChatTemplate; from granite_jax.text.tokenizer import Tokenizer;"
        "tokenizer = Tokenizer.from_file(sys.argv[1]);"
        "print(len(ChatTemplate(sys.argv[2]).tokens(tokenizer, 'hear this').suffix) > 1)"
    )
    assert run(code, installed / "tokenizer.json", hf_fixture.CHAT_TEMPLATE, path=installed) == "True\n"


def test_requirements_bring_no_second_framework() -> None:
    # Given the package's requirements without extras, when they are followed to the end
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pending, seen = [Requirement(line) for line in project["dependencies"]], set()
    while pending:
        requirement = pending.pop()
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in seen or (requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})):
            continue
        seen.add(name)
        lines = importlib.metadata.requires(name) or []
        pending += [Requirement(line) for line in lines]

    # Then jax is among them, and torch, transformers and TensorFlow are not
    assert {"jax", "flax", "orbax-checkpoint", "tensorflow-datasets", "etils"} <= seen
    assert not seen & HEAVY


def test_the_core_runs_without_the_extras(tmp_path: Path) -> None:
    # Given a machine without torch, transformers, TensorFlow and the packages of the extras, with warnings as errors
    hf_fixture.write_random_checkpoint(tmp_path / "hf", text_config={"max_position_embeddings": 128})
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.1, 0.1, 16000), 16000)
    absent = [
        *HEAVY,
        "jiwer",
        "whisper_normalizer",
        "kaldialign",
        "sacrebleu",
        "beartype",
        "hypothesis",
        "pytest",
        "ray",
        "gcsfs",
        "s3fs",
        "aiohttp",
        "yarl",
        "kubernetes_validate",
        "matplotlib",
    ]
    code = (
        f"sys.modules.update(dict.fromkeys({absent}));"  # None there makes an import fail
        "import granite_jax.cli; sys.argv[0] = 'granite-jax'; granite_jax.cli.main()"
    )

    # When a file is transcribed on the command line, then there is a line of text
    arguments = ["transcribe", tmp_path / "a.wav", "--checkpoint", tmp_path / "hf", "--max-new-tokens", "4"]
    assert len(run(code, *arguments, path=ROOT).splitlines()) == 1
    # And a batch job finds it, too
    arguments = ["batch", tmp_path, "--out", tmp_path / "out", "--checkpoint", tmp_path / "hf", "--max-new-tokens", "4"]
    assert run(code, *arguments, path=ROOT) == f"{tmp_path / 'out'}: 1 of 1 utterances, 0 failed\n"
