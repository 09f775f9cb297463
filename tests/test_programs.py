"""The compiled programs by themselves."""

import hf_fixture
import jax
import jax.numpy as jnp
from retraces import retraces

from granite_jax.inference.programs import Programs
from granite_jax.keywords.spotter import candidates
from granite_jax.model.config import Config
from granite_jax.model.granite_speech import abstract_params


def test_a_retrace_names_the_argument_that_changed() -> None:
    # Given a program that was traced once
    config = Config.from_dict(hf_fixture.make_config(hf_fixture.make_tokenizer(), tied=False, dtype="float32"))
    programs = Programs(config, jnp.float32)

    def trace(samples: int) -> None:
        shapes = jax.ShapeDtypeStruct((1, samples), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)
        jax.eval_shape(programs.encode, abstract_params(config), *shapes, candidates([None]))

    trace(4800)
    assert retraces(programs, 1) == []

    # When it is traced for the same types again, and for others, then only the latter is told, by its argument
    trace(4800)
    trace(9600)
    assert retraces(programs, 1) == ["encode: ['samples was float32[1,4800], is float32[1,9600]']"]
