"""What keywords bring and cost: word error rates with lists of true names and distractors, and time and memory.

    python -m granite_jax.training.recipes.demo.synthesis generate DIR --split heldout --count 2400 --seed 5
    python benchmarks/keywords.py rates DIR RESULTS [--parts lists ctc curve] [--limit N]
    python benchmarks/keywords.py report DIR RESULTS
    python benchmarks/keywords.py cost

`rates` runs one condition after another and adds a line to RESULTS for each; conditions that are there already are left
out, so that it can be stopped and started again. `report` prints Markdown. Utterances hold invented names unseen in
training. Each utterance's list is its own names and N distractors: names invented by the same grammar, so that many
sound alike, drawn anew for every utterance. Words are aligned by jiwer.

    B-WER      errors on the utterance's names, and insertions of names of the list, a hundred of its names
    U-WER      errors on all other words, a hundred of these
    deleted    words of the references that are missing, a hundred words
    false      keywords written that the utterance does not hold, a hundred utterances
    misplaced  names of the utterance written where other words were spoken, a hundred utterances
    heard      names of the utterances that pass the gate, a hundred names; other names, a hundred utterances

`ctc` measures the gate and the repair of drafts by themselves: the encoder's text is final, no language model runs.
Intervals are 95 % bootstrap intervals over utterances; of changes, over the same utterances with and without keywords.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jiwer
import numpy as np
from whisper_normalizer.english import EnglishTextNormalizer

sys.path.insert(0, str(Path(__file__).parents[1]))

from granite_jax.decoding import Automata, Trie, no_keywords, pool
from granite_jax.decoding.automaton import FIRST
from granite_jax.inference.buckets import make_bucket
from granite_jax.inference.engine import Pipeline, Request
from granite_jax.inference.programs import Encoded, pad_drafts
from granite_jax.inference.transcriber import Transcriber
from granite_jax.keywords import spotter
from granite_jax.keywords.lists import prepare
from granite_jax.keywords.options import BOOST, THRESHOLD, Biasing
from granite_jax.keywords.phrases import IN_PLACE
from granite_jax.model import granite_speech
from granite_jax.model.features import log_mel, num_frames
from granite_jax.training.corpus import Corpus
from granite_jax.training.recipes.demo.grammar import invent_name

COUNTS = (0, 100, 500, 2000)
BOOSTS = (2.0, 4.0, 8.0, 12.0)
THRESHOLDS: tuple[float | bool, ...] = (-0.8, -1.2, -2.0, -3.0, False)
CURVE, CURVE_UTTERANCES = 500, 600  # distractors of the curve, and of how many utterances it is
UNRELATED = 500  # keywords none of which is spoken
RESAMPLES = 2_000
COMPILATION = "/jax/core/compile/backend_compile_duration"
# Columns of `count` that are added up, and those they are divided by; no columns stand for utterances.
MEASURES = {
    "B-WER": ([0], [1]),
    "U-WER": ([2], [3]),
    "deleted": ([4], [1, 3]),
    "false": ([5], []),
    "misplaced": ([6], []),
}


@dataclasses.dataclass(frozen=True)
class Speech:
    audio: list[np.ndarray]
    texts: list[str]
    names: list[tuple[str, ...]]

    @classmethod
    def read(cls, directory: Path, limit: int | None) -> "Speech":
        corpus = Corpus.open(directory)
        utterances = [corpus[i] for i in range(min(len(corpus), limit or len(corpus)))]
        audio = [(u.samples / 32768).astype(np.float32) for u in utterances]
        return cls(audio, [u.text for u in utterances], [u.names for u in utterances])

    def lists(self, distractors: int, *, spoken: bool = True) -> list[list[str]]:
        """Each utterance's names among this many others, or the others alone."""
        rng = np.random.default_rng(distractors)
        invented = list(dict.fromkeys(invent_name(rng, "heldout") for _ in range(8 * max(distractors, 1))))
        lists = []
        for names in self.names:
            drawn = rng.choice(len(invented), size=min(distractors + len(names), len(invented)), replace=False)
            others = [invented[i] for i in drawn if invented[i] not in names][:distractors]
            lists.append([*dict.fromkeys(names if spoken else ()), *others])
        return lists


@dataclasses.dataclass(frozen=True)
class Condition:
    """One way to transcribe everything.

    Fields:
      distractors: of the lists; None for no lists, -1 for empty ones.
      spoken: whether the lists hold the names that are spoken.
      options: of `Transcriber.transcribe`.
      utterances: the first of these many; None for all.
    """

    distractors: int | None
    spoken: bool = True
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    utterances: int | None = None


CTC = {"speculative": "relaxed", "ctc_threshold": 1e6}


def conditions(parts: Sequence[str]) -> dict[str, Condition]:
    found = {"none": Condition(None)}
    if "lists" in parts:
        found |= {f"gate, {n}": Condition(n) for n in COUNTS}
        found |= {
            "unrelated": Condition(UNRELATED, spoken=False),
            "empty": Condition(-1),
            "greedy": Condition(100, options={"speculative": False}),
        }
        found |= {f"no gate, {n}": Condition(n, options={"keyword_gate": False}) for n in COUNTS}
    if "ctc" in parts:
        found |= {"ctc": Condition(None, options=CTC)} | {f"ctc, {n}": Condition(n, options=CTC) for n in COUNTS}
    if "curve" in parts:
        found |= {
            f"curve, {threshold or 'off'}, {boost:g}": Condition(
                CURVE, options={"keyword_gate": threshold, "keyword_boost": boost}, utterances=CURVE_UTTERANCES
            )
            for threshold in THRESHOLDS
            for boost in BOOSTS
        }
    return found


def encode_once(pipeline: Pipeline) -> None:
    """Keeps what the encoder makes of a batch: lists of keywords are scored against that, in a program of its own."""
    config, dtype, encode = pipeline._config, pipeline.programs.dtype, pipeline._encode
    kept: dict[tuple[Any, ...], tuple[Encoded, jax.Array]] = {}

    @jax.jit
    def ctc_logits(params: Any, samples: jax.Array, lengths: jax.Array) -> jax.Array:
        hidden = granite_speech.encode(
            config, params, log_mel(samples, lengths), num_frames(lengths), dtype=dtype
        ).hidden
        return granite_speech.ctc_logits(config, params, hidden, dtype=dtype)

    support = jax.jit(spotter.support)
    supports: dict[bytes, spotter.Support] = {}

    def remembered(bucket: Any, batch: list[Request]) -> Encoded:
        key = (bucket, *(request.index for request in batch))
        rows = [*batch, *[batch[0]] * (pipeline.rows(bucket) - len(batch))]
        lengths = np.array([len(request.audio.samples) for request in rows], np.int32)
        if key not in kept:
            samples = np.stack([np.pad(r.audio.samples, (0, bucket.samples - len(r.audio.samples))) for r in rows])
            encoded = encode(bucket, [dataclasses.replace(request, keywords=None) for request in batch])
            kept[key] = encoded, ctc_logits(pipeline._params, samples, lengths)
        encoded, logits = kept[key]
        sounds = spotter.candidates([request.keywords and request.keywords.labels for request in rows])
        what = hashlib.sha256(repr(key).encode() + np.asarray(sounds.labels).tobytes()).digest()
        if what not in supports:
            supports[what] = support(logits, num_frames(lengths), sounds)
        return dataclasses.replace(encoded, support=supports[what])

    pipeline._encode = remembered


def rates(asr: Transcriber, speech: Speech, parts: Sequence[str], results: Path, setting: dict[str, Any]) -> None:
    """Runs the conditions that are missing in `results`."""
    encode_once(asr._pipeline)
    done = read_results(results, setting)
    for name, condition in conditions(parts).items():
        if name in done:
            continue
        lists = None
        if condition.distractors is not None:
            empty = condition.distractors < 0
            lists = [] if empty else speech.lists(condition.distractors, spoken=condition.spoken)
        start = time.perf_counter()
        found = asr.transcribe(
            speech.audio[: condition.utterances],
            keywords=lists and lists[: condition.utterances],
            **condition.options,
        )
        record = {
            "setting": setting,
            "condition": name,
            "seconds": round(time.perf_counter() - start, 1),
            "compilations": asr.compilations,
            "texts": [t.text for t in found],
            "tokens": [t.tokens for t in found],
            "heard": [t.stats.get("keywords", ()) for t in found],
        }
        with results.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{name}: {record['seconds']} s, {asr.compilations} compilations so far", flush=True)


def read_results(path: Path, setting: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The conditions that were run with this setting."""
    if not path.exists():
        return {}
    records = map(json.loads, path.read_text().splitlines())
    return {record["condition"]: record for record in records if record["setting"] == setting}


normal = functools.cache(EnglishTextNormalizer())


def count(reference: str, hypothesis: str, names: set[str], listed: set[str]) -> tuple[int, ...]:
    """(name errors, names, other errors, other words, deletions, false keywords, misplaced names) of one utterance."""
    aligned = jiwer.process_words(reference, hypothesis)
    words, written = aligned.references[0], aligned.hypotheses[0]
    errors, deleted, false, misplaced = [0, 0], 0, 0, 0
    for chunk in aligned.alignments[0]:
        if chunk.type == "equal":
            continue
        spoken, put = words[chunk.ref_start_idx : chunk.ref_end_idx], written[chunk.hyp_start_idx : chunk.hyp_end_idx]
        false += sum(word in listed - names for word in put)
        misplaced += sum(word in names for word in put)
        deleted += len(spoken) if chunk.type == "delete" else 0
        for word in put if chunk.type == "insert" else spoken:
            errors[word not in (listed if chunk.type == "insert" else names)] += 1
    total = sum(word in names for word in words)
    return errors[0], total, errors[1], len(words) - total, deleted, false, misplaced


@dataclasses.dataclass(frozen=True)
class Counts:
    """What `count` says of every utterance, `[utterances, 7]`."""

    rows: np.ndarray

    @classmethod
    def of(cls, speech: Speech, texts: Sequence[str], lists: Sequence[Sequence[str]]) -> "Counts":
        rows = [
            count(normal(spoken), normal(text), set(map(normal, names)), set(map(normal, listed)))
            for spoken, text, names, listed in zip(speech.texts, texts, speech.names, lists, strict=True)
        ]
        return cls(np.array(rows))

    def rates(self, measure: str, picks: np.ndarray) -> np.ndarray:
        """The measure of each sample of utterances, `[samples]`."""
        over, under = MEASURES[measure]
        events = self.rows[:, over].sum(1)[picks].sum(-1)
        total = self.rows[:, under].sum(1)[picks].sum(-1) if under else picks.shape[-1]
        return 100 * events / np.maximum(total, 1)

    def rate(self, measure: str) -> float:
        return float(self.rates(measure, np.arange(len(self.rows))))

    def interval(self, measure: str, base: "Counts | None" = None) -> str:
        """The rate and its interval, or those of its difference to another's."""
        picks = np.random.default_rng(0).integers(len(self.rows), size=(RESAMPLES, len(self.rows)))
        resampled = self.rates(measure, picks) - (base.rates(measure, picks) if base else 0.0)
        value = self.rate(measure) - (base.rate(measure) if base else 0.0)
        low, high = np.percentile(resampled, [2.5, 97.5])
        return f"{value:+.2f} ({low:+.2f} to {high:+.2f})" if base else f"{value:.2f} ({low:.2f} to {high:.2f})"

    def reduction(self, measure: str, base: "Counts") -> str:
        """The relative change of a rate, and its interval."""
        picks = np.random.default_rng(0).integers(len(self.rows), size=(RESAMPLES, len(self.rows)))
        resampled = 100 * (self.rates(measure, picks) / np.maximum(base.rates(measure, picks), 1e-9) - 1)
        low, high = np.percentile(resampled, [2.5, 97.5])
        return f"{100 * (self.rate(measure) / base.rate(measure) - 1):+.0f} % ({low:+.0f} to {high:+.0f})"


def changed(ours: dict[str, Any], base: dict[str, Any]) -> str:
    """How many utterances have other tokens."""
    pairs = list(zip(ours["tokens"], base["tokens"], strict=True))
    return f"{100 * sum(a != b for a, b in pairs) / len(pairs):.2f} %"


def heard(speech: Speech, ours: dict[str, Any]) -> str:
    pairs = [(set(kept), set(names)) for kept, names in zip(ours["heard"], speech.names, strict=True)]
    spoken = sum(len(names) for _, names in pairs)
    right, wrong = sum(len(kept & names) for kept, names in pairs), sum(len(kept - names) for kept, names in pairs)
    return f"{100 * right / max(spoken, 1):.1f}; {100 * wrong / len(pairs):.2f}"


def report(speech: Speech, done: dict[str, dict[str, Any]]) -> None:
    """Prints what there is of each part."""
    lists = functools.cache(speech.lists)

    def table(rows: dict[str, str], base: str) -> None:
        head = (
            "keywords | heard | B-WER | change | U-WER | change | deleted, change | false | misplaced | changed texts"
        )
        print(f"\n| {head} |\n|{' --- |' * 10}")
        for name, title in rows.items():
            if name not in done:
                continue
            ours, plain = done[name], done[base]
            distractors = conditions(["lists", "ctc"])[name].distractors
            listed = lists(distractors or 0)
            counts, none = (Counts.of(speech, record["texts"], listed) for record in (ours, plain))
            cells = [title, "", counts.interval("B-WER"), "", counts.interval("U-WER"), "", counts.interval("deleted")]
            if name != base:
                cells[1], cells[3] = heard(speech, ours), counts.reduction("B-WER", none)
                cells[5], cells[6] = counts.interval("U-WER", none), counts.interval("deleted", none)
            cells += [counts.interval("false"), counts.interval("misplaced"), changed(ours, plain)]
            print("| " + " | ".join(cells) + " |", flush=True)

    for way, base in (("gate", "none"), ("no gate", "none"), ("ctc", "ctc")):
        if any(name.startswith(f"{way}, ") for name in done) and base in done:
            table({base: "none"} | {f"{way}, {n}": f"names and {n}, {way}" for n in COUNTS}, base)
    for name, what in (("unrelated", f"{UNRELATED} names none of which was spoken"), ("empty", "an empty list")):
        if name in done:
            print(f"\nTexts changed by {what}: {changed(done[name], done['none'])}")
    if "greedy" in done:
        print(f"\nTexts that differ between speculative and greedy decoding, 100 distractors: "
              f"{changed(done['greedy'], done['gate, 100'])}")  # fmt: skip
    curve = [name for name in done if name.startswith("curve, ")]
    if curve:
        listed = lists(CURVE)[:CURVE_UTTERANCES]
        part = Speech(*(values[:CURVE_UTTERANCES] for values in (speech.audio, speech.texts, speech.names)))
        print(f"\nFirst {len(listed)} utterances, {CURVE} distractors\n\n| gate | boost | {' | '.join(MEASURES)} |")
        print(f"|{' --- |' * (2 + len(MEASURES))}")
        for name in ["none", *curve]:
            counts = Counts.of(part, done[name]["texts"][:CURVE_UTTERANCES], listed)
            _, threshold, boost = name.split(", ") if name != "none" else ("", "none", "")
            print(f"| {threshold} | {boost} | {' | '.join(f'{counts.rate(m):.2f}' for m in MEASURES)} |", flush=True)


def ratios(modes: dict[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """The time that each mode reports over the first's: the median over turns in which each runs once."""
    found: dict[str, list[float]] = {name: [] for name in modes}
    for _ in range(turns):
        seconds = {name: run() for name, run in modes.items()}
        for name in modes:
            found[name].append(seconds[name] / next(iter(seconds.values())))
    return {name: statistics.median(values) for name, values in found.items()}


def invented_lists(seed: int) -> Iterator[list[tuple[str, None]]]:
    """Lists of 2,000 names without end."""
    rng = np.random.default_rng(seed)
    while True:
        yield [(name, None) for name in dict.fromkeys(invent_name(rng, "heldout") for _ in range(4000))][:2000]


def cost(asr: Transcriber, batch: int, turns: int) -> None:
    """Prints decode steps and encodings with and without keywords, by time and compiled bytes; and recompilations."""
    config, programs, params = asr.config, asr._pipeline.programs, asr._pipeline._params
    bucket = make_bucket(config, batch, 5.0)
    lists = invented_lists(seed=0)
    make = functools.partial(prepare, tokenizer=asr.tokenizer, num_labels=config.encoder.output_dim)
    entries = next(lists)
    ungated, gated = make(entries, Biasing(threshold=None)), make(entries, Biasing())
    rng = np.random.default_rng(0)
    samples = rng.uniform(-0.1, 0.1, (batch, bucket.samples)).astype(np.float32)
    lengths = np.full(batch, bucket.samples, np.int32)

    def sounds(keywords):
        return jax.tree.map(jax.numpy.asarray, spotter.candidates([keywords and keywords.labels] * batch))

    def encode(candidates) -> float:
        start = time.perf_counter()
        jax.block_until_ready(programs.encode(params, samples, lengths, candidates))
        return time.perf_counter() - start

    audio = programs.encode(params, samples, lengths, sounds(None)).audio
    length = 20 + int(config.num_audio_tokens(bucket.samples // 320))
    tokens = np.full((batch, bucket.prompt), 5, np.int32)
    tokens[:, 10 : length - 10] = config.audio_token_id
    draft = pad_drafts([()] * batch, bucket.draft)
    limits, thresholds = np.full(batch, 100, np.int32), np.full(batch, np.inf, np.float32)

    def prefill(automata: Automata) -> Any:
        prompts = params, tokens, np.full(batch, length, np.int32), audio, draft
        return jax.block_until_ready(programs.prefill(*prompts, automata, capacity=bucket.capacity))

    def decode(automata: Automata) -> float:
        verified, cache = prefill(automata)
        start = time.perf_counter()
        state = programs.decode(params, verified, cache, draft, limits, thresholds, automata, room=bucket.room)
        steps = int(np.asarray(state.passes).max()) - 1
        return (time.perf_counter() - start) / steps

    def compiled_bytes(automata: Automata) -> int:
        drafts = params, *prefill(automata), draft, limits, thresholds, automata
        memory = programs.decode.lower(*drafts, room=bucket.room).compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    def pooled(trie: Trie | None) -> Automata:
        return jax.tree.map(jax.numpy.asarray, pool([trie] if trie else [], [0 if trie else -1] * batch))

    tables = {
        "smallest tables": jax.tree.map(jax.numpy.asarray, no_keywords(batch, states=8)),
        "no keywords": pooled(None),
        "2,000 keywords, no gate": pooled(ungated.trie),
    }
    steps = {name: functools.partial(decode, table) for name, table in tables.items()}
    for run in steps.values():
        run()
    sizes = {name: compiled_bytes(table) for name, table in tables.items()}
    print(f"\n| decode step, batch {batch} | time | compiled bytes |\n| --- | --- | --- |")
    for name, ratio in ratios(steps, turns).items():
        print(f"| {name} | {ratio:.3f} | {sizes[name] / next(iter(sizes.values())):.3f} |", flush=True)
    arrays = {"no keywords": sounds(None), "2,000 keywords": sounds(gated)}
    encodings = {name: functools.partial(encode, array) for name, array in arrays.items()}
    for run in encodings.values():
        run()
    print(f"\n| encode and gate, batch {batch}, 5 s | time |\n| --- | --- |")
    for name, ratio in ratios(encodings, turns).items():
        print(f"| {name} | {ratio:.3f} |", flush=True)

    # Through the pipeline, where lists are placed as they are in use.
    compiled = [0]
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(1) if event == COMPILATION else None
    )
    audio = [0.1 * rng.standard_normal(16_000 + 1_000 * i).astype(np.float32) for i in range(batch)]
    for turn in range(3):
        for threshold in (None, False):
            names = [[name for name, _ in next(lists)] for _ in audio]
            asr.transcribe(audio, keywords=names, keyword_gate=threshold)
            asr.transcribe(audio, keywords=names[0], keyword_gate=threshold)
        if turn == 0:
            first = len(compiled)
    print(f"\nCompilations for later lists of the same bucket: {len(compiled) - first}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["rates", "report", "cost"])
    parser.add_argument("audio", type=Path, nargs="?", help="a directory of synthesis.py")
    parser.add_argument("results", type=Path, nargs="?", help="JSON lines, one a condition")
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--parts", nargs="+", choices=["lists", "ctc", "curve"], default=["lists", "ctc", "curve"])
    parser.add_argument("--limit", type=int, help="utterances; default all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=11, help="of timing")
    args = parser.parse_args()
    if args.command != "report":
        asr = Transcriber.from_pretrained(args.checkpoint, dtype="float32", batch_size=args.batch)
    if args.command == "cost":
        cost(asr, args.batch, args.turns)
        return
    speech = Speech.read(args.audio, args.limit)
    setting = {
        "checkpoint": args.checkpoint,
        "audio": args.audio.name,
        "utterances": len(speech.audio),
        "boost": BOOST,
        "first": FIRST,
        "in place": list(IN_PLACE),
        "gate": THRESHOLD,
    }
    print(f"{setting}, {sum(map(len, speech.names))} names in {sum(map(bool, speech.names))} utterances, float32")
    if args.command == "rates":
        rates(asr, speech, args.parts, args.results, setting)
    else:
        report(speech, read_results(args.results, setting))


if __name__ == "__main__":
    main()
