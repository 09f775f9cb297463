"""What importing loads: the command answers before JAX is there, and the programs need nothing but JAX and Flax."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

# A module that is None in sys.modules cannot be imported.
CODE = "import sys; sys.modules.update(dict.fromkeys({absent!r})); {code}"
HEAVY = ["jax", "flax", "orbax", "tensorflow_datasets", "matplotlib", "huggingface_hub", "tokenizers"]
# What is not on a machine that was set up for a GPU benchmark.
ABSENT = ["huggingface_hub", "orbax", "soundfile", "soxr", "tensorflow_datasets", "tokenizers", "typer"]


def run(code: str, absent: list[str], *arguments: str) -> str:
    command = [sys.executable, "-c", CODE.format(absent=absent, code=code), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=100).stdout


def test_the_package_itself_loads_no_jax() -> None:
    # Given no JAX, when the package is imported, then it has its version and names, which are loaded when they are used
    code = "import granite_jax as gj; print(gj.__version__, 'Transcriber' in dir(gj), gj.GraniteError.__name__)"
    assert run(code, HEAVY).split()[1:] == ["True", "GraniteError"]


@pytest.mark.parametrize("command", ["", "transcribe", "convert", "inspect", "plan", "batch run", "eval"])
def test_help_loads_no_jax(command: str) -> None:
    # Given no JAX, when a command's help is asked for, then it is printed
    assert "Usage:" in run("from granite_jax.cli import main; main()", HEAVY, *command.split(), "--help")


@pytest.mark.parametrize(
    "code",
    ["from granite_jax.cli import main; main()", "import runpy; runpy.run_module('granite_jax', {}, '__main__')"],
)
def test_the_version_loads_no_jax(code: str) -> None:
    # Given no JAX, when the version is asked for, by `python -m granite_jax`, too, then it is printed
    import granite_jax

    version = run(code, HEAVY, "--version")
    assert version == f"granite-jax {granite_jax.__version__}\n"


def test_the_programs_need_jax_and_flax_alone() -> None:
    # Given a machine without what reads audio, text and checkpoints, then the programs are imported nevertheless
    code = "from granite_jax.recognition import buckets, speech_lm_programs as p; print(p.SpeechLMPrograms.__name__)"
    assert run(code, ABSENT) == "SpeechLMPrograms\n"


def test_what_is_not_there_is_an_attribute_error() -> None:
    # Given the lazy names, when another is asked for, then the error is Python's own
    import granite_jax

    with pytest.raises(AttributeError, match="module 'granite_jax' has no attribute 'nothing'"):
        _ = granite_jax.nothing


def test_an_archive_on_the_path_is_refused(tmp_path: Path) -> None:
    # Given a package within a ZIP archive, when it is imported, then one line says why it cannot be
    import granite_jax

    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        archive.write(granite_jax.__file__, "granite_jax/__init__.py")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import granite_jax"
    command = [sys.executable, "-c", code, str(tmp_path / "package.zip")]
    error = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100).stderr.splitlines()[-1]
    assert re.fullmatch(r"ImportError: .+package.zip.granite_jax: is within an archive, .+", error)
