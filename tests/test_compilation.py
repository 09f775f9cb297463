"""Programs compiled before they are run: in JAX's cache when they are called, on one device and on several."""

import threading
from collections.abc import Iterator
from pathlib import Path

import hf_fixture
import jax
import numpy as np
import pytest

import granite_jax as gj
from granite_jax.engine import compilation
from granite_jax.errors import CheckpointError
from granite_jax.recognition.buckets import Bucket
from granite_jax.recognition.encoding import ALIGN, ENCODE_WITH_LOGITS

BUCKET = Bucket(2, 48_000, 110, 140)
NOISE = (0.1 * np.random.default_rng(0).standard_normal(16_000)).astype(np.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf")
    small = {"num_layers": 1, "hidden_dim": 8, "num_heads": 4, "dim_head": 4}
    one_layer = {"num_hidden_layers": 1}
    hf_fixture.write_random_checkpoint(
        directory,
        encoder_config=small,
        projector_config={"encoder_hidden_size": 8, **one_layer},
        text_config=one_layer,
    )
    return directory


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """For each program that XLA compiles, or finds in its cache on disk, the name of the thread."""
    threads: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and kwargs["fun_name"] == "jit(run)":
            threads.append(threading.current_thread().name)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield threads
    jax.monitoring.unregister_event_duration_listener(listen)


def load(checkpoint: Path, **options: object) -> gj.Transcriber:
    return gj.Transcriber.from_pretrained(checkpoint, buckets=[BUCKET], batch_size=2, dtype="float32", **options)


@pytest.mark.parametrize(("devices", "words"), [(1, False), (4, False), pytest.param(4, True, marks=pytest.mark.slow)])
def test_a_program_that_was_compiled_ahead_is_not_compiled_again(
    checkpoint: Path, compiled: list[str], devices: int, words: bool
) -> None:
    # Given a bucket's programs, compiled in threads while the weights were read
    asr = load(checkpoint, compile_ahead=True, devices=jax.devices()[:devices])
    if words:
        asr.recognizer().compiler.start(BUCKET, ENCODE_WITH_LOGITS, ALIGN)
    asr.recognizer().compiler.finish()
    assert len(compiled) == asr.compilations == (5 if words else 3)
    assert {name.split()[0] for name in compiled} == {"compile"}
    # When inputs are transcribed with options of every kind, then nothing is traced or compiled again
    asr.warmup(words=words)
    for options in (
        {},
        {"speculative": "relaxed"},
        {"keywords": ["speech"], "keyword_gate": False},
        {"word_timestamps": words},
    ):
        asr.transcribe([NOISE] * 3, max_new_tokens=3, **options)
    assert len(compiled) == asr.compilations == (5 if words else 3)


def test_what_is_not_compiled_ahead_is_compiled_by_its_call(
    checkpoint: Path, compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given no thread that is free, when an input is transcribed, then nothing waits for one
    busy = load(checkpoint)
    busy.recognizer().compiler._threads = compilation._Threads(0)
    expected = busy.transcribe(NOISE, max_new_tokens=3).tokens
    assert compiled == ["granite-jax-engine"] * 3

    # And given a compiler that fails in them, then the text is the same
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda self: 1 / 0)
    assert load(checkpoint).transcribe(NOISE, max_new_tokens=3).tokens == expected
    assert compiled == ["granite-jax-engine"] * 6


def test_a_damaged_checkpoint_is_told_while_programs_are_compiled(checkpoint: Path, tmp_path: Path) -> None:
    # Given a checkpoint whose weights end too early, when it is loaded, then the error is the usual one
    for file in checkpoint.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[:-100] if file.suffix == ".safetensors" else data)
    with pytest.raises(CheckpointError, match="safetensors"):
        load(tmp_path, compile_ahead=True)


def test_texts_of_the_encoder_alone_need_no_decoder(checkpoint: Path) -> None:
    # Given a confidence filter that every CTC text passes, when inputs are transcribed, then one program is traced
    asr = load(checkpoint)
    transcript = asr.transcribe(NOISE, speculative="relaxed-fast", ctc_threshold=100.0, max_new_tokens=3)
    assert (transcript.stats["route"], asr.compilations) == ("ctc", 1)
