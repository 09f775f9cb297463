"""The host pipeline on a small random model: forms of input, order, independence, errors, compilations."""

import contextlib
import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_fixture
import jax
import numpy as np
import pytest
import soundfile
from plain_transcriber import PlainTranscriber
from retraces import retraces
from safetensors.numpy import load_file, save_file

from granite_jax import AudioError, CheckpointError, ContextError, GraniteError, PromptError, Transcriber
from granite_jax.evaluation import heldout
from granite_jax.models.layers.features import num_frames
from granite_jax.pretrained import open_checkpoint
from granite_jax.recognition.buckets import Bucket, default_buckets, longest_audio
from granite_jax.text.tasks import Capabilities, instruction
from granite_jax.transcriber import enable_compilation_cache

RATE = 16_000
POSITIONS = 384  # of the model: 38.4 seconds of audio
TINY: dict[str, Any] = {
    "encoder_config": {"num_layers": 2, "hidden_dim": 8, "dim_head": 4},
    "projector_config": {"encoder_hidden_size": 8, "num_hidden_layers": 1},
    "text_config": {"num_hidden_layers": 2, "max_position_embeddings": POSITIONS},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hf")
    hf_fixture.write_random_checkpoint(directory, **TINY)
    return directory


@pytest.fixture(scope="module")
def asr(checkpoint: Path) -> Transcriber:
    """Warmed up: with it, no test may compile anything. Of the default buckets it has the smallest and the largest."""
    first, *_, last = default_buckets(open_checkpoint(checkpoint).config, 4)
    asr = PlainTranscriber.from_pretrained(checkpoint, dtype="float32", batch_size=4, buckets=[first, last])
    asr.warmup()
    return asr


@pytest.fixture(autouse=True)
def nothing_more_is_compiled(asr: Transcriber):
    yield
    assert retraces(asr.recognizer().programs, len(asr.buckets)) == []
    assert asr.compilations == 3 * len(asr.buckets)


def speech(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise that rises and falls like syllables: float32 at 16 kHz."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    loudness = 0.2 * np.sin(2 * np.pi * (3 + seed % 3) * time + seed) ** 2
    return (loudness * rng.uniform(-1, 1, len(time))).astype(np.float32)


def wav(samples: np.ndarray, rate: int = RATE, format: str = "WAV") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype="PCM_16")
    return file.getvalue()


def like(asr: Transcriber, **options: Any) -> Transcriber:
    """Another Transcriber of the same model."""
    return PlainTranscriber(asr.config, asr.params, asr.tokenizer, template=asr.template, **options)


def test_every_form_of_input_gives_the_same(asr: Transcriber, tmp_path: Path) -> None:
    # Given one recording as a file, as bytes, as open files and as arrays
    pcm = np.round(speech(1.3) * 32767).astype(np.int16)
    path = tmp_path / "a.wav"
    path.write_bytes(wav(pcm))
    floats = pcm.astype(np.float32) / 32768
    with open(path, "rb") as file:
        forms = [
            path, str(path), path.read_bytes(), file, io.BytesIO(path.read_bytes()),
            pcm, floats, floats.astype(np.float64), floats[:, None], np.stack([floats, floats]), (pcm, RATE),
        ]  # fmt: skip

        # When all are transcribed
        transcripts = asr.transcribe(forms, max_new_tokens=8)

    # Then the results are equal, and named by file or by place
    assert len(transcripts) == len(forms)
    assert {(t.tokens, t.text, t.ctc_text, t.duration) for t in transcripts} == {
        (transcripts[0].tokens, transcripts[0].text, transcripts[0].ctc_text, len(pcm) / RATE)
    }
    names = [transcript.audio for transcript in transcripts]
    assert names[:2] == [str(path)] * 2
    assert names[3] == str(path)
    assert names[4:] == [f"audio[{i}]" for i in range(4, len(forms))]
    # And so is one input that is not in a list
    assert asr.transcribe(path, max_new_tokens=8) == transcripts[0]


def test_a_tuple_of_files_is_a_list(asr: Transcriber, tmp_path: Path) -> None:
    paths = (str(tmp_path / "a.wav"), tmp_path / "b.wav")
    for path in paths:
        Path(path).write_bytes(wav(speech(1)))
    transcripts = asr.transcribe(paths)
    assert [transcript.audio for transcript in transcripts] == [str(path) for path in paths]


def test_the_sampling_rate_is_that_of_arrays_alone(asr: Transcriber, tmp_path: Path) -> None:
    # Given a file at 8 kHz, the same array, and an array that comes with its own rate
    samples = speech(1.0)[::2]
    soundfile.write(tmp_path / "a.wav", samples, 8000, subtype="FLOAT")

    # When they are transcribed with sampling_rate, then it applies to the array, and files keep their own
    array, file = asr.transcribe([samples, tmp_path / "a.wav"], sampling_rate=8000, max_new_tokens=4)
    assert array.duration == file.duration == 1.0
    assert array.tokens == file.tokens
    (file,) = asr.transcribe([tmp_path / "a.wav"], sampling_rate=44100, max_new_tokens=4)
    assert file.tokens == array.tokens
    # And a pair whose own rate is another is an error
    with pytest.raises(AudioError, match=r"audio\[0\]: comes with a rate of 16000 Hz"):
        asr.transcribe([(samples, RATE)], sampling_rate=8000)


def test_results_come_in_input_order(asr: Transcriber) -> None:
    # Given inputs whose batches finish in another order, when they are transcribed
    seconds = [9.0, 0.5, 30.0, 3.0, 0.4, 18.0, 2.0, 4.0, 0.3, 7.0]
    transcripts = asr.transcribe([speech(s) for s in seconds], max_new_tokens=2)

    # Then each result is in its input's place
    assert [transcript.audio for transcript in transcripts] == [f"audio[{i}]" for i in range(len(seconds))]
    assert [transcript.duration for transcript in transcripts] == seconds
    assert asr.transcribe([]) == []


def test_a_result_depends_on_its_own_audio_alone(asr: Transcriber) -> None:
    # Given inputs transcribed one by one
    inputs = [speech(s, seed) for seed, s in enumerate([0.02, 0.3, 0.8, 1.7, 1.7, 3.2, 4.9, 6.0, 9.7])]
    alone = [asr.transcribe([x], max_new_tokens=12)[0] for x in inputs]
    assert len({t.tokens for t in alone}) > len(inputs) // 2, "the inputs must matter, or nothing is shown"

    def same(found: list, expected: list) -> bool:
        return [(t.tokens, t.ctc_text, t.stats) for t in found] == [(t.tokens, t.ctc_text, t.stats) for t in expected]

    # When they are transcribed together, in another order, and in other batches and buckets, then nothing changes
    assert same(asr.transcribe(inputs, max_new_tokens=12), alone)
    assert same(asr.transcribe(inputs[::-1], max_new_tokens=12), alone[::-1])
    other = like(asr, batch_size=7, buckets=[Bucket(7, 33 * 4800, 180, 250)])
    assert same(other.transcribe(inputs, max_new_tokens=12), alone)


def bomb() -> bytes:
    """A few kilobytes of FLAC that decode to ten minutes of silence."""
    file = io.BytesIO()
    soundfile.write(file, np.zeros(600 * 8000, np.int16), 8000, format="FLAC")
    return file.getvalue()


BAD: dict[str, tuple[Callable[[], Any], type[GraniteError], str]] = {
    "rubbish": (lambda: b"no audio at all", AudioError, r"audio\[1\]: is not audio that can be read"),
    "empty": (lambda: b"", AudioError, r"audio\[1\]: is empty"),
    "header": (lambda: wav(np.zeros(0)), AudioError, r"audio\[1\]: holds no samples"),
    "short": (lambda: np.zeros(256), AudioError, r"audio\[1\]: too short: 256 samples"),
    "nan": (lambda: np.array([np.nan] * 999), AudioError, r"audio\[1\]: holds NaN or infinite samples"),
    "pcm": (lambda: speech(1) * 32768, AudioError, r"audio\[1\]: float samples should be within"),
    "missing": (lambda: "/no/such.wav", AudioError, "/no/such.wav: no such file"),
    "newline": (lambda: "/no/\n.wav", AudioError, r"'/no/\\n\.wav': no such file"),
    "directory": (lambda: Path("/"), AudioError, "/: is a directory"),
    "none": (lambda: None, AudioError, r"audio\[1\]: unsupported NoneType"),
    "text": (lambda: io.StringIO("text"), AudioError, r"audio\[1\]: the file must be opened in binary mode"),
    "bomb": (
        bomb,
        ContextError,
        r"audio\[1\]: is longer than 38.4 seconds, more than the model's context of 384 positions",
    ),
    "long": (
        lambda: speech(39),
        ContextError,
        r"audio\[1\]: is longer than 38.4 seconds, more than the model's context",
    ),
    "full": (
        lambda: speech(38.3),
        ContextError,
        r"audio\[1\]: 38\.3 s of audio with its prompt take \d+ positions, which with 4 new tokens exceeds the model'",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_input_is_named_and_loses_nothing_else(
    asr: Transcriber, make: Callable[[], Any], kind: type[GraniteError], message: str
) -> None:
    # Given a bad input between good ones, when it is to raise, then the error says which input it is and why
    good = [speech(0.9, 1), speech(1.1, 2)]
    with pytest.raises(kind, match=f"^{message}") as raised:
        asr.transcribe([good[0], make(), good[1]], max_new_tokens=4)
    assert len(str(raised.value).splitlines()) == 1

    # When it is to be returned, then it takes its place, and the others are as without it
    seen: list[int] = []
    first, bad, last = asr.transcribe(
        [good[0], make(), good[1]], max_new_tokens=4, on_error="return", progress=seen.append
    )
    assert bad.error == str(raised.value)
    assert (bad.text, bad.tokens) == ("", ())
    assert [first.tokens, last.tokens] == [t.tokens for t in asr.transcribe(good, max_new_tokens=4)]
    assert first.error is last.error is None
    assert sum(seen) == 3


def test_what_reading_noticed_is_flagged(asr: Transcriber) -> None:
    # Given a file without its end, one with channels of opposite phase, and a whole one
    samples = speech(2)
    cut, opposed = wav(samples)[:30_000], wav(np.stack([samples, -samples], 1))
    # When they are transcribed, then the flags say so, and the model's text is that of the samples that were taken
    flags = [set(transcript.flags) - {"low-agreement"} for transcript in asr.transcribe([cut, opposed, samples])]
    assert flags == [{"truncated-input"}, {"one-channel"}, set()]
    assert asr.transcribe(opposed).tokens == asr.transcribe(wav(samples)).tokens


def test_errors_and_limits_agree(asr: Transcriber) -> None:
    # Given the longest audio that fits with the default number of new tokens, and that which fits with one
    prompt = asr.template.tokens(asr.tokenizer, instruction())
    length = len(prompt.prefix) + len(prompt.suffix)
    for new_tokens in (None, 1):
        longest = longest_audio(asr.config, length, new_tokens)
        # When a little more is given, then the error names both, and only the longer one is refused
        fits = r"at most \d+ s fit the model, \d+ s with max_new_tokens=1"
        with pytest.raises(ContextError, match=f'{fits}; segment_seconds="auto", the default') as caught:
            asr.transcribe(speech(longest + 0.02), max_new_tokens=new_tokens)
        assert f"at most {longest:.0f} s fit the model" in str(caught.value)
        asr.transcribe(speech(longest), max_new_tokens=new_tokens)


def test_buckets_of_the_callers_own_are_a_limit_too(asr: Transcriber) -> None:
    # Given buckets for five seconds only, when audio is longer, then the error does not blame the model
    small = like(asr, batch_size=1, buckets=[Bucket(1, 5 * RATE, 120, 160)])
    with pytest.raises(ContextError, match=r"6\.0 s of audio .* exceeds every bucket of this Transcriber"):
        small.transcribe(speech(6), max_new_tokens=4)


@pytest.mark.parametrize("samples", [np.zeros(2 * RATE), np.full(RATE, 0.5), np.zeros(257), np.eye(1, RATE)[0]])
def test_silence_is_audio_too(asr: Transcriber, samples: np.ndarray) -> None:
    # Given silence, a constant or a click, when it is transcribed, then a result comes, each time the same
    transcripts = asr.transcribe([samples, samples], max_new_tokens=5)
    assert transcripts[0].error is None
    assert transcripts[0].tokens == transcripts[1].tokens
    assert 0 < len(transcripts[0].tokens) <= 5


def test_max_new_tokens_is_respected(asr: Transcriber) -> None:
    # Given an input, when its tokens are limited, then it has a prefix of what it has with a higher limit
    full = asr.transcribe(speech(2.5), max_new_tokens=30)
    assert full.stats["finish"] == "length"
    for limit in (1, 7, 30):
        transcript = asr.transcribe(speech(2.5), max_new_tokens=limit, speculative=False)
        assert transcript.tokens == full.tokens[:limit]
        counts = {"llm_passes": limit, "draft_tokens": 0, "accepted_tokens": 0}
        assert transcript.stats == {"route": "greedy", **counts, "draft_from": None, "finish": "length"}


def boosted(checkpoint: Path, directory: Path, tokens: list[str]) -> tuple[Path, list[int]]:
    """A copy in which every position's best logit is that of one of two tokens, by far."""
    config = hf_fixture.write_random_checkpoint(directory, **TINY)
    ids = [hf_fixture.make_tokenizer().token_to_id(token) for token in tokens]
    tensors = load_file(checkpoint / "model.safetensors")
    row = np.random.default_rng(0).standard_normal(config["text_config"]["hidden_size"]).astype(np.float32)
    head = tensors["language_model.lm_head.weight"]
    head[ids[0]], head[ids[1]] = 1e4 * row, -1e4 * row
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory, ids


def test_audio_and_padding_are_never_produced(checkpoint: Path, tmp_path: Path) -> None:
    # Given a model that likes the audio token or the padding best, whatever the input
    directory, ids = boosted(checkpoint, tmp_path, ["<|audio|>", "<|pad|>"])
    bucket = [Bucket(1, 3 * RATE // 4800 * 4800, 100, 140)]
    asr = PlainTranscriber.from_pretrained(directory, dtype="float32", batch_size=1, buckets=bucket)

    # When speech is transcribed, then neither is produced
    tokens = asr.transcribe(speech(2.0), max_new_tokens=20).tokens
    assert len(tokens) > 0
    assert not set(tokens) & set(ids)


def test_end_of_text_ends_a_text_and_is_not_part_of_it(checkpoint: Path, tmp_path: Path) -> None:
    # Given a model that likes to end, or else one letter
    directory, (end, letter) = boosted(checkpoint, tmp_path, ["<|end_of_text|>", "a"])
    bucket = [Bucket(1, 3 * RATE // 4800 * 4800, 100, 140)]
    asr = PlainTranscriber.from_pretrained(directory, dtype="float32", batch_size=1, buckets=bucket)

    # When speech is transcribed, then it ends before its limit, and passes count the one that chose to end
    transcripts = asr.transcribe([speech(1.5, seed) for seed in range(5)], max_new_tokens=40)
    ended = [transcript for transcript in transcripts if transcript.stats["finish"] == "end"]
    assert ended
    for transcript in ended:
        assert set(transcript.tokens) <= {letter}
        assert end not in transcript.tokens
        assert transcript.text == "a" * len(transcript.tokens)
        assert transcript.stats["llm_passes"] == len(transcript.tokens) + 1


def test_two_hundred_lengths_compile_nothing_new(asr: Transcriber) -> None:
    # Given a warm model, when inputs of 200 lengths come with all sorts of options
    assert 3 * len(default_buckets(asr.config, asr.batch_size)) <= 15
    rng = np.random.default_rng(0)
    seconds = np.exp(rng.uniform(np.log(0.02), np.log(30), 200))
    inputs = [speech(s, seed) for seed, s in enumerate(seconds)]
    options: list[dict[str, Any]] = [
        {"max_new_tokens": 1},
        {"max_new_tokens": 3, "task": "punctuate"},
        {"max_new_tokens": 20, "task": "translate", "target_language": "fr"},
        {"max_new_tokens": 2, "prompt": "what language is this?", "allow_custom_prompt": True},
    ]
    transcripts = [
        t for i in range(4) for t in asr.transcribe(inputs[50 * i : 50 * i + 50], on_error="return", **options[i])
    ]
    transcripts += asr.transcribe(inputs[:3])

    # Then all are transcribed without a further compilation: checked after every test of this module
    assert [t.error for t in transcripts] == [None] * 203


def test_a_long_prompt_takes_a_larger_bucket(asr: Transcriber) -> None:
    # Given a prompt far longer than buckets for short audio have room for, when short audio comes with it
    prompt = "write down " + "every word of it, " * 20
    fields: dict[str, Any] = {"prompt": prompt, "allow_custom_prompt": True, "max_new_tokens": 6}
    (transcript,) = asr.transcribe([speech(1)], **fields)

    # Then it is transcribed as with a bucket made for it
    tokens = asr.template.tokens(asr.tokenizer, prompt)
    length = len(tokens.prefix) + len(tokens.suffix) + asr.config.num_audio_tokens(num_frames(RATE))
    assert length > asr.buckets[0].prompt
    fitting = like(asr, batch_size=1, buckets=[Bucket(1, 4 * 4800, length, length + 6)])
    assert fitting.transcribe([speech(1)], **fields)[0].tokens == transcript.tokens


def test_the_default_task_is_its_documented_prompt(asr: Transcriber) -> None:
    # Given the raw-transcript prompt, when it is passed as a prompt of one's own, then the result is the task's
    def run(**options: Any) -> tuple[int, ...]:
        return asr.transcribe(speech(1.4, 5), max_new_tokens=9, speculative=False, **options).tokens

    own = run(prompt="can you transcribe the speech into a written format?")
    assert own == run() == run(task="transcribe")
    assert own != run(task="punctuate")


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"task": "summarise"}, PromptError, "unknown task 'summarise', supported: transcribe, punctuate, translate"),
        ({"task": "translate"}, PromptError, "task 'translate' needs target_language"),
        ({"task": "translate", "target_language": "tlh"}, PromptError, "unknown language 'tlh'"),
        ({"target_language": "fr"}, PromptError, "target_language 'fr' is for task 'translate' only"),
        ({"prompt": "", "allow_custom_prompt": True}, PromptError, "prompt is empty"),
        ({"prompt": "a\nb", "allow_custom_prompt": True}, PromptError, "control character"),
        ({"max_new_tokens": 0}, GraniteError, "max_new_tokens is 0"),
        ({"on_error": "ignore"}, GraniteError, "on_error"),
    ],
)
def test_options_are_checked_before_any_audio(
    asr: Transcriber, options: dict[str, Any], kind: type[GraniteError], message: str
) -> None:
    # Given an option that makes no sense, when transcribe is called, then it says so, whatever on_error is
    with pytest.raises(kind, match=message):
        asr.transcribe(["/no/such.wav"], **({"on_error": "return"} | options))


def test_a_checkpoint_that_was_trained_for_less_says_so(asr: Transcriber) -> None:
    # Given a model trained to transcribe only, when more is asked of it, then the error says what it can do
    less = like(asr, capabilities=Capabilities(tasks=("transcribe",), languages=()))
    with pytest.raises(PromptError, match="not trained for task 'punctuate', only for transcribe"):
        less.transcribe([speech(1)], task="punctuate")
    with pytest.raises(PromptError, match="not trained for task 'translate', only for transcribe"):
        less.transcribe([speech(1)], task="translate", target_language="fr")


def test_compiled_programs_are_kept_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given no cache configured, or one
    configured = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        # When the cache is enabled, then it is in the user's cache directory, unless jax already has one
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == configured is not None
        jax.config.update("jax_compilation_cache_dir", None)
        enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "granite_jax" / "xla")
    finally:
        jax.config.update("jax_compilation_cache_dir", configured)


@pytest.mark.parametrize("place", ["a file", "read-only", "no home"])
def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    # Given a cache directory that cannot be made
    configured = jax.config.jax_compilation_cache_dir
    if place == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.delenv("HOME")
        monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    else:
        root = tmp_path / "file"
        root.write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(root if place == "a file" else "/proc/sys"))
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        # When the compilation cache is enabled, then there is none, and a warning where it should have been
        expected = pytest.warns(UserWarning, match="compiled programs cannot be kept .*XDG_CACHE_HOME sets another")
        with contextlib.nullcontext() if place == "no home" else expected:
            enable_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", configured)
    # And what needs a cache has one line about it
    with pytest.raises(GraniteError, match="XDG_CACHE_HOME sets another"):
        heldout.prepare()


def test_transcripts_are_plain_data(asr: Transcriber) -> None:
    # Given a transcript, when it is taken apart, then it has the documented fields, in types JSON knows
    (transcript,) = asr.transcribe([speech(1.0)], max_new_tokens=3)
    fields = dataclasses.asdict(transcript)
    documented = (
        "audio text tokens duration confidence ctc_text stats draft accepted_spans flags error segments channel damage"
    )
    assert list(fields) == documented.split()
    assert type(transcript.confidence) is float and 0 < transcript.confidence <= 1
    assert {type(token) for token in transcript.tokens} == {int}
    assert type(transcript.duration) is float
    (segment,) = fields["segments"]
    documented = "start end text tokens confidence words speaker route flags channel"
    assert list(segment) == documented.split()
    assert type(segment["start"]) is float and type(segment["end"]) is float


@pytest.mark.parametrize("speculative", ["lossless", False, "relaxed"])
@pytest.mark.parametrize("part", ["encoder", "projector", "decoder"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights_are_no_silence(
    asr: Transcriber, monkeypatch: pytest.MonkeyPatch, part: str, speculative: Any, value: float
) -> None:
    # Given weights some of which, in one part of the model, are no numbers
    params = asr.params
    damaged = jax.tree.map(np.array, params[part])
    for leaf in jax.tree.leaves(damaged):
        leaf.flat[0] = value
    damaged = jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), damaged, params[part])
    monkeypatch.setattr(asr.recognizer(), "params", {**params, part: damaged})
    # When two inputs are transcribed, then both have an error, and no empty text
    options = {"speculative": speculative, "max_new_tokens": 4}
    found = asr.transcribe([speech(1.0), speech(2.0)], on_error="return", **options)
    assert all("the model computes no numbers for it (NaN)" in str(transcript.error) for transcript in found)
    with pytest.raises(CheckpointError, match=r"audio\[0\]: the model computes no numbers"):
        asr.transcribe([speech(1.0)], **options)
