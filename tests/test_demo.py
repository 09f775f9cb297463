"""The embedded checkpoint on real audio: the committed held-out clips and the samples."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import soundfile

import granite_jax as gj
from granite_jax.evaluation.heldout import CLIPS
from granite_jax.evaluation.metrics import score
from granite_jax.pretrained import open_checkpoint
from granite_jax.recognition.buckets import make_bucket
from granite_jax.training.recipes.demo import noise

ROOT = Path(__file__).parents[1]


def _manifest(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def asr() -> gj.Transcriber:
    return gj.Transcriber.from_pretrained("demo", dtype="float32", compilation_cache=False)


@pytest.fixture(scope="module")
def clips() -> list[dict]:
    return _manifest(CLIPS / "heldout.jsonl")


@pytest.fixture(scope="module")
def transcripts(asr, clips) -> list[gj.Transcript]:
    return asr.transcribe([CLIPS / clip["audio"] for clip in clips])


def test_a_sample_is_heard_and_silence_is_not():
    # Given one row of ten seconds as the only bucket, when a sample and silence are transcribed
    buckets = [make_bucket(open_checkpoint("demo").config, 1, 10.0)]
    asr = gj.Transcriber.from_pretrained("demo", dtype="float32", batch_size=1, buckets=buckets)
    said = {sample["audio"]: sample["text"] for sample in _manifest(ROOT / "samples" / "samples.jsonl")}
    heard, silence = asr.transcribe([ROOT / "samples" / "request.wav", np.zeros(80_000, np.float32)])
    # Then the text is what is said, or nothing
    assert heard.text == said["request.wav"] and heard.flags == ()
    assert silence.text == "" and silence.flags == ("silence",)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "decoding", "most"),
    [
        *[("free", "text", 30.0), ("free", "ctc_text", 30.0), ("grammar", "text", 7.0), ("grammar", "ctc_text", 17.0)],
        *[("joined", "text", 24.0), ("joined", "ctc_text", 28.0)],
    ],
)
def test_words_of_the_heldout_clips_that_are_wrong(transcripts, clips, kind, decoding, most):
    # Given clips of new sentences with unseen names, some noisy: of forms that training never had, of those of its
    # grammar, or several joined
    spoken = [i for i, clip in enumerate(clips) if clip["kind"] == kind]
    # When transcribed, by the encoder alone or by the language model
    hypotheses = [getattr(transcripts[i], decoding) for i in spoken]
    # Then
    assert len(spoken) >= 30
    assert score([clips[i]["text"] for i in spoken], hypotheses).wer.rate <= most


SOUNDS = {
    "silence": lambda rng, size: np.zeros(size, np.float32),
    "hum": noise.hum,
    "tones": noise.tones,
    "noise": noise.pink,
    "clicks": noise.clicks,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOUNDS)
def test_nothing_is_written_where_nothing_is_said(asr, kind):
    # Given ten sounds of 1 to 20 seconds without speech, at different levels
    rng = np.random.default_rng(11)
    sounds = [SOUNDS[kind](rng, int(seconds * 16_000)) for seconds in np.linspace(1, 20, 10)]
    levels = 10 ** (np.linspace(-60, -14, 10) / 20)
    scaled = [
        np.float32(level) * wave / max(np.abs(wave).max(), 1e-9) for level, wave in zip(levels, sounds, strict=True)
    ]
    # When transcribed, then there is no text, and without guards hardly any
    assert [transcript.text for transcript in asr.transcribe(scaled)] == [""] * 10
    assert [transcript.text for transcript in asr.transcribe(scaled, guards=False)].count("") >= 9


@pytest.mark.slow
def test_texts_follow_the_audio(asr, clips):
    # Given pairs of clips with silence after the shorter, so that both have the same prompt
    single = [clip for clip in clips if clip["kind"] != "joined"][:264:6]
    audio = [soundfile.read(CLIPS / clip["audio"], dtype="float32")[0] for clip in single]
    pairs = list(zip(audio[::2], audio[1::2], strict=True))
    padded = [np.pad(wave, (0, max(map(len, pair)) - len(wave))) for pair in pairs for wave in pair]
    texts = [transcript.text for transcript in asr.transcribe(padded, segment_seconds=None)]
    # When each audio is transcribed with the other's text as its draft
    swapped = [text for a, b in zip(texts[::2], texts[1::2], strict=True) for text in (b, a)]
    again = [transcript.text for transcript in asr.transcribe(padded, draft=swapped, segment_seconds=None)]
    # Then each text is that of its own audio
    assert len(pairs) > 20 and again == texts
    references = [clip["text"] for clip in single]
    exchanged = [text for a, b in zip(references[::2], references[1::2], strict=True) for text in (b, a)]
    assert score(references, texts).wer.rate < 25 and score(exchanged, texts).wer.rate > 60


@pytest.mark.slow
def test_speculation_is_lossless_and_saves_passes(asr, clips, transcripts):
    # Given greedy decoding without drafts
    greedy = asr.transcribe([CLIPS / clip["audio"] for clip in clips], speculative=False)
    # When compared with the default, then tokens are the same, ties of the two best logits excepted
    speculation = runpy.run_path(str(ROOT / "benchmarks" / "speculation.py"))
    config, params = gj.load("demo", dtype="float32")
    assert config == asr.config
    for clip, ours, theirs in zip(clips, transcripts, greedy, strict=True):
        if ours.tokens != theirs.tokens:
            samples, _ = soundfile.read(CLIPS / clip["audio"], dtype="float32")
            place = speculation["first_difference"](ours.tokens, theirs.tokens)
            assert speculation["margin"](asr, params, samples, theirs.tokens[:place]) <= 1e-3, clip["audio"]
    # And the language model runs at most half as often as it writes
    assert 2 * sum(t.stats["llm_passes"] for t in transcripts) <= sum(len(t.tokens) for t in transcripts)


@pytest.mark.slow
def test_every_clip_ends_by_itself(transcripts):
    # Then no transcript ran into its limit of new tokens
    assert [t.audio for t in transcripts if t.stats["finish"] != "end"] == []


@pytest.mark.slow
def test_samples_are_heard(asr):
    # Given the samples of `make demo`, a 24 s one and a stereo one at 44.1 kHz among them
    samples = _manifest(ROOT / "samples" / "samples.jsonl")
    # When transcribed
    heard = [t.text for t in asr.transcribe([ROOT / "samples" / sample["audio"] for sample in samples])]
    # Then few words are wrong: a sentence of the long one
    said = [sample["text"] for sample in samples]
    assert max(len(text) for text in said) > 200
    assert score(said, heard).wer.rate <= 12.0


@pytest.mark.parametrize("options", [{"task": "punctuate"}, {"task": "translate", "target_language": "fr"}])
def test_what_it_was_not_trained_for_is_a_clear_error(asr, options):
    with pytest.raises(gj.PromptError, match="not trained for"):
        asr.transcribe(ROOT / "samples" / "request.wav", **options)


def test_it_is_small():
    # Given all files of the checkpoint
    files = [path for path in (ROOT / "checkpoints" / "demo").rglob("*") if path.is_file()]
    # Then parameters are fewer than 8 million and the files less than 20 MB
    tensors = json.loads((ROOT / "checkpoints" / "demo" / "tensors.json").read_text())
    assert tensors and sum(path.stat().st_size for path in files) < 20e6
