"""The compiled programs by themselves."""

from pathlib import Path

import hf_fixture
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_transcriber import PlainTranscriber
from retraces import retraces

from granite_jax.keywords.spotter import make_keyword_batch
from granite_jax.models.granite_speech.config import Config
from granite_jax.models.granite_speech.functions import abstract_params
from granite_jax.recognition.buckets import Bucket
from granite_jax.recognition.speech_lm_programs import SpeechLMPrograms


def test_a_retrace_names_the_argument_that_changed() -> None:
    # Given a program that was traced once
    config = Config.from_dict(hf_fixture.make_config(hf_fixture.make_tokenizer(), tied=False, dtype="float32"))
    programs = SpeechLMPrograms(config, jnp.float32)

    def trace(samples: int) -> None:
        count = jax.ShapeDtypeStruct((1,), jnp.int32)
        inputs = jax.ShapeDtypeStruct((1, samples), jnp.float32), count, make_keyword_batch([None]), count
        jax.eval_shape(programs.encode, abstract_params(config), *inputs)

    trace(4800)
    assert retraces(programs, 1) == []

    # When it is traced for the same types again, and for others, then only the latter is told, by its argument
    trace(4800)
    trace(9600)
    assert retraces(programs, 1) == ["encode: ['samples was float32[1,4800], is float32[1,9600]']"]


@pytest.mark.slow
def test_bfloat16_runs_on_bfloat16_weights(tmp_path: Path) -> None:
    # Given a model in bfloat16, when it transcribes, then a result comes from weights of that type
    hf_fixture.write_random_checkpoint(tmp_path / "hf")
    buckets = [Bucket(1, 48_000, 100, 140)]
    asr = PlainTranscriber.from_pretrained(tmp_path / "hf", dtype="bfloat16", batch_size=1, buckets=buckets)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(asr.params)} == {"bfloat16"}
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, 32_000).astype(np.float32)
    assert len(asr.transcribe(noise, max_new_tokens=5).tokens) == 5
