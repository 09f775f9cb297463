"""The encoder's own text, without the language model: `recognizer="ctc"`, on the embedded checkpoint."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import srt
from batch_jobs import results, write_lines
from typer.testing import CliRunner

import granite_jax as gj
from granite_jax import batch, cli, evaluation
from granite_jax.audio.load import load_audio
from granite_jax.evaluation.heldout import CLIPS
from granite_jax.options import TranscribeOptions
from granite_jax.pretrained import open_checkpoint
from granite_jax.recognition.buckets import make_bucket

SAMPLES = Path(__file__).parents[1] / "samples"
NAMES = ["request.wav", "one-name.wav", "two-names.wav"]


@pytest.fixture(scope="module")
def asr() -> gj.Transcriber:
    config = open_checkpoint("demo").config
    buckets = [make_bucket(config, rows, 8.0) for rows in (1, 2)]
    return gj.Transcriber.from_pretrained("demo", dtype="float32", batch_size=2, buckets=buckets)


@pytest.fixture(scope="module")
def sounds() -> list[np.ndarray]:
    return [load_audio(SAMPLES / name).samples for name in NAMES]


def test_the_text_is_the_encoders_and_the_decoder_is_not_compiled(
    asr: gj.Transcriber, sounds: list[np.ndarray]
) -> None:
    # Given three sentences, when the encoder alone transcribes them, with words
    found = asr.transcribe(sounds, recognizer="ctc", word_timestamps=True)
    # Then each text is its own, with a confidence and times, and nothing was traced but the encoder and the alignment
    programs = asr.recognizer(TranscribeOptions(recognizer="ctc")).programs
    assert {name for name, traces in programs.traces.items() if traces} == {"encode", "align"}
    assert asr.compilations == programs.num_traces and asr.recognizer().programs.num_traces == 0
    for transcript, sound in zip(found, sounds, strict=True):
        assert transcript.text == transcript.ctc_text != "" and transcript.stats["route"] == "ctc"
        assert transcript.stats["llm_passes"] == 0 and 0.8 < transcript.confidence <= 1
        assert asr.tokenizer.decode(transcript.tokens) == transcript.text
        (segment,) = transcript.segments
        assert " ".join(word.text for word in segment.words) == transcript.text
        assert 0 <= segment.words[0].start < segment.words[-1].end <= len(sound) / 16_000


def test_the_language_model_has_the_same_ctc_text(asr: gj.Transcriber, sounds: list[np.ndarray]) -> None:
    both = [asr.transcribe(sounds, recognizer=recognizer) for recognizer in ("ctc", "speech-lm")]
    assert [t.ctc_text for t in both[0]] == [t.ctc_text for t in both[1]]
    assert len({t.text for t in both[1]} - {t.text for t in both[0]}) >= 1  # which is why there is a language model


def test_results_do_not_depend_on_the_batch(asr: gj.Transcriber, sounds: list[np.ndarray]) -> None:
    options: dict[str, Any] = {"recognizer": "ctc", "word_timestamps": True}
    assert [asr.transcribe(sound, **options).segments for sound in sounds] == [
        transcript.segments for transcript in asr.transcribe(sounds, **options)
    ]


def test_programs_are_bounded(asr: gj.Transcriber, sounds: list[np.ndarray]) -> None:
    # Given inputs of all lengths and options of every kind, when they are transcribed
    recognizer = asr.recognizer(TranscribeOptions(recognizer="ctc"))
    for fields in ({}, {"word_timestamps": True}, {"keywords": ["kravdab"]}, {"guards": False}):
        asr.transcribe([*sounds, *(sound[:8_000] for sound in sounds), sounds[0][:600]], recognizer="ctc", **fields)
    # Then there are at most three programs a bucket
    assert recognizer.max_programs == 3 * len(recognizer.buckets) == 6
    assert recognizer.programs.num_traces <= recognizer.max_programs


def test_keywords_that_were_heard_are_spelled(asr: gj.Transcriber) -> None:
    # Given a clip whose name the encoder misspells, when the name is among the keywords, then it is written
    clip = CLIPS / "free-132.ogg"
    plain = asr.transcribe(clip, recognizer="ctc")
    words = plain.text.split()
    longest = max(words, key=len)
    name = f"{longest[:-1]}{'x' if longest[-1] != 'x' else 'y'}"
    biased = asr.transcribe(clip, recognizer="ctc", keywords=[name, "zzzyqual"], keyword_gate=-3.0)
    assert name in biased.text.split() and longest not in biased.text.split()
    assert biased.stats["keywords"] == (name,) and biased.ctc_text == plain.ctc_text


def test_recordings_silence_and_channels(asr: gj.Transcriber, sounds: list[np.ndarray], tmp_path: Path) -> None:
    # Given a recording of several segments, when the encoder alone transcribes it, then it has the words of its parts
    whole = np.concatenate([*sounds, np.zeros(16_000, np.float32), *sounds])
    transcript = asr.transcribe(whole, recognizer="ctc", segment_seconds=5.0, word_timestamps=True)
    assert len(transcript.segments) > 3
    parts = " ".join(asr.transcribe(sound, recognizer="ctc").text for sound in sounds)
    words = transcript.text.split()
    assert sum(word in parts.split() for word in words) > 0.8 * len(words)
    times = [word.start for segment in transcript.segments for word in segment.words]
    assert times == sorted(times)
    # And silence has no text, and each channel its own
    assert asr.transcribe(np.zeros(32_000, np.float32), recognizer="ctc").flags == ("silence",)
    soundfile.write(tmp_path / "two.wav", np.stack([sounds[0], np.zeros_like(sounds[0])], axis=1), 16_000)
    left, right = asr.transcribe(tmp_path / "two.wav", recognizer="ctc", channels="split")
    assert left.text and right.flags == ("silence",)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("task", {"task": "punctuate"}),
        ("task", {"task": "translate", "target_language": "fr"}),
        ("prompt", {"prompt": "what is said?"}),
        ("language", {"language": "en"}),
        ("max_new_tokens", {"max_new_tokens": 5}),
        ("speculative", {"speculative": "relaxed"}),
        ("draft_from", {"draft_from": "ctc"}),
        ("keyword_boost", {"keyword_boost": 3.0}),
        ("keywords_in", {"keywords_in": "prompt"}),
        ("draft", {"draft": "i need"}),
    ],
)
def test_options_of_the_language_model_are_refused_by_name(
    asr: gj.Transcriber, name: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(
        gj.GraniteError, match=f"^{name} is for the language model, which recognizer=.ctc. does without"
    ):
        asr.transcribe(np.zeros(16_000, np.float32), recognizer="ctc", **fields)


def test_an_unknown_recognizer_is_named() -> None:
    with pytest.raises(gj.GraniteError, match='recognizer is "speech-lm" or "ctc", not \'rnnt\''):
        TranscribeOptions(recognizer="rnnt")  # type: ignore[arg-type]


def test_damaged_weights_are_an_error(asr: gj.Transcriber, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given an encoder that computes no numbers, when an input is transcribed, then it has an error, and no empty text
    recognizer: Any = asr.recognizer(TranscribeOptions(recognizer="ctc"))
    kernel = recognizer._params["encoder"]["input"]["kernel"]
    layer = {**recognizer._params["encoder"]["input"], "kernel": kernel.at[0, 0].set(np.nan)}
    monkeypatch.setattr(recognizer, "_params", {"encoder": {**recognizer._params["encoder"], "input": layer}})
    with pytest.raises(gj.CheckpointError, match="computes no numbers"):
        asr.transcribe(np.ones(16_000, np.float32), recognizer="ctc")


def test_the_commands(asr: gj.Transcriber, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Given the commands with the encoder alone
    monkeypatch.setattr(gj.Transcriber, "from_options", lambda *_, **__: asr)
    expected = asr.transcribe(SAMPLES / "request.wav", recognizer="ctc")

    def invoke(*arguments: Any) -> str:
        done = CliRunner().invoke(cli.app, [*map(str, arguments), "--recognizer", "ctc"])
        assert done.exit_code == 0, done.stderr
        return done.stdout

    # When a recording becomes subtitles, then they are read back
    (cue,) = srt.parse(invoke("transcribe", SAMPLES / "request.wav", "--format", "srt"))
    assert " ".join(cue.content.split()) == expected.text
    # And a job and an evaluation have the same text
    reference = {"audio": str(SAMPLES / "request.wav"), "text": "i need you to turn on the screen in the main hall"}
    manifest = write_lines(tmp_path / "m.jsonl", reference)
    invoke("batch", manifest, "--root", "/", "--out", tmp_path / "out")
    assert [line["text"] for line in results(tmp_path / "out")] == [expected.text]
    assert json.loads((tmp_path / "out" / "job.json").read_text())["options"]["recognizer"] == "ctc"
    with pytest.raises(gj.GraniteError, match="options.recognizer was 'ctc', is None"):
        batch.run(manifest, tmp_path / "out", root="/", dtype="float32")
    found = evaluation.evaluate(
        [str(manifest)], tmp_path / "eval", root="/", transcriber=(asr, "demo"), recognizer="ctc"
    )
    assert found is not None and found["sets"][0]["wer"]["rate"] < 30
