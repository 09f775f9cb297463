"""What is read from a program that the TPU compiler made."""

from types import SimpleNamespace
from typing import Any

import jax

from granite_jax.model.config import Config
from granite_jax.planning import aot

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
    return aot._read("decode", compiled, 4 * 8 * 2 * 16 * 2048 * 4, Config.granite_4_0_1b(), 4 << 30)


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
