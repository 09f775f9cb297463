"""Eight emulated devices give the tokens of one, however rows and weights are spread."""

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_fixture
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plain_transcriber import PlainTranscriber

import granite_jax as gj
from granite_jax.checkpoint.tree import expected_shapes, flatten
from granite_jax.engine.sharding import DeviceMesh
from granite_jax.models.granite_speech.config import Config
from granite_jax.recognition.buckets import Bucket
from granite_jax.recognition.partition import param_shardings

# Heads that four devices can share, and key/value heads that they cannot.
MODEL: dict[str, Any] = {
    "encoder_config": {"num_layers": 2, "num_heads": 4},
    "projector_config": {"num_hidden_layers": 1},
    "text_config": {"num_hidden_layers": 2},
}
# KeywordMatch or not, and of each utterance's own that may be heard by an encoder that knows nothing.
SHARED = {"keywords": ["speech", "2024", "the", "kai"], "keyword_gate": False, "keyword_boost": 9.0}
OWN = {
    "keywords": [[f"{chr(97 + i)}{c}{d}" for c in "aeiou" for d in "lmnr"] if i % 4 else None for i in range(11)],
    "keyword_gate": -8.0,
    "keyword_boost": 50.0,
}
CHOICES = {"lossless": {}, "relaxed": {"speculative": "relaxed-fast"}, "one list": SHARED, "own lists": OWN}
SECONDS = (1.0, 2.0, 1.5, 2.5, 0.7, 3.0, 1.2, 2.2, 0.4, 1.9, 2.7)
LIMIT = 8


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Eleven utterances, and what one device makes of them."""
    directory: Path = tmp_path_factory.mktemp("random")
    hf_fixture.write_random_checkpoint(directory, seed=1, **MODEL)
    rng = np.random.default_rng(0)
    audio = [0.1 * rng.standard_normal(int(16_000 * seconds)).astype(np.float32) for seconds in SECONDS]

    def load(batch_size: int = 2, **options: Any) -> gj.Transcriber:
        buckets = [Bucket(rows, 48_000, 110, 140) for rows in {1, batch_size}]
        return PlainTranscriber.from_pretrained(
            directory, dtype="float32", batch_size=batch_size, buckets=buckets, compilation_cache=False, **options
        )

    one = load()

    @functools.cache
    def expected(choice: str) -> list[gj.Transcript]:
        return one.transcribe(audio, max_new_tokens=LIMIT, **CHOICES[choice])

    return SimpleNamespace(directory=directory, audio=audio, load=load, expected=expected)


@pytest.mark.parametrize(
    "options",
    [
        {"devices": 8},
        {"devices": 8, "parallel": "pmap"},
        pytest.param({"devices": 8, "model_parallel": 2}, marks=pytest.mark.slow),
        pytest.param({"devices": 4, "model_parallel": 4}, marks=pytest.mark.soak),
        pytest.param({"devices": 3, "batch_size": 1}, marks=pytest.mark.slow),
    ],
    ids=str,
)
@pytest.mark.parametrize("choice", CHOICES)
def test_many_devices_write_what_one_does(job: SimpleNamespace, options: dict[str, Any], choice: str) -> None:
    # Given a number of utterances that no number of devices divides, when several devices share them
    devices = jax.devices()[: options["devices"]]
    asr = job.load(**options | {"devices": devices})
    found = asr.transcribe(job.audio, max_new_tokens=LIMIT, **CHOICES[choice])

    # Then tokens and statistics are those of one device
    expected = job.expected(choice)
    assert [t.tokens for t in found] == [t.tokens for t in expected]
    assert [t.stats for t in found] == [t.stats for t in expected]
    assert asr.compilations <= 6
    # And keywords have left their mark
    if "keywords" in CHOICES[choice]:
        assert any(a.tokens != b.tokens for a, b in zip(found, job.expected("lossless"), strict=True))


@pytest.mark.parametrize(
    "options",
    [
        {"devices": 4},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"devices": 2, "parallel": "pmap"}, marks=pytest.mark.slow),
        pytest.param({"devices": 4, "model_parallel": 2}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_emissions_are_those_of_the_functions(job: SimpleNamespace, options: dict[str, Any]) -> None:
    # Given an utterance that is no whole number of seconds, and what the pure functions make of it alone
    config, params = gj.load(job.directory, dtype="float32")
    samples, length = job.audio[3], jnp.array([len(job.audio[3])])
    features = gj.log_mel(jnp.asarray(samples)[None], length)
    hidden = gj.encode(config, params, features, gj.num_frames(length)).hidden
    logits = gj.ctc_logits(config, params, hidden)
    # When a Transcriber is asked, wherever its weights are
    found = job.load(**options | {"devices": jax.devices()[: options.get("devices", 1)]}).ctc_emissions(samples)
    # Then the same is found, without padding
    assert found.features.shape == (gj.num_frames(len(samples)), 160)
    np.testing.assert_allclose(found.features, features[0], atol=1e-5)
    np.testing.assert_allclose(found.ctc_logits, logits[0], atol=1e-4)


def test_weights_are_split_by_the_table(job: SimpleNamespace) -> None:
    # Given two copies of the weights on four devices each, when the weights are placed
    devices = DeviceMesh.make(jax.devices(), model_parallel=4)
    config, params = gj.load(job.directory, dtype="float32")
    placed = flatten(devices.put(params, param_shardings(config, devices)))

    # Then heads, channels and their inverse are split over `model`; two key/value heads, norms and biases are not
    def parts(path: str) -> tuple[int, ...]:
        leaf = placed[path]
        return tuple(a // b for a, b in zip(leaf.shape, leaf.sharding.shard_shape(leaf.shape), strict=True))

    assert parts("decoder.layers.attention.q.kernel") == (1, 1, 4)
    assert parts("decoder.layers.attention.k.kernel") == (1, 1, 1)
    assert parts("decoder.layers.attention.out.kernel") == (1, 4, 1)
    assert parts("decoder.layers.down.kernel") == (1, 4, 1)
    assert parts("encoder.layers.convolution.up.kernel") == (1, 1, 1, 4)
    assert parts("encoder.layers.ff1.up.bias") == (1, 4)
    assert parts("encoder.layers.norm.scale") == (1, 1)
    assert parts("projector.query") == (1, 1, 1)


def test_most_of_a_big_model_is_split() -> None:
    # Given a model of granite-speech-3.3-8b's kind, when its weights are split over eight devices
    raw = hf_fixture.make_config(hf_fixture.make_tokenizer(), True, "float32", **MODEL)
    raw["text_config"] |= {
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "num_hidden_layers": 40,
        "vocab_size": 49160,
    }
    raw["text_config"] |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    raw["encoder_config"] |= {"num_heads": 8, "hidden_dim": 1024, "dim_head": 128, "num_layers": 16}
    raw["projector_config"] |= {"encoder_hidden_size": 1024}
    config = Config.from_dict(raw)
    shardings = flatten(param_shardings(config, DeviceMesh.make(jax.devices(), model_parallel=8)))

    # Then a device holds little more than an eighth
    shapes = expected_shapes(config)
    total = sum(np.prod(shape) for shape in shapes.values())
    held = sum(np.prod(shardings[path].shard_shape(shape)) for path, shape in shapes.items())
    assert total > 8e9
    assert held < 1.1 * total / 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_parallel": 3}, "model_parallel=3 does not divide 8 devices"),
        ({"model_parallel": 8}, "model_parallel=8 does not divide the encoder's 4 attention heads"),
        ({"model_parallel": 2, "parallel": "pmap"}, "model_parallel is for"),
        ({"parallel": "threads"}, "parallel is"),
        ({"devices": []}, "devices: 0 of them"),
    ],
)
def test_options_that_do_not_go_together_are_named(job: SimpleNamespace, options: dict[str, Any], message: str) -> None:
    # Given eight devices, when they are asked for what they cannot do, then the error says which option
    with pytest.raises(gj.GraniteError, match=message):
        job.load(**{"devices": jax.devices()} | options)
