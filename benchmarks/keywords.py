"""What keywords bring and cost: word error rates with lists of true names and distractors, and time and memory.

    python -m granite_jax.training.synthesis generate DIR --split heldout --count 1600 --seed 5
    python benchmarks/keywords.py DIR [--checkpoint demo] [--ctc] [--curve] [--cost] [--limit N]

Prints Markdown. Utterances hold invented names unseen in training. Each utterance's list is its own names and N
distractors: names invented by the same grammar, so that many sound alike, drawn anew for every utterance. Words are
aligned as in training/evaluate.py.

    B-WER      errors on the utterance's names, and insertions of names of the list, a hundred of its names
    U-WER      errors on all other words, a hundred of these
    deleted    words of the references that are missing, a hundred words
    false      keywords of the list written where they were not spoken, a hundred utterances
    heard      names of the utterances that pass the gate, a hundred names; other names, a hundred utterances

`--ctc` measures the gate and the repair of drafts by themselves: the encoder's text is final, no language model runs.
Intervals are 95 % bootstrap intervals over utterances; of changes, over the same utterances with and without keywords.
"""

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jiwer
import numpy as np
from whisper_normalizer.english import EnglishTextNormalizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from granite_jax.decoding import Automata, Trie, no_keywords, pool
from granite_jax.keywords import BOOST, THRESHOLD, Biasing, prepare
from granite_jax.programs import make_bucket, pad_drafts
from granite_jax.training.corpus import invent_name
from granite_jax.training.synthesis import Corpus
from granite_jax.transcriber import Transcriber, Transcript

COUNTS = (0, 100, 500, 2000)
BOOSTS = (2.0, 4.0, 6.0, 8.0, 12.0)
THRESHOLDS = (-0.8, -1.5, -2.5)
RESAMPLES = 2_000
# Columns of `count` that are added up, and those they are divided by; no columns stand for utterances.
MEASURES = {"B-WER": ([0], [1]), "U-WER": ([2], [3]), "deleted": ([4], [1, 3]), "false": ([5], [])}


@dataclasses.dataclass(frozen=True)
class Speech:
    audio: list[np.ndarray]
    texts: list[str]
    names: list[tuple[str, ...]]


def read_speech(directory: Path, limit: int | None) -> Speech:
    corpus = Corpus.open(directory)
    utterances = [corpus[i] for i in range(min(len(corpus), limit or len(corpus)))]
    audio = [(u.samples / 32768).astype(np.float32) for u in utterances]
    return Speech(audio, [u.text for u in utterances], [u.names for u in utterances])


def lists_of(speech: Speech, distractors: int, seed: int) -> list[list[str]]:
    """Each utterance's names among this many others."""
    rng = np.random.default_rng(seed)
    invented = list(dict.fromkeys(invent_name(rng, "heldout") for _ in range(8 * max(distractors, 1))))
    lists = []
    for names in speech.names:
        drawn = rng.choice(len(invented), size=min(distractors + len(names), len(invented)), replace=False)
        others = [invented[i] for i in drawn if invented[i] not in names][:distractors]
        lists.append([*dict.fromkeys(names), *others])
    return lists


def count(reference: str, hypothesis: str, names: set[str], keywords: set[str]) -> tuple[int, ...]:
    """(name errors, names, other errors, other words, deletions, false keywords) of one utterance."""
    aligned = jiwer.process_words(reference, hypothesis)
    words, written = aligned.references[0], aligned.hypotheses[0]
    errors, deleted, false = [0, 0], 0, 0
    for chunk in aligned.alignments[0]:
        if chunk.type == "equal":
            continue
        spoken, put = words[chunk.ref_start_idx : chunk.ref_end_idx], written[chunk.hyp_start_idx : chunk.hyp_end_idx]
        false += sum(word in keywords for word in put)
        deleted += len(spoken) if chunk.type == "delete" else 0
        for word in put if chunk.type == "insert" else spoken:
            errors[word not in (keywords if chunk.type == "insert" else names)] += 1
    total = sum(word in names for word in words)
    return errors[0], total, errors[1], len(words) - total, deleted, false


@dataclasses.dataclass(frozen=True)
class Counts:
    """What `count` says of every utterance, `[utterances, 6]`."""

    rows: np.ndarray

    def rates(self, measure: str, picks: np.ndarray) -> np.ndarray:
        """The measure of each sample of utterances, `[samples]`."""
        over, under = MEASURES[measure]
        events = self.rows[:, over].sum(1)[picks].sum(-1)
        total = self.rows[:, under].sum(1)[picks].sum(-1) if under else picks.shape[-1]
        return 100 * events / np.maximum(total, 1)

    def rate(self, measure: str) -> float:
        return float(self.rates(measure, np.arange(len(self.rows))))


def interval(ours: Counts, measure: str, base: Counts | None = None) -> str:
    """The rate, and its interval; or that of its difference to another's."""
    picks = np.random.default_rng(0).integers(len(ours.rows), size=(RESAMPLES, len(ours.rows)))
    rates = ours.rates(measure, picks) - (base.rates(measure, picks) if base else 0.0)
    value = ours.rate(measure) - (base.rate(measure) if base else 0.0)
    low, high = np.percentile(rates, [2.5, 97.5])
    return f"{value:+.2f} ({low:+.2f} to {high:+.2f})" if base else f"{value:.2f} ({low:.2f} to {high:.2f})"


def counts_of(speech: Speech, found: list[Transcript], lists: Sequence[Sequence[str]]) -> Counts:
    normal = EnglishTextNormalizer()
    rows = [
        count(normal(text), normal(t.text), {normal(n) for n in names}, {normal(k) for k in keywords})
        for text, t, names, keywords in zip(speech.texts, found, speech.names, lists, strict=True)
    ]
    return Counts(np.array(rows))


def changed(ours: list[Transcript], base: list[Transcript]) -> str:
    return f"{100 * sum(a.tokens != b.tokens for a, b in zip(ours, base, strict=True)) / len(ours):.1f} %"


def heard(speech: Speech, found: list[Transcript]) -> str:
    pairs = [(set(t.stats["keywords"]), set(names)) for t, names in zip(found, speech.names, strict=True)]
    spoken = sum(len(names) for _, names in pairs)
    right, wrong = sum(len(kept & names) for kept, names in pairs), sum(len(kept - names) for kept, names in pairs)
    return f"{100 * right / max(spoken, 1):.1f}; {100 * wrong / len(pairs):.2f}"


def table(transcribe: Callable[..., list[Transcript]], speech: Speech, gates: dict[str, Any]) -> None:
    """Prints rates for all numbers of distractors, and what lists without any spoken name change."""
    base = transcribe()
    print(
        "\n| gate | distractors | heard | B-WER | change | U-WER | change | deleted, change | false | changed texts |"
    )
    print("| --- |" + " --- |" * 9)
    for (name, gate), distractors in itertools.product(gates.items(), COUNTS):
        lists = lists_of(speech, distractors, seed=distractors)
        none = counts_of(speech, base, lists)
        if (name, distractors) == (next(iter(gates)), 0):
            print(f"| no keywords | | | {interval(none, 'B-WER')} | | {interval(none, 'U-WER')} | | "
                  f"{interval(none, 'deleted')} | | |")  # fmt: skip
        found = transcribe(keywords=lists, keyword_gate=gate)
        ours = counts_of(speech, found, lists)
        relative = 100 * (ours.rate("B-WER") / none.rate("B-WER") - 1)
        cells = [name, distractors, heard(speech, found), interval(ours, "B-WER"), f"{relative:+.0f} %",
                 interval(ours, "U-WER"), interval(ours, "U-WER", none), interval(ours, "deleted", none),
                 f"{ours.rate('false'):.2f}", changed(found, base)]  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    unrelated = [others[len(names) :] for others, names in zip(lists_of(speech, 500, 9), speech.names, strict=True)]
    found = transcribe(keywords=unrelated)
    print(f"\n500 names none of which was spoken change {changed(found, base)} of the texts; "
          f"an empty list, {changed(transcribe(keywords=[]), base)}")  # fmt: skip


def curve(transcribe: Callable[..., list[Transcript]], speech: Speech, distractors: int) -> None:
    """Prints rates over boosts and thresholds."""
    base = transcribe()
    lists = lists_of(speech, distractors, seed=distractors)
    none = counts_of(speech, base, lists)
    print(f"\n{distractors} distractors\n\n| gate | boost | B-WER | U-WER | deleted | false |\n" + "| --- " * 6 + "|")
    print(f"| | none | {' | '.join(f'{none.rate(m):.2f}' for m in MEASURES)} |", flush=True)
    for gate, boost in itertools.product((*THRESHOLDS, False), BOOSTS):
        found = transcribe(keywords=lists, keyword_gate=gate, keyword_boost=boost)
        ours = counts_of(speech, found, lists)
        print(
            f"| {gate or 'off'} | {boost:g} | {' | '.join(f'{ours.rate(m):.2f}' for m in MEASURES)} |",
            flush=True,
        )


def ratios(modes: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """The time that each mode reports over the first's: the median over turns in which each runs once."""
    found: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(turns):
        seconds = {name: run() for name, run in modes.items()}
        for name in modes:
            found[name].append(seconds[name] / next(iter(seconds.values())))
    return {name: statistics.median(values) for name, values in found.items()}


def cost(asr: Transcriber, params: Any, batch: int, turns: int) -> None:
    """Prints decode steps and encodings with and without keywords, by time and compiled bytes."""
    config, programs, pipeline = asr.config, asr._pipeline.programs, asr._pipeline
    bucket = make_bucket(config, batch, 5.0)
    rng = np.random.default_rng(0)
    names = list(dict.fromkeys(invent_name(rng, "heldout") for _ in range(4000)))[:2000]
    ungated = prepare(
        [(name, None) for name in names], Biasing(threshold=None), asr.tokenizer, config.encoder.output_dim
    )
    gated = prepare([(name, None) for name in names], Biasing(), asr.tokenizer, config.encoder.output_dim)
    samples = rng.uniform(-0.1, 0.1, (batch, bucket.samples)).astype(np.float32)
    lengths = np.full(batch, bucket.samples, np.int32)

    def encode(keywords) -> float:
        sounds = pipeline._candidates((keywords,) * batch)
        start = time.perf_counter()
        jax.block_until_ready(programs.encode(params, samples, lengths, sounds))
        return time.perf_counter() - start

    encoded = programs.encode(params, samples, lengths, pipeline._candidates((None,) * batch))
    length = 20 + int(config.num_audio_tokens(bucket.samples // 320))
    tokens = np.full((batch, bucket.prompt), 5, np.int32)
    tokens[:, 10 : length - 10] = config.audio_token_id
    draft = pad_drafts([()] * batch, bucket.draft)

    def decode(automata: Automata) -> float:
        verified, cache = programs.prefill(
            params, tokens, np.full(batch, length, np.int32), encoded.audio, draft, automata, capacity=bucket.capacity
        )
        limits, thresholds = np.full(batch, 100, np.int32), np.full(batch, np.inf, np.float32)
        jax.block_until_ready(cache)
        start = time.perf_counter()
        state = programs.decode(
            params, verified, cache, draft, limits, thresholds, pipeline._spelling, automata, room=bucket.room
        )
        steps = int(np.asarray(state.passes).max()) - 1
        return (time.perf_counter() - start) / steps

    def compiled_bytes(automata: Automata) -> int:
        verified, cache = programs.prefill(
            params, tokens, np.full(batch, length, np.int32), encoded.audio, draft, automata, capacity=bucket.capacity
        )
        rest = draft, lengths, np.full(batch, np.inf, np.float32), pipeline._spelling, automata
        memory = programs.decode.lower(params, verified, cache, *rest, room=bucket.room).compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    def automata(trie: Trie | None) -> Automata:
        pooled = pool([trie] if trie else [], [0 if trie else -1] * batch)
        return jax.tree.map(jax.numpy.asarray, pooled)

    tables = {
        "smallest tables": jax.tree.map(jax.numpy.asarray, no_keywords(batch, states=8)),
        "no keywords": automata(None),
        "2,000 keywords, no gate": automata(ungated.trie),
    }
    modes = {name: lambda table=table: decode(table) for name, table in tables.items()}
    for run in modes.values():
        run()
    sizes = {name: compiled_bytes(table) for name, table in tables.items()}
    print(f"\n| decode step, batch {batch} | time | compiled bytes |\n| --- | --- | --- |")
    for name, ratio in ratios(modes, turns).items():
        print(f"| {name} | {ratio:.3f} | {sizes[name] / next(iter(sizes.values())):.3f} |", flush=True)
    modes = {"no keywords": lambda: encode(None), "2,000 keywords": lambda: encode(gated)}
    for run in modes.values():
        run()
    print(f"\n| encode and gate, batch {batch}, 5 s | time |\n| --- | --- |")
    for name, ratio in ratios(modes, turns).items():
        print(f"| {name} | {ratio:.3f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("audio", type=Path, help="a directory of synthesis.py")
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--limit", type=int, help="utterances; default all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=11, help="of timing")
    parser.add_argument("--distractors", type=int, default=500, help="of the curve")
    parser.add_argument("--ctc", action="store_true", help="the gate and repaired drafts alone")
    parser.add_argument("--curve", action="store_true", help="boosts and thresholds instead of distractors")
    parser.add_argument("--cost", action="store_true", help="time and memory instead of error rates")
    args = parser.parse_args()
    asr = Transcriber.from_pretrained(args.checkpoint, dtype="float32", batch_size=args.batch)
    if args.cost:
        cost(asr, asr._params, args.batch, args.turns)
        return
    speech = read_speech(args.audio, args.limit)
    print(f"{len(speech.audio)} utterances, {sum(map(len, speech.names))} names, {args.checkpoint}, float32, "
          f"boost {BOOST:g}, gate {THRESHOLD:g}")  # fmt: skip
    options = {"speculative": "relaxed", "ctc_threshold": 1e6} if args.ctc else {}
    transcribe = functools.partial(asr.transcribe, speech.audio, **options)
    if args.curve:
        curve(transcribe, speech, args.distractors)
    elif args.ctc:
        table(transcribe, speech, {"on": None})
    else:
        table(transcribe, speech, {"on": None, "off": False})
        lists = lists_of(speech, 100, seed=100)
        greedy = transcribe(keywords=lists, speculative=False)
        differing = changed(transcribe(keywords=lists), greedy)
        print(f"\n100 distractors: speculative and greedy decoding differ in {differing} of the texts")


if __name__ == "__main__":
    main()
