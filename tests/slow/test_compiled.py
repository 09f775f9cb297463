"""The full-size model as the TPU compiler has it: it fits a v5e chip and decodes in place, without communication."""

import importlib.util
import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from granite_jax.decoding import WINDOW

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compiled.py"
V5E_BYTES = 15.75 * 2**30  # of a chip's memory that programs can have

pytestmark = pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="libtpu is made for Linux on x86-64 alone"
)


def libtpu() -> Path:
    """The TPU compiler: beside the environment's packages, where `make test` puts it, or among them."""
    places = [Path(sys.prefix) / "libtpu" / "libtpu"]
    spec = importlib.util.find_spec("libtpu")
    if spec is not None and spec.origin is not None:
        places.append(Path(spec.origin).parent)
    for place in places:
        if (place / "libtpu.so").is_file():
            return place / "libtpu.so"
    pytest.fail(f"no libtpu.so in {' or '.join(map(str, places))}: `make test` installs it")


def compiled(topology: str, *arguments: str) -> dict[str, dict]:
    """What the compiler says of encode, prefill and decode, 64 rows a copy of the weights; bytes are a chip's."""
    # Without the lock of libtpu.so, which is there to share out chips: none is used, and other tests may run as well.
    environment = os.environ | {"TPU_LIBRARY_PATH": str(libtpu()), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, str(SCRIPT), "--topology", topology, "--batch", "64", "--capacity", "544", *arguments]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {line["program"]: line for line in lines}


@pytest.fixture(scope="module")
def reports() -> dict[str, dict]:
    """Given the programs compiled for eight v5e chips."""
    return compiled("v5e:2x4")


@pytest.mark.soak
@pytest.mark.parametrize(
    ("topology", "model_parallel"), [("v5e:2x4", 2), ("v5p:2x2x1", 1), ("v6e:2x2", 1), ("v6e:2x4", 4)]
)
def test_other_chips_take_it_too(topology: str, model_parallel: int) -> None:
    # Given other chips, and weights that several share, then all programs fit, and the cache is not copied, as far as
    # this JAX can read the compiler's programs
    reports = compiled(topology, "--model-parallel", str(model_parallel))
    assert all(report["fits"] for report in reports.values())
    assert reports["decode"]["note"] or reports["decode"]["cache_copies"] == 0


def test_every_program_fits_a_chip(reports: dict[str, dict]) -> None:
    # When the compiler states their peak memory, weights included, then it is less than a chip has
    assert set(reports) == {"encode", "prefill", "decode"}
    for name, report in reports.items():
        assert 2e9 < report["peak_bytes"] < V5E_BYTES, name


def test_no_chip_waits_for_another(reports: dict[str, dict]) -> None:
    # When the optimized programs are searched for collectives, then there are none
    assert {name: report["collectives"] for name, report in reports.items()} == dict.fromkeys(reports, 0)


def test_decoding_updates_the_cache_in_place(reports: dict[str, dict]) -> None:
    # When the decode loop is looked at: a cache of 40 layers, 64 rows, 544 positions and a window in tiles of 16, 4
    # heads of 128, in bfloat16
    decode = reports["decode"]
    assert decode["cache_bytes"] == 2 * 2 * 40 * 64 * 560 * 4 * 128

    # Then its result takes the argument's memory, and nothing of the cache's size is copied or held besides
    assert decode["alias_bytes"] >= decode["cache_bytes"]
    assert decode["temporary_bytes"] < 0.5 * decode["cache_bytes"]
    assert decode["cache_copies"] == 0


def plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command `plan` for the embedded checkpoint."""
    environment = os.environ | {"TPU_LIBRARY_PATH": str(libtpu()), "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    command = [sys.executable, "-m", "granite_jax.cli", "plan", *arguments, "--checkpoint", "demo"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def documented() -> list[str]:
    """The options of the commands in the documentation, and their chips replaced by others."""
    page = (Path(__file__).parents[2] / "docs" / "devices.md").read_text(encoding="utf-8")
    found = re.findall(r"^    granite-jax plan (.+?)(?: +#.*)?$", page, re.MULTILINE)
    compiling = [line for line in found if "--no-compile" not in line]
    return [*compiling, *(re.sub(r"v\w+:\S+", "v5p:2x2x1", line) for line in compiling)]


@pytest.mark.parametrize("options", documented())
def test_the_command_plans_as_documented(options: str) -> None:
    # Given a command of the documentation, when it is run for short audio, then every program fits, whether this JAX
    # can read all that the compiler says or not, has a bound by data sheets, and nothing else is said
    done = plan(*options.split(), "--batch", "2", "--seconds", "1", "--format", "json")
    assert (done.returncode, done.stderr) == (0, "")
    *programs, all_of_them = [json.loads(line) for line in done.stdout.splitlines()]
    assert [program["program"] for program in programs] == ["encode", "prefill", "decode"]
    assert all(program["fits"] and (program["note"] or program["cache_copies"] == 0) for program in programs)
    assert all(program["batch"] == 2 and program["roofline_seconds"] > 0 for program in programs)
    assert (all_of_them["program"], all_of_them["measured"]) == ("all", False)


def test_the_command_says_what_does_not_fit() -> None:
    # Given the embedded checkpoint, when it is planned with batches that no chip has memory for
    done = plan("--topology", "v5e:2x2", "--seconds", "5", "--batch", "500000")

    # Then it says so, by its exit status, too, and what libtpu has to say is not there
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.splitlines()[0] == "encode: takes more than the 15.75 GiB that programs have of a chip"


def test_logits_are_never_held_for_all_draft_positions(reports: dict[str, dict]) -> None:
    # When the largest float32 buffers as wide as the vocabulary are looked for: 20 s of audio leave room for a draft of
    # 140 tokens, at 64 rows 9,024 positions to verify
    held = {name: report["vocabulary_positions"] for name, report in reports.items()}

    # Then a part of them is held at a time, and in the loop no more than the windows
    assert held["prefill"] < 64 * 141 / 4
    assert held["decode"] <= 64 * (WINDOW + 1)
