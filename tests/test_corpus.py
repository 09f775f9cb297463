"""The text grammar, the noise mixture and the reader of synthetic speech. None of this needs espeak-ng."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from granite_jax.training.corpus import Corpus, Utterance
from granite_jax.training.recipes.demo import grammar, noise, synthesis

TEXT = re.compile(r"[a-z']+( [a-z']+)*")


def spoken(index: int) -> Utterance:
    samples = np.arange(100 * (index + 1), dtype=np.int16) - 50
    return Utterance(f"u{index}", f"call zelgad {index}", ("zelgad",), "en-us", 150, 12.5 if index else None, samples)


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
    # Given a synthesiser that always speaks for six seconds
    tone = np.sin(np.arange(6 * synthesis.RATE, dtype=np.float32) / 7)
    monkeypatch.setattr(synthesis, "speak", lambda *_: tone)
    # When
    first, again = (synthesis.utterance(4, 2, "train", [tone], parts=8, noisy=True) for _ in range(2))
    # Then
    assert np.array_equal(first.samples, again.samples) and first.text == again.text
    assert first.samples.size <= synthesis.MAX_SECONDS * synthesis.RATE
    assert first.samples.size > 24 * synthesis.RATE, "four sentences of six seconds fit"
    assert np.abs(first.samples.astype(int)).max() < 32_767
    assert TEXT.fullmatch(first.text) and set(first.names) <= set(first.text.split())


def test_a_missing_synthesiser_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given
    monkeypatch.setattr(shutil, "which", lambda _: None)
    # When / Then
    with pytest.raises(RuntimeError, match="espeak-ng not found: install"):
        synthesis.espeak_version()
