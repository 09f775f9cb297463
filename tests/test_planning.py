"""What is read from a program that the TPU compiler made, what data sheets allow, and the search for a batch."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from typer.testing import CliRunner, Result

from granite_jax import GraniteError, cli
from granite_jax.models.granite_speech import work
from granite_jax.models.granite_speech.config import Config
from granite_jax.models.work import Workload
from granite_jax.planning import aot
from granite_jax.planning.largest_batch import largest_batch
from granite_jax.planning.roofline import CHIPS, Roofline, find_chip, roofline
from granite_jax.recognition.buckets import Bucket

MEMORY = SimpleNamespace(
    peak_memory_in_bytes=3 << 30, argument_size_in_bytes=5, temp_size_in_bytes=6, alias_size_in_bytes=7
)
TEXT = """
  %a = bf16[4,8,2,16,2048]{4,3,2,1,0} copy(%b)
  %c = f32[64,9,100353]{2,1,0} fusion(%d)
  %e = f32[9999,1003530]{1,0} fusion(%d)
  %f = bf16[8]{0} all-reduce(%g)
"""


def read(as_text: Any) -> aot.Plan:
    compiled = SimpleNamespace(memory_analysis=lambda: MEMORY, as_text=as_text)
    return aot._read("decode", compiled, 4 * 8 * 2 * 16 * 2048 * 4, Config.granite_4_0_1b().decoder.vocab_size, 4 << 30)


def test_copies_collectives_and_vocabulary_are_counted() -> None:
    plan = read(lambda: TEXT)
    assert (plan.fits, plan.cache_copies, plan.vocabulary_positions, plan.collectives) == (True, 1, 64 * 9, 1)
    assert str(plan).startswith("decode: peak 3.00 of the 4.00 GiB that programs have of a chip, 1 collectives")


def test_memory_is_told_where_the_text_cannot_be_read() -> None:
    # Given a program whose text is of another release than JAX
    def fail() -> str:
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT: no\nsuch field")

    # When it is read, then its memory is there, and the line says why the rest is not
    plan = read(fail)
    assert (plan.fits, plan.peak_bytes) == (True, 3 << 30)
    assert plan.cache_copies is plan.collectives is plan.vocabulary_positions is None
    assert "3.00 of the 4.00 GiB" in str(plan) and "None" not in str(plan)
    assert f"JAX {jax.__version__} cannot read this TPU compiler's programs" in str(plan)
    assert "(INVALID_ARGUMENT: no such field)" in str(plan)


def test_what_does_not_fit_is_told() -> None:
    text = str(aot.Plan("encode", False, 4 << 30))
    assert text == "encode: takes more than the 4.00 GiB that programs have of a chip"


def bounds(chip: str = "v5e", **load: Any) -> Roofline:
    """The roofline of granite-4.0-1b-speech for 64 rows of 20 s, or what is said in their place."""
    return roofline(Config.granite_4_0_1b(), CHIPS[chip], Workload(**{"batch": 64, "seconds": 20.0} | load))


def test_a_program_takes_the_longer_of_arithmetic_and_memory() -> None:
    # Given a full batch, when its roofline is drawn, then encode and prefill are bound by arithmetic, decode by memory
    by_program = {bound.program: bound for bound in bounds().bounds}
    assert {name: bound.bound_by for name, bound in by_program.items()} == {
        "encode": "compute",
        "prefill": "compute",
        "decode": "memory",
    }
    # And each takes what its figure takes at the data sheet's
    encode, decode = by_program["encode"], by_program["decode"]
    assert encode.roofline_seconds == encode.flops / 197e12 > encode.bytes / 819e9
    assert decode.roofline_seconds == decode.bytes / 819e9 > decode.flops / 197e12
    assert decode.intensity == decode.flops / decode.bytes


def test_the_bound_is_what_was_worked_out_by_hand() -> None:
    # Given a second of audio takes some 44 GFLOP to encode, 29 to prefill and 13 to decode, on a chip of 197 TFLOP/s
    flops = {bound.program: bound.flops / (64 * 20) for bound in bounds().bounds}
    assert flops["encode"] == pytest.approx(44e9, rel=0.05)
    assert flops["prefill"] == pytest.approx(29e9 * 218 / 200, rel=0.05)
    assert flops["decode"] == pytest.approx(13e9, rel=0.05)

    # Then the rate is below what arithmetic alone allows, and what its time costs follows from the price
    bound = bounds()
    assert 1000 < bound.rtfx < 197e12 / sum(flops.values())
    assert bound.dollars(1.2) == pytest.approx(1000 / bound.rtfx * 1.2)


def test_each_decode_step_reads_the_weights_once() -> None:
    # Given one row of which four tokens are written, of which the prefill has the first, when three steps follow
    load = {"batch": 1, "seconds": 1.0, "prompt_tokens": 10}
    (decode,) = (bound for bound in bounds(**load).bounds if bound.program == "decode")
    config = Config.granite_4_0_1b()
    prompt = 10 + 4 * 3  # four windows of the 50 frames

    # Then each reads the weights and the cache, two of the new tokens on average, and writes one position
    read = work.decode_bytes(config, 2, prompt + 2) + work.cache_bytes(config, 2)
    assert decode.bytes == pytest.approx(3 * read)
    # And where drafts are accepted there are fewer steps
    (drafted,) = (bound for bound in bounds(**load, tokens_per_step=3).bounds if bound.program == "decode")
    assert drafted.bytes < decode.bytes / 2.9
    assert drafted.flops == pytest.approx(decode.flops)


def test_nothing_is_left_to_decode_without_new_tokens() -> None:
    (decode,) = (bound for bound in bounds(tokens_per_second=0).bounds if bound.program == "decode")
    assert (decode.flops, decode.bytes, decode.roofline_seconds) == (0, 0, 0)


def test_chips_that_share_weights_share_the_time() -> None:
    # Given one chip and four that share its work, when both are bound, then the rate of a chip is the same
    config, load = Config.granite_4_0_1b(), Workload(64, 20.0)
    one, four = (roofline(config, CHIPS["v6e"], load, model_parallel=chips) for chips in (1, 4))
    assert four.bounds[2].roofline_seconds == pytest.approx(one.bounds[2].roofline_seconds / 4)
    assert four.rtfx == pytest.approx(one.rtfx)


def test_float32_reads_twice_as_much_and_says_what_is_not_counted() -> None:
    narrow = bounds()
    wide = roofline(Config.granite_4_0_1b(), CHIPS["v5e"], Workload(64, 20.0), dtype_bytes=4)
    assert wide.bounds[2].bytes == 2 * narrow.bounds[2].bytes
    assert "float32 products take several passes" in "".join(wide.lines())
    assert "float32" not in "".join(narrow.lines())


def test_a_chip_without_a_data_sheet_is_named() -> None:
    assert find_chip("v6e:2x2") is CHIPS["v6e"]
    with pytest.raises(GraniteError, match="no roofline for 'v4'"):
        find_chip("v4:2x2x1")


@pytest.mark.parametrize("most", [0, 7, 8, 15, 63, 64, 65, 96, 200, 1000])
@pytest.mark.parametrize("start", [1, 8, 60, 64, 500])
def test_the_largest_batch_is_found(most: int, start: int) -> None:
    # Given that so many rows fit, when the search begins anywhere
    asked = []

    def fits(rows: int) -> bool:
        asked.append(rows)
        return rows <= most

    # Then it finds the largest multiple of eight, and asks for none twice
    assert largest_batch(fits, start) == most // 8 * 8
    assert len(asked) == len(set(asked)) < 16
    assert all(rows % 8 == 0 for rows in asked)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["plan", "--topology", "v5e:2x4", *arguments])


def test_the_roofline_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given no TPU compiler, when the roofline alone is asked for
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    monkeypatch.setattr(aot, "plan", None)
    result = invoke("--no-compile", "--price", "1.20")

    # Then it is printed as the documentation has it, and says that it is no measurement
    assert (result.exit_code, result.stderr) == (0, "")
    page = (Path(__file__).parents[1] / "docs" / "devices.md").read_text(encoding="utf-8")
    assert "".join(f"    {line}\n" for line in result.stdout.splitlines()) in page
    assert result.stdout.splitlines()[-1] == (
        "a bound from data sheets: nothing was measured, and real programs are slower"
    )


def test_the_roofline_as_json() -> None:
    # Given a price, when JSON is asked for, then there is an object a program and one of all, without infinities
    result = invoke("--no-compile", "--price", "2", "--format", "json", "--batch", "8", "--tokens-per-second", "3")
    assert (result.exit_code, result.stderr) == (0, "")
    *programs, all_of_them = map(json.loads, result.stdout.splitlines())
    assert [program["program"] for program in programs] == ["encode", "prefill", "decode"]
    assert all(program["batch"] == 8 and program["roofline_seconds"] > 0 for program in programs)
    assert all_of_them["workload"]["tokens_per_second"] == 3
    assert all_of_them["dollars_per_1000_hours"] == pytest.approx(2000 / all_of_them["rtfx_per_chip"])
    # And without a price there are no dollars
    *_, unpriced = map(json.loads, invoke("--no-compile", "--format", "json").stdout.splitlines())
    assert unpriced["dollars_per_1000_hours"] is None
    assert "$" not in invoke("--no-compile").stdout


def test_what_cannot_be_bound_is_one_line() -> None:
    for arguments, error in (
        (["--topology", "v4:2x2x1"], "no roofline for 'v4': the data sheets here are those of v5e, v5p, v6e"),
        (["--largest-batch"], "--largest-batch and --no-compile exclude each other"),
    ):
        result = invoke("--no-compile", *arguments)
        assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"granite-jax: {error}\n")


@pytest.fixture
def most_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Given a compiler by which decode takes more than a chip has above 40 rows; the rows that it was asked for."""
    asked: list[int] = []

    def plan(config: Config, topology: str, bucket: Bucket, **_: Any) -> Iterator[aot.Plan]:
        asked.append(bucket.batch)
        for program in ("encode", "prefill", "decode"):
            yield aot.Plan(program, program != "decode" or bucket.batch <= 40, 16 << 30, peak_bytes=bucket.batch << 28)

    monkeypatch.setattr(aot, "plan", plan)
    return asked


def test_the_command_plans_for_the_largest_batch(most_rows: list[int]) -> None:
    # When the largest batch is searched for from 24 rows
    result = invoke("--largest-batch", "--batch", "24")

    # Then every batch that was tried is told, none of them compiled twice, and programs and roofline are those of it
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[:3] == ["24 rows fit", "48 rows do not fit", "32 rows fit"]
    assert "the largest batch that fits has 40 rows on each copy of the weights" in lines
    assert len(most_rows) == len(set(most_rows))
    assert "decode: peak 10.00 of the 16.00 GiB that programs have of a chip, 0 collectives" in lines
    assert any(re.match("assumed: 40 rows of 20 s", line) for line in lines)

    # And in JSON it is a field of every program beside those that there are without it
    objects = [json.loads(line) for line in invoke("--largest-batch", "--format", "json").stdout.splitlines()]
    assert [program["batch"] for program in objects[:-1]] == [40] * 3
    assert {field.name for field in dataclasses.fields(aot.Plan)} <= set(objects[0])


def test_the_command_says_that_no_batch_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a model that is too large, when the largest batch is searched for, then it says so, by its exit status, too
    monkeypatch.setattr(aot, "plan", lambda *_, **__: iter([aot.Plan("encode", False, 16 << 30)]))
    result = invoke("--largest-batch", "--format", "json")
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "granite-jax: not even eight rows fit\n")


def test_chips_without_a_data_sheet_are_planned_nevertheless(most_rows: list[int]) -> None:
    # Given other chips, when programs are compiled for them, then what the compiler says is there, and no bound
    result = invoke("--topology", "v4:2x2x1", "--batch", "8")
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 4)
    assert result.stdout.splitlines()[-1].startswith("no roofline: ")
    objects = invoke("--topology", "v4:2x2x1", "--batch", "8", "--format", "json").stdout.splitlines()
    assert len(objects) == 3 and "roofline_seconds" not in objects[0]
