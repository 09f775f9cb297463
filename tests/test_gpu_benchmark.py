"""benchmarks/gpu.py runs with the model as it is, at a small size on the CPU."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_part_is_measured_and_decodes_what_it_must() -> None:
    # Given the tiny model
    command = [sys.executable, str(SCRIPT), "--small", "--frameworks", "jax"]

    # When the benchmark runs
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)

    # Then nothing failed, every part was timed, and drafts of the greedy tokens took the prefill's pass alone
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert not [row for row in rows if row["kind"] == "failed"], run.stdout
    steady = {row["name"] for row in rows if row["kind"] == "steady"}
    assert steady == {"encode", "prefill", "prefill with drafts", "decode step"}
    assert {row["name"]: row["text"] for row in rows if row["kind"] == "speed"} == {
        "autoregressive": "5 tokens a row in 5 passes, 2 of 2 rows as expected",
        "verified drafts": "5 tokens a row in 1 passes, 2 of 2 rows as expected",
    }
    assert "| decode step | " in run.stdout


def test_counted_bytes_are_those_of_the_released_weights() -> None:
    # Given the released model without any rows, so that weights alone are read
    module = runpy.run_path(str(SCRIPT))
    config = json.loads((ROOT / "granite_jax/models/granite_speech/config.json").read_text())
    work = module["Workload"](config, 0, 20.0, False)

    # When the bytes of encoder, projector and a decode step are counted
    counted = module["count_work"](work)

    # Then with the embedding, of which rows are gathered, they are the file's, but for biases and norms
    embedding = 2 * config["text_config"]["vocab_size"] * config["text_config"]["hidden_size"]
    total = counted["encode"][1] + counted["decode step"][1] + embedding
    assert 0.999 < total / 4_626_414_392 <= 1
