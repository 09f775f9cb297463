"""What importing loads: the command answers before JAX is there, and the programs need nothing but JAX and Flax."""

import subprocess
import sys

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


def test_the_version_loads_no_jax() -> None:
    # Given no JAX, when the version is asked for, then it is printed
    import granite_jax

    version = run("from granite_jax.cli import main; main()", HEAVY, "--version")
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
