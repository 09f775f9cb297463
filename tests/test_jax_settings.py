"""Settings of JAX that a program around this one may have made."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hf_fixture
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_transcriber import PlainTranscriber

import granite_jax as gj
from granite_jax import BackendError
from granite_jax.recognition.buckets import Bucket

TINY: dict[str, Any] = {
    "encoder_config": {"num_layers": 2, "hidden_dim": 8, "dim_head": 4},
    "projector_config": {"encoder_hidden_size": 8, "num_hidden_layers": 1},
    "text_config": {"num_hidden_layers": 2, "max_position_embeddings": 128},
}


@contextlib.contextmanager
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@contextlib.contextmanager
def x64_and_strict() -> Iterator[None]:
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@contextlib.contextmanager
def defaults() -> Iterator[None]:
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@contextlib.contextmanager
def setting(name: str, value: Any) -> Iterator[None]:
    former = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, former)


def guarded() -> contextlib.AbstractContextManager[None]:
    return setting("jax_transfer_guard", "disallow_explicit")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf")
    hf_fixture.write_random_checkpoint(directory, **TINY)
    return directory


def _transcribe(checkpoint: Path, dtype: str) -> list[tuple[int, ...]]:
    asr = PlainTranscriber.from_pretrained(checkpoint, dtype=dtype, batch_size=2, buckets=[Bucket(2, 33600, 90, 128)])
    rng = np.random.default_rng(0)
    audio = [rng.uniform(-0.3, 0.3, 20_000).astype(np.float32), rng.uniform(-0.3, 0.3, 30_000)]
    return [t.tokens for t in asr.transcribe(audio, keywords=["kai zoe"], keyword_gate=False, max_new_tokens=8)]


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_transcripts_do_not_depend_on_settings(checkpoint: Path, dtype: str) -> None:
    # Given JAX's defaults, 64 bits, 64 bits with no implicit promotion, and a guard against transfers
    tokens = []
    for context in (defaults, x64, x64_and_strict, guarded):
        # When the same audio is transcribed with keywords
        with context():
            tokens.append(_transcribe(checkpoint, dtype))
    # Then the tokens are the same
    assert tokens[0] == tokens[1] == tokens[2] == tokens[3] and all(tokens[0])


def test_a_guard_against_transfers_is_for_those_of_the_program(random_asr: gj.Transcriber) -> None:
    # Given a guard, when a Transcriber warms up and gives its emissions, then these transfers are allowed
    with guarded():
        random_asr.warmup([random_asr.buckets[0]])
        assert random_asr.ctc_emissions(np.zeros(16_000)).features.shape == (50, 160)
        # And those of the program are not
        with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"):
            jax.device_put(np.zeros(3))


@pytest.mark.parametrize("name", ["jax_debug_infs", "jax_no_tracing", "jax_no_execution"])
def test_settings_with_which_no_model_runs_are_named(checkpoint: Path, name: str) -> None:
    with (
        setting(name, True),
        pytest.raises(BackendError, match=rf"^JAX's setting {name} \({name.upper()}\) is on, but"),
    ):
        gj.load(checkpoint)


def test_a_model_that_is_not_compiled_is_warned_of(checkpoint: Path) -> None:
    message = "^JAX_DISABLE_JIT is on: nothing is compiled"
    with setting("jax_disable_jit", True), pytest.warns(UserWarning, match=message):
        gj.load(checkpoint)


@pytest.mark.parametrize("strict", [pytest.param(x64, marks=pytest.mark.slow), x64_and_strict])
def test_functions_take_lengths_and_tokens_of_64_bits(checkpoint: Path, strict: Any) -> None:
    # Given audio, lengths and a prompt as NumPy makes them
    config, params = gj.load(checkpoint, dtype="float32")
    samples = np.random.default_rng(1).uniform(-0.3, 0.3, (2, 16_000))
    lengths = np.array([16_000, 12_000])
    results = []
    for context in (defaults, strict):
        with context():
            # When they go through the model
            features = gj.log_mel(jnp.asarray(samples), jnp.asarray(lengths))
            frames = jnp.asarray((lengths // 160 + 1) // 2)
            hidden = gj.encode(config, params, features, frames).hidden
            audio = gj.project(config, params, hidden, frames)
            count = audio.shape[1]
            prompt = jnp.asarray(np.full((2, count + 2), config.audio_token_id).tolist())
            logits, cache = gj.prefill(config, params, prompt, frames * 0 + count + 2, audio, capacity=count + 4)
            logits, _ = gj.decode_step(config, params, jnp.argmax(logits, axis=-1), cache)
            results.append(np.asarray(logits))
    # Then the logits are float32, and those of JAX's defaults
    assert results[1].dtype == np.float32
    np.testing.assert_allclose(results[1], results[0], atol=1e-4)
