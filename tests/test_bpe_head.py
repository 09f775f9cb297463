"""The BPE head: pooling, labels and drafts, against a plain computation of the published description."""

import functools
import shutil
from pathlib import Path
from typing import Any

import hf_fixture
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from goldens import cases as goldens
from plain_transcriber import PlainTranscriber

import granite_jax as gj
from granite_jax.checkpoint.tree import flatten
from granite_jax.convert import convert
from granite_jax.evaluation.heldout import CLIPS
from granite_jax.models import granite_speech
from granite_jax.models.layers import bpe_head
from granite_jax.options import TranscribeOptions
from granite_jax.pretrained import open_checkpoint
from granite_jax.recognition.buckets import draft_budget, make_bucket
from granite_jax.recognition.speech_lm_programs import Speculation
from granite_jax.transcriber import Transcriber

LABELS = 300
TRAINED = Path(__file__).parent / "data" / "demo_bpe_head" / "out_llm.safetensors"
LENGTHS = (1, 3, 4, 41, 60)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    directory = tmp_path_factory.mktemp("bpe")
    config = hf_fixture.write_random_checkpoint(directory / "hf", 11, bpe_labels=LABELS)
    tensors = hf_fixture.random_tensors(config, 11)
    tensors["encoder.out.bias"][0] += 15.0  # so that some frames are blank, and others are not
    hf_fixture.write_tensors(directory / "hf", tensors)
    convert(directory / "hf", directory / "own")
    return open_checkpoint(directory / "own")


def plain_labels(params: dict[str, np.ndarray], layers: np.ndarray, hidden: np.ndarray, importance: str) -> list[int]:
    """Labels of one utterance's activations, window by window, in float64: what the model card describes."""

    def softmax(x: np.ndarray) -> np.ndarray:
        exponents = np.exp(x - x.max(-1, keepdims=True))
        return exponents / exponents.sum(-1, keepdims=True)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ np.float64(params[f"encoder.{name}.kernel"]) + np.float64(params[f"encoder.{name}.bias"])

    middle = np.float64(layers[len(layers) // 2 - 1])
    if importance == "after":
        middle = middle + linear(softmax(linear(middle, "out")), "out_mid")
    weights = 1 - softmax(linear(middle, "out"))[:, 0]
    labels = []
    for start in range(0, len(hidden), 4):
        w, h = weights[start : start + 4], np.float64(hidden[start : start + 4])
        pooled = (w[:, None] * h).sum(0) / (w.sum() + 1e-8)
        labels.append(int(linear(pooled, "out_bpe").argmax()))
    return labels


@pytest.mark.parametrize("importance", ["before", "after"])
def test_labels_are_those_of_a_plain_computation(checkpoint: Any, importance: Any) -> None:
    # Given utterances of several lengths in one batch, garbage after them
    config, params = checkpoint.config, checkpoint.load_params("float32")
    features = 3 * np.random.default_rng(0).standard_normal((len(LENGTHS), 63, 160)).astype(np.float32)
    lengths = np.array(LENGTHS, np.int32)
    encode = jax.jit(functools.partial(granite_speech.encode, config, capture_layers=True, importance=importance))
    encoded = encode(params, features, lengths)

    # When the head labels them
    wanted = np.ones(len(LENGTHS), np.int32)
    labels = jax.jit(functools.partial(granite_speech.bpe_labels, config))(
        params, encoded.hidden, encoded.importance, lengths, wanted
    )

    # Then labels are those of the description, the last, partial window included, and blank after it
    leaves, distinct = flatten(jax.device_get(params)), set()
    for row, length in enumerate(LENGTHS):
        alone = [np.asarray(x)[..., row, :length, :] for x in (encoded.layers, encoded.hidden)]
        expected = plain_labels(leaves, *alone, importance)
        windows = -(-length // 4)
        assert labels[row, :windows].tolist() == expected
        assert not labels[row, windows:].any()
        distinct |= set(expected)
    assert len(distinct) > 5


def test_pooling_weighs_frames_and_leaves_out_padding() -> None:
    # Given six frames in two windows, of which the second ends after two, and another row's frame behind them
    hidden = jnp.arange(1.0, 8.0)[None, :, None] * jnp.ones((1, 1, 3))
    hidden = hidden.at[0, 6].set(jnp.nan)
    importance = jnp.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.25, 9.0]])
    pooled = bpe_head.pool(hidden, importance, jnp.array([6]))

    # When pooled, then windows are weighted means of their valid frames
    assert pooled.shape == (1, 2, 3)
    np.testing.assert_allclose(pooled[0, :, 0], [3.0, (0.5 * 5 + 0.25 * 6) / 0.75], rtol=1e-6)


def test_tokens_are_labels_without_blanks_and_repetitions_less_one() -> None:
    # Given labels, when they become tokens, then label i is the token i - 1
    assert bpe_head.bpe_tokens([0, 5, 5, 0, 5, 1, 1, 2]) == [4, 4, 0, 1]


def test_rows_that_want_no_labels_cost_nothing(checkpoint: Any) -> None:
    # Given a batch of which nobody wants labels, when the head runs, then it computes no logits
    calls = []

    def head(pooled: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(1))
        return pooled

    pooled = jnp.ones((3, 200, 7))
    labels = bpe_head.best_labels(head, pooled, jnp.array([800, 800, 12]), jnp.array([0, 0, 0]))
    jax.effects_barrier()
    assert not calls and not labels.any()

    # And of which one short row does, then only the first windows are
    bpe_head.best_labels(head, pooled, jnp.array([800, 800, 12]), jnp.array([0, 0, 1]))
    jax.effects_barrier()
    assert len(calls) == 1


# Through the Transcriber.


@pytest.fixture(scope="module")
def asr(checkpoint: Any) -> Transcriber:
    bucket = make_bucket(checkpoint.config, 3, 6.0)
    options = {"batch_size": 3, "buckets": [bucket], "compilation_cache": False}
    return PlainTranscriber.from_pretrained(checkpoint.directory, dtype="float32", **options)


@pytest.fixture(scope="module")
def sounds() -> list[np.ndarray]:
    return [goldens.sounds()[name] for name in ("speech-numbers", "chirp-2.5s", "speech-noisy")]


def test_drafts_of_either_head_are_lossless(asr: Transcriber, sounds: list[np.ndarray]) -> None:
    # Given a checkpoint with both heads, when drafts come from one, the other or none
    fields: dict[str, Any] = {"max_new_tokens": 20}
    plain = asr.transcribe(sounds, speculative=False, **fields)
    bpe, ctc = (asr.transcribe(sounds, draft_from=head, **fields) for head in ("bpe", "ctc"))

    # Then tokens are the same, drafts are not, and stats say whose they were; the BPE head is the default
    assert [t.tokens for t in plain] == [t.tokens for t in bpe] == [t.tokens for t in ctc]
    assert [t.stats["draft_from"] for t in (*plain, *bpe, *ctc)] == [None] * 3 + ["bpe"] * 3 + ["ctc"] * 3
    assert all(t.draft for t in bpe) and [t.draft for t in bpe] != [t.draft for t in ctc]
    assert [t.draft for t in asr.transcribe(sounds, **fields)] == [t.draft for t in bpe]
    assert asr.transcribe(sounds[0], draft="abc", **fields).stats["draft_from"] == "caller"


def test_a_draft_is_the_text_of_the_labels_as_the_tokenizer_cuts_it(asr: Transcriber, sounds: list[np.ndarray]) -> None:
    # Given an utterance in a batch, when it is drafted, then the draft is that of its own labels
    config, params, sound = asr.config, asr.params, sounds[0]
    transcript, *_ = asr.transcribe(sounds, max_new_tokens=200)
    features, frames = gj.log_mel(jnp.asarray(sound)[None], jnp.array([len(sound)])), gj.num_frames(len(sound))
    lengths, wanted = jnp.array([frames]), jnp.ones(1, jnp.int32)
    before, after = (
        granite_speech.encode(config, params, features, lengths, importance=importance)
        for importance in ("before", "after")
    )
    labels, others = (
        granite_speech.bpe_labels(config, params, one.hidden, one.importance, lengths, wanted)
        for one in (before, after)
    )
    text = " ".join(asr.tokenizer.decode(bpe_head.bpe_tokens(np.asarray(labels)[0])).split())
    assert transcript.draft == tuple(asr.tokenizer.encode(text))[: min(200, draft_budget(len(sound)))]

    # And the importance of frames is that before self-conditioning by default, which matters
    plain = granite_speech.encode(config, params, features, lengths)
    np.testing.assert_array_equal(plain.importance, before.importance)
    assert not np.array_equal(others, labels)


def test_the_bpe_head_drafts_punctuated_text_only_when_asked(asr: Transcriber, sounds: list[np.ndarray]) -> None:
    # Given another task, when nothing is said, then there is no draft; when the head is named, then there is
    fields: dict[str, Any] = {"task": "punctuate", "max_new_tokens": 12}
    plain, drafted = asr.transcribe(sounds[0], **fields), asr.transcribe(sounds[0], draft_from="bpe", **fields)
    assert (plain.stats["draft_from"], drafted.stats["draft_from"]) == (None, "bpe")
    assert plain.tokens == drafted.tokens and not plain.draft and drafted.draft


def test_only_the_text_of_characters_is_final_without_the_language_model(
    asr: Transcriber, sounds: list[np.ndarray]
) -> None:
    # Given a threshold that every frame passes, when the BPE head drafts, then the CTC text is final: the threshold is
    # the paper's for frames of characters
    transcript = asr.transcribe(sounds[0], speculative="relaxed", ctc_threshold=99.0, max_new_tokens=200)
    assert (transcript.stats["route"], transcript.stats["draft_from"]) == ("ctc", "ctc")
    assert transcript.text == transcript.ctc_text


def test_keywords_repair_the_draft_that_they_were_heard_in(
    asr: Transcriber, sounds: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a keyword that takes a word's place in the CTC text, when the BPE head would draft, then that text does
    monkeypatch.setattr("granite_jax.recognition.rows.repair", lambda labels, matches, keywords: "kai kai")
    transcript = asr.transcribe(sounds[0], keywords=["kai"], max_new_tokens=20)
    assert (transcript.draft, transcript.stats["draft_from"]) == (tuple(asr.tokenizer.encode("kai kai")), "ctc")


@pytest.mark.parametrize(
    "fields",
    [{"task": "translate", "target_language": "fr", "draft_from": "bpe"}, {"task": "punctuate", "draft_from": "ctc"}],
)
def test_a_head_that_cannot_draft_a_task_is_an_error(fields: dict[str, Any]) -> None:
    # Given a task that a head does not draft, when it is asked to, then the error says so
    with pytest.raises(gj.GraniteError, match="does not draft for task"):
        TranscribeOptions(**fields)


def test_a_head_that_is_not_there_is_named(tmp_path: Path, sounds: list[np.ndarray]) -> None:
    # Given a checkpoint without a BPE head, when it shall draft, then the error says so
    hf_fixture.write_random_checkpoint(tmp_path, **hf_fixture.TINY)
    asr = PlainTranscriber.from_pretrained(tmp_path, dtype="float32", compilation_cache=False)
    with pytest.raises(gj.GraniteError, match='draft_from="bpe" needs a BPE head'):
        asr.transcribe(sounds[0], draft_from="bpe")


def test_the_importance_of_frames_is_an_option() -> None:
    # Given something else, when it is chosen, then the error names it
    assert Speculation(importance="after").importance == "after"
    with pytest.raises(gj.GraniteError, match='importance is "before" or "after"'):
        Speculation(importance="between")  # type: ignore[arg-type]


@pytest.mark.slow
def test_devices_that_share_the_head_draft_alike(checkpoint: Any, asr: Transcriber, sounds: list[np.ndarray]) -> None:
    # Given two devices with half of the weights each, when they draft, then as one device does
    bucket = make_bucket(checkpoint.config, 3, 6.0)
    options = {"batch_size": 3, "buckets": [bucket], "compilation_cache": False}
    several = PlainTranscriber.from_pretrained(
        checkpoint.directory, dtype="float32", devices=jax.devices()[:2], model_parallel=2, **options
    )
    found, expected = (one.transcribe(sounds, max_new_tokens=20) for one in (several, asr))
    assert [(t.tokens, t.draft) for t in found] == [(t.tokens, t.draft) for t in expected]


@pytest.mark.slow
def test_a_trained_head_drafts_what_the_model_accepts(tmp_path: Path) -> None:
    # Given the embedded checkpoint with a BPE head trained on its encoder (`recipe bpe-head`), and clips
    convert("demo", tmp_path)
    shutil.copyfile(TRAINED, tmp_path / "out_llm.safetensors")
    asr = PlainTranscriber.from_pretrained(tmp_path, dtype="float32", compilation_cache=False)
    clips = sorted(CLIPS.glob("grammar-0[0-3]*.ogg"))
    # When decoded with its drafts and without
    drafted, greedy = asr.transcribe(clips), asr.transcribe(clips, speculative=False)
    # Then texts are the same, ties aside, and much of them comes from drafts that save passes
    assert {transcript.stats["draft_from"] for transcript in drafted} == {"bpe"}
    assert sum(a.tokens != b.tokens for a, b in zip(drafted, greedy, strict=True)) <= 1
    tokens = sum(len(transcript.tokens) for transcript in drafted)
    assert sum(transcript.stats["accepted_tokens"] for transcript in drafted) > 0.3 * tokens
    assert sum(transcript.stats["llm_passes"] for transcript in drafted) < 0.8 * tokens
