"""The embedded checkpoint on real audio: the committed held-out clips and the samples."""

import json
import runpy
from pathlib import Path

import pytest
import soundfile

import granite_jax as gj
from granite_jax.evaluation.heldout import CLIPS
from granite_jax.evaluation.metrics import score
from granite_jax.inference.buckets import make_bucket
from granite_jax.pretrained import open_checkpoint

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


def test_a_sample_is_heard():
    # Given one row of ten seconds as the only bucket, when a sample is transcribed, then its text is what is said
    buckets = [make_bucket(open_checkpoint("demo").config, 1, 10.0)]
    asr = gj.Transcriber.from_pretrained("demo", dtype="float32", batch_size=1, buckets=buckets)
    said = {sample["audio"]: sample["text"] for sample in _manifest(ROOT / "samples" / "samples.jsonl")}
    assert asr.transcribe(ROOT / "samples" / "request.wav").text == said["request.wav"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ctc_text", "text"])
def test_few_words_of_the_heldout_clips_are_wrong(transcripts, clips, kind):
    # Given 300 clips of new sentences with unseen names, some noisy
    references = [clip["text"] for clip in clips]
    # When transcribed, by the encoder alone or by the language model
    hypotheses = [getattr(transcript, kind) for transcript in transcripts]
    # Then
    assert len(clips) >= 300
    assert score(references, hypotheses).wer.rate <= 5.0


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
    # And the language model runs at most a fifth as often as it writes
    assert 5 * sum(t.stats["llm_passes"] for t in transcripts) <= sum(len(t.tokens) for t in transcripts)


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
    assert score(said, heard).wer.rate <= 10.0


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
