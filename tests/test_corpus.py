"""Texts, noise, rendering and the reader of synthetic speech. None of this needs a synthesizer or Debian's texts."""

import dataclasses
import itertools
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from granite_jax.training.corpus import Corpus, Utterance
from granite_jax.training.recipes.demo import clips, grammar, noise, sets, synthesis, texts

TEXT = re.compile(r"[a-z']+( [a-z']+)*")


def spoken(index: int) -> Utterance:
    samples = np.arange(100 * (index + 1), dtype=np.int16) - 50
    said = f"call zelgad {index}", ("zelgad",)
    return Utterance(f"u{index}", *said, "grammar", "en-us", 150, 12.5 if index else None, samples)


def test_sentences_are_raw_transcripts_of_the_promised_length_and_share_of_names() -> None:
    # Given / When
    made = list(grammar.sentences(seed=3, count=1500, split="train"))
    # Then
    assert all(TEXT.fullmatch(s.text) for s in made)
    assert all(4 <= len(s.text.split()) <= 16 for s in made)
    assert all(set(s.names) <= set(s.text.split()) and len(s.names) <= 2 for s in made)
    assert 0.55 < np.mean([bool(s.names) for s in made]) < 0.65
    assert len({s.text for s in made}) > 0.95 * len(made)


def test_every_template_fills_into_a_raw_transcript() -> None:
    # Given
    rng = np.random.default_rng(0)
    # When
    texts = [grammar._fill(t, rng, "train").text for named in (True, False) for t in grammar._TEMPLATES[named]]
    # Then
    assert len(set(texts)) > 100
    assert [t for t in texts if not TEXT.fullmatch(t)] == []


def test_train_and_heldout_share_neither_sentences_nor_names() -> None:
    # Given the same seed for both parts
    train = list(grammar.sentences(seed=5, count=1500, split="train"))
    heldout = list(grammar.sentences(seed=5, count=200, split="heldout"))
    # Then
    assert not {s.text for s in train} & {s.text for s in heldout}
    assert not {n for s in train for n in s.names} & {n for s in heldout for n in s.names}
    assert {grammar.name_split(n) for s in heldout for n in s.names} == {"heldout"}


def test_the_split_of_a_name_is_the_same_in_every_process() -> None:
    # Given names whose part a released checkpoint already depends on
    names = ("dakfiki", "piznosh", "trumziza", "zorvik", "lunpad", "timbado")
    # When
    heldout = [n for n in names if grammar.name_split(n) == "heldout"]
    # Then
    assert heldout == ["dakfiki", "piznosh", "trumziza", "timbado"]


def test_names_are_many_and_spelled_with_unambiguous_letters() -> None:
    # Given
    rng = np.random.default_rng(1)
    # When
    names = [grammar.invent_name(rng, "train") for _ in range(3000)]
    # Then
    assert len(set(names)) > 2800
    assert all(re.fullmatch(r"[a-z]{6,9}", n) and not re.search(r"[cqxwy]|(.)\1|[aeiou]{2}", n) for n in names)


def test_a_sentence_depends_on_its_seed_and_place_alone() -> None:
    # Given a short and a longer run
    short, longer = list(grammar.sentences(9, 5, "train")), list(grammar.sentences(9, 20, "train"))
    # Then
    assert longer[:5] == short
    assert list(grammar.sentences(10, 5, "train")) != short


@pytest.mark.parametrize("snr_db", [-5.0, 0.0, 20.0])
def test_mixing_reaches_the_ratio_asked_for(snr_db: float) -> None:
    # Given
    rng = np.random.default_rng(0)
    speech = np.sin(np.arange(16_000, dtype=np.float32) / 9)
    background = noise.pink(rng, speech.size) * np.float32(0.3)
    # When
    mixed = noise.mix_at_snr(speech, background, snr_db)
    # Then
    ratio = np.mean(speech**2) / np.mean((mixed - speech) ** 2)
    assert 10 * np.log10(ratio) == pytest.approx(snr_db, abs=0.01)


def test_pink_noise_has_equal_power_in_each_octave() -> None:
    # Given
    power = np.abs(np.fft.rfft(noise.pink(np.random.default_rng(0), 1 << 16))) ** 2
    # When
    octaves = [power[1 << k : 1 << (k + 1)].sum() for k in range(8, 15)]
    # Then
    assert max(octaves) / min(octaves) < 1.4


def test_the_reader_returns_what_was_written(tmp_path: Path) -> None:
    # Given
    items = [spoken(i) for i in range(3)]
    # When
    synthesis.write_corpus(iter(items), tmp_path)
    read = Corpus.open(tmp_path)
    # Then
    assert len(read) == 3 and read.lengths.tolist() == [100, 200, 300]
    for item, back in zip(items, read, strict=True):
        assert np.array_equal(item.samples, back.samples) and back.samples.dtype == np.int16
        assert (item.id, item.text, item.names, item.snr_db) == (back.id, back.text, back.names, back.snr_db)


def test_an_interrupted_run_leaves_no_corpus_behind(tmp_path: Path) -> None:
    # Given a source that fails half-way
    def failing() -> Iterator[Utterance]:
        yield spoken(0)
        raise RuntimeError("stopped")

    # When
    with pytest.raises(RuntimeError, match="stopped"):
        synthesis.write_corpus(failing(), tmp_path)
    # Then
    assert not (tmp_path / "audio.i16").exists() and not (tmp_path / "index.jsonl").exists()


def test_audio_shorter_than_its_index_is_named(tmp_path: Path) -> None:
    # Given
    synthesis.write_corpus(iter([spoken(0)]), tmp_path)
    entry = json.loads((tmp_path / "index.jsonl").read_text()) | {"samples": 101}
    (tmp_path / "index.jsonl").write_text(json.dumps(entry) + "\n")
    # When / Then
    with pytest.raises(ValueError, match=r"audio\.i16.*101 samples.*100"):
        Corpus.open(tmp_path)


def test_rendering_is_deterministic_bounded_and_never_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a synthesizer that always speaks for six seconds, and eight sentences
    tone = np.sin(np.arange(6 * synthesis.SAMPLING_RATE, dtype=np.float32) / 7)
    monkeypatch.setattr(synthesis, "speak", lambda *_: tone)
    draw = lambda rng, index: [grammar.compose(rng, "train") for _ in range(8)]  # noqa: E731
    # When rendered, with whatever room, noise, band and level is drawn
    for index in range(6):
        first, again = (synthesis.utterance(4, index, "train", draw, [tone], noisy=True) for _ in range(2))
        # Then
        assert np.array_equal(first.samples, again.samples) and first.text == again.text
        assert 15 * synthesis.SAMPLING_RATE < first.samples.size <= synthesis.MAX_SECONDS * synthesis.SAMPLING_RATE
        assert np.abs(first.samples.astype(int)).max() < 32_767
        assert TEXT.fullmatch(first.text) and set(first.names) <= set(first.text.split())


def test_a_warped_voice_keeps_its_pace_and_shifts_its_frequencies(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a synthesizer that hums at 1 kHz, for as long as its speed says
    def hum(text: str, voice: str, speed: int, pitch: int) -> noise.Samples:
        return np.sin(
            2 * np.pi * 1000 * np.arange(int(synthesis.SAMPLING_RATE * 150 / speed)) / synthesis.SAMPLING_RATE
        ).astype("f4")

    monkeypatch.setattr(synthesis, "speak", hum)
    rng = np.random.default_rng(0)
    recipe = synthesis.draw_recipe(rng, [grammar.compose(rng, "train")], "train")
    recipe = dataclasses.replace(recipe, speed=150, warp=1.1)
    # When
    spoken = synthesis._voiced("text", recipe)
    # Then it hums at 1.1 kHz for the same second
    peak = np.abs(np.fft.rfft(spoken)).argmax() * synthesis.SAMPLING_RATE / spoken.size
    assert peak == pytest.approx(1100, rel=0.01) and spoken.size == pytest.approx(synthesis.SAMPLING_RATE, rel=0.01)


@pytest.mark.parametrize("kind", synthesis.SILENT_SOUNDS)
def test_what_says_nothing_has_no_text_and_the_level_asked_for(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    # Given one sound to choose from
    monkeypatch.setattr(synthesis, "SILENT_SOUNDS", (kind,))
    draw = lambda rng, index: [grammar.Sentence("", (), "silence")]  # noqa: E731
    clip = np.sin(np.arange(3 * synthesis.SAMPLING_RATE, dtype=np.float32) / 7)
    # When
    items = [synthesis.utterance(3, i, "train", draw, [clip]) for i in range(8)]
    # Then
    seconds = [item.samples.size / synthesis.SAMPLING_RATE for item in items]
    peaks = [np.abs(item.samples.astype(int)).max() for item in items]
    assert {(item.text, item.kind) for item in items} == {("", "silence")}
    assert min(seconds) > 0.5 and max(seconds) < 22.1
    assert max(peaks) <= 32_767 * 10 ** ((-42 if kind == "babble" else -6) / 20)
    assert any(peaks) == (kind != "nothing")


def test_a_telephone_keeps_the_middle_of_the_band_alone() -> None:
    # Given tones below, in and above the band
    tone = {f: np.sin(2 * np.pi * f * np.arange(16_000) / 16_000).astype(np.float32) for f in (80, 1000, 6000)}
    # When
    power = {f: float(np.mean(noise.telephone(wave) ** 2)) for f, wave in tone.items()}
    # Then
    assert power[1000] == pytest.approx(0.5, rel=0.05)
    assert power[80] < 1e-4 and power[6000] < 1e-4


def test_a_missing_synthesizer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "flite" else program)
    # When / Then
    with pytest.raises(RuntimeError, match="flite not found: install"):
        synthesis.require_synthesizers()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's two packages and the frequent words, with texts of this test's."""
    kept = [f"The {color} {animal} saw {count} of my friends." for color in ("red", "blue", "green", "pale", "dark")
            for animal in ("bird", "goat", "fox", "crow") for count in ("two", "three", "four", "all")]  # fmt: skip
    left_out = ["IBM saw my friends.", "Route 66 is long.", "Zzyzx saw my friends.", "Too short.", "The b saw my goat."]
    (tmp_path / "fortunes").mkdir()
    quoted = "I saw them, twice!\n\t\t-- Somebody Whose Name Is Left Out"
    (tmp_path / "fortunes" / "some").write_text("\n%\n".join([*kept, *left_out, quoted]) + "\n%\n")
    (tmp_path / "fortunes" / "some.dat").write_bytes(bytes(range(256)))
    listed = {word.strip(".").lower() for text in kept for word in text.split()}
    others = ["i", "them", "twice", "is", "long", "b", "Boston", "lantern's"]
    (tmp_path / "words").write_text("\n".join([*sorted(listed), *others]) + "\n")
    monkeypatch.setattr(texts, "FORTUNES", tmp_path / "fortunes")
    monkeypatch.setattr(texts, "WORD_LIST", tmp_path / "words")
    frequent = ["saw", "i", "goat", "qwertz", "friends", "twice"]
    frequency = lambda word, _: 1 / (1 + frequent.index(word))  # noqa: E731
    module = SimpleNamespace(top_n_list=lambda *_: frequent, word_frequency=frequency)
    monkeypatch.setitem(sys.modules, "wordfreq", module)


def test_sentences_of_fortunes_are_raw_transcripts_divided_between_the_splits(packages: None) -> None:
    # When
    train, heldout = texts.TextSource.open("train"), texts.TextSource.open("heldout")
    # Then all that can be said as it is written is there once, without attributions
    every = [*train.sentences, *heldout.sentences]
    assert len(every) == len(set(every)) == 81 and "i saw them twice" in every
    assert all(TEXT.fullmatch(text) for text in every)
    assert 0 < len(heldout.sentences) < len(train.sentences)
    assert train.words == heldout.words == ("saw", "goat", "friends", "twice")


@pytest.mark.parametrize("kind", texts.SHARES)
def test_every_kind_of_text_is_a_raw_transcript_with_its_names(packages: None, kind: str) -> None:
    # Given
    source, rng = texts.TextSource.open("train"), np.random.default_rng(0)
    # When
    drawn = [source.draw(rng, kind) for _ in range(100)]
    # Then
    assert {sentence.kind for sentence in drawn} == {kind}
    assert all(TEXT.fullmatch(s.text) or (kind == "silence" and not s.text) for s in drawn)
    assert all(set(s.names) <= set(s.text.split()) for s in drawn)
    assert len({s.text for s in drawn}) > (80 if kind not in ("sentence", "silence") else 0)


def test_texts_have_the_shares_that_are_promised(packages: None) -> None:
    # Given / When
    source, rng = texts.TextSource.open("train"), np.random.default_rng(0)
    kinds = [source.draw(rng).kind for _ in range(2000)]
    # Then
    assert sum(texts.SHARES.values()) == pytest.approx(1) and texts.SHARES["grammar"] <= 0.2
    assert all(kinds.count(kind) / 2000 == pytest.approx(share, abs=0.04) for kind, share in texts.SHARES.items())


def test_missing_texts_name_their_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Given
    monkeypatch.setattr(texts, "FORTUNES", tmp_path / "absent")
    # When / Then
    with pytest.raises(FileNotFoundError, match="absent: install Debian's 'fortunes'"):
        texts.TextSource.open("train")


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "zero"), (17, "seventeen"), (40, "forty"), (305, "three hundred five"), (12_000, "twelve thousand"),
     (99_999, "ninety nine thousand nine hundred ninety nine")],
)  # fmt: skip
def test_numbers_in_words(number: int, said: str) -> None:
    assert texts.in_words(number) == said


def test_free_sentences_are_raw_transcripts_and_divided_between_tuning_and_test() -> None:
    # When filled in
    rng = np.random.default_rng(0)
    filled = [sets.free_sentence(rng, line) for line in sets.FREE]
    # Then
    assert all(TEXT.fullmatch(sentence.text) for sentence in filled)
    assert {grammar.name_split(name) for sentence in filled for name in sentence.names} == {"heldout"}
    assert not set(sets.TUNE_LINES) & set(sets.TEST_LINES)
    assert len(set(sets.TEST_LINES)) == 300 and len(set(sets.TUNE_LINES)) == 100


def test_recordings_of_people_are_read_with_what_is_said(tmp_path: Path) -> None:
    # Given a directory as Debian's
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards" / "cards.transcription").write_text("<s> ten of clubs  </s> (001)\n")
    soundfile.write(tmp_path / "cards" / "001.wav", np.zeros(160, np.int16), 16_000)
    np.arange(100, dtype="<i2").tofile(tmp_path / "numbers.raw")
    # When
    found = list(sets.people(tmp_path))
    # Then
    assert [(item.group, item.text, len(item.samples)) for item in found] == [
        ("people (cards)", "ten of clubs", 160),
        ("people (commands)", None, 100),
    ]
    assert list(sets.people(tmp_path / "absent")) == []


def test_committed_audio_is_written_with_what_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Given a synthesizer that always speaks for a second, and few clips of a kind
    tone = np.sin(np.arange(synthesis.SAMPLING_RATE, dtype=np.float32) / 7)
    monkeypatch.setattr(synthesis, "speak", lambda *_: tone)
    for kind in ("FREE", "GRAMMAR", "JOINED"):
        monkeypatch.setattr(clips, f"{kind}_CLIPS", 2)
    monkeypatch.setitem(sets.SETS, "test", lambda: itertools.islice(sets._test(), 302))
    # When clips and samples are written
    clips.heldout(tmp_path / "clips")
    clips.samples(tmp_path / "samples")
    # Then each file is there, in its rate, and its line says what is said
    lines = [json.loads(line) for line in (tmp_path / "clips" / "heldout.jsonl").read_text().splitlines()]
    assert [line["audio"] for line in lines] == [
        f"{k}-{i:03d}.ogg" for k in ("free", "grammar", "joined") for i in (0, 1)
    ]
    assert all(TEXT.fullmatch(line["text"]) and set(line["names"]) <= set(line["text"].split()) for line in lines)
    assert all(soundfile.info(tmp_path / "clips" / line["audio"]).duration >= 1 for line in lines)
    stereo = soundfile.info(tmp_path / "samples" / "stereo-44k.wav")
    assert (stereo.samplerate, stereo.channels) == (44_100, 2)
    said = [json.loads(line)["text"] for line in (tmp_path / "samples" / "samples.jsonl").read_text().splitlines()]
    assert said == [" ".join(sample.sentences) for sample in clips.SAMPLES]
