"""Every way of installing gives the same package: with `granite_jax.convert`, without `convert`, and without torch."""

import hashlib
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import hf_fixture
import numpy as np
import pytest
import soundfile
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
FILES = ["granite_jax", "convert", "checkpoints", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]
HEAVY = {"torch", "torchaudio", "transformers", "tensorflow"}


def run(code: str, *arguments: str | Path, path: Path) -> str:
    """Runs `code` with packages from `path`, then this environment's, without what is installed as editable here."""
    packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    program = (
        f"import site, sys; sys.path += {packages}; sys.path.insert(0, {str(path)!r}); site.addsitedir(sys.path[0])"
    )
    command = [sys.executable, "-I", "-S", "-W", "error", "-c", f"{program}; {code}", *map(str, arguments)]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def execute(*command: str | Path, directory: Path) -> str:
    done = subprocess.run([*map(str, command)], cwd=directory, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def call_setuptools(kind: str, tree: Path, destination: Path) -> Path:
    """Makes an "sdist" or an "editable" wheel of a source tree, as pip does."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    return destination / execute(sys.executable, "-c", code, destination, directory=tree).splitlines()[-1]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A git repository with this source tree, in which nothing is built: building leaves files behind."""
    tree = tmp_path_factory.mktemp("repository")
    for name in FILES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, tree / name)
    execute("git", "init", "--quiet", directory=tree)
    execute("git", "add", "--all", directory=tree)
    execute("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message=a", directory=tree)
    return tree


def clone(repository: Path, destination: Path, has_links: bool = True) -> Path:
    setting = f"core.symlinks={str(has_links).lower()}"  # false is the default on Windows
    execute("git", "-c", setting, "clone", "--quiet", repository, destination, directory=repository)
    assert (destination / "granite_jax" / "convert").is_dir() == has_links
    return destination


def archive(repository: Path, destination: Path) -> Path:
    """What a forge's "Download ZIP" gives."""
    execute("git", "archive", "--prefix=main/", "--output", destination, "HEAD", directory=repository)
    return destination


# What pip is given to install, made from a repository in a directory.
SOURCES = {
    "clone": lambda repository, work: clone(repository, work / "tree"),
    "clone without links": lambda repository, work: clone(repository, work / "tree", has_links=False),
    "archive": lambda repository, work: archive(repository, work / "main.zip"),
    "git": lambda repository, work: f"git+{repository.as_uri()}",
    "sdist": lambda repository, work: call_setuptools("sdist", clone(repository, work / "tree"), work),
}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def build_wheel(source: str | Path, work: Path) -> Path:
    """Builds as `pip install SOURCE` does, with this environment's setuptools."""
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    execute(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", work / "dist", source, directory=work)
    (wheel,) = (work / "dist").iterdir()
    return wheel


@pytest.mark.parametrize("kind", SOURCES)
def test_every_way_of_installing_gives_the_whole_package_once(kind: str, repository: Path, tmp_path: Path) -> None:
    # Given every file of the package, where it is installed
    expected = [
        (
            str(Path("" if top == "granite_jax" else "granite_jax", file.relative_to(repository))),
            digest(file.read_bytes()),
        )
        for top in ("granite_jax", "convert", "checkpoints")
        for file in (repository / top).rglob("*")
        if file.is_file()
    ]
    assert len(expected) > 400

    # When pip builds the wheel that it installs
    with zipfile.ZipFile(build_wheel(SOURCES[kind](repository, tmp_path), tmp_path)) as wheel:
        files = [(name, digest(wheel.read(name))) for name in wheel.namelist() if ".dist-info/" not in name]

    # Then these files are in it, each once, and no others
    assert sorted(files) == sorted(expected)


def test_a_source_without_a_directory_is_refused(repository: Path, tmp_path: Path) -> None:
    # Given a clone in which a directory is missing, when it is built, then the error names it
    tree = clone(repository, tmp_path / "tree", has_links=False)
    shutil.rmtree(tree / "checkpoints")
    with pytest.raises(AssertionError, match="package directory 'checkpoints' does not exist"):
        build_wheel(tree, tmp_path)


@pytest.fixture(scope="module", params=["wheel", "editable", "editable without links"])
def installed(request: pytest.FixtureRequest, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place of packages after an installation. The source tree is beside it, where an editable one reads it."""
    work = tmp_path_factory.mktemp("installed")
    tree = clone(repository, work / "tree", has_links=request.param == "editable")
    wheel = build_wheel(tree, work) if request.param == "wheel" else call_setuptools("editable", tree, work)
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(work / "site")
    if request.param == "wheel":
        shutil.rmtree(tree)
    return work / "site"


def test_an_installed_package_is_imported_and_transcribes(installed: Path) -> None:
    # Given an installation, when the package is imported from elsewhere, then it is that one, with its version
    code = (
        "import json, granite_jax, granite_jax.convert, importlib.util as util;"
        "from granite_jax.checkpoint import source;"
        "print(json.dumps([granite_jax.__file__, granite_jax.convert.__file__, str(source.DEMO),"
        "util.find_spec('convert') is None, granite_jax.__version__]))"
    )
    *files, no_convert, version = json.loads(run(code, path=installed))
    assert all(Path(file).is_relative_to(installed.parent) for file in files)
    assert no_convert, "convert must not install as a module of its own"
    assert version == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

    # And the embedded checkpoint transcribes
    clip = ROOT / "samples" / "request.wav"
    code = "sys.argv[0] = 'granite-jax'; import runpy; runpy.run_module('granite_jax', run_name='__main__')"
    assert run(code, "transcribe", clip, path=installed) == "i need you to turn on the screen in the main hall\n"


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
