"""What keywords bring and cost: word error rates with lists of true names and distractors, and time and memory.

    python -m granite_jax.training.recipes.demo.recipe data WORK      # DIR: WORK/keywords-test or WORK/keywords-tune
    python benchmarks/keywords.py rates DIR RESULTS [--parts lists ctc curve] [--limit N]
    python benchmarks/keywords.py report DIR RESULTS
    python benchmarks/keywords.py cost
    python benchmarks/keywords.py gate [--batch 1] [--seconds 10]

`rates` runs one condition after another and adds a line to RESULTS for each; conditions that are there already are left
out, so that it can be stopped and started again. `report` prints Markdown. Utterances hold invented names unseen in
training. Each utterance's list is its own names and N distractors: names invented by the same grammar, so that many
sound alike, drawn anew for every utterance. Words are aligned, and intervals found, by granite_jax.evaluation.

    B-WER      errors on the utterance's names, and insertions of names of the list, a hundred of its names
    U-WER      errors on all other words, a hundred of these
    deleted    words of the references that are missing, a hundred words
    false      keywords written that the utterance does not hold, a hundred utterances
    misplaced  names of the utterance written where other words were spoken, a hundred utterances
    heard      names of the utterances that pass the gate, a hundred names; other names, a hundred utterances

`ctc` measures the gate and the repair of drafts by themselves: the encoder's text is final, no language model runs.
`gate` times the gate beside the encoder of granite-4.0-1b-speech with random weights.
Intervals are 95 % bootstrap intervals over utterances; of changes, over the same utterances with and without keywords.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.timing import elapsed, measure_in_turns, median_ratios
from granite_jax.evaluation.metrics import (
    GAP,
    Counts,
    Rate,
    align_words,
    difference,
    keyword_counts,
    rate,
    relative_difference,
)
from granite_jax.evaluation.normalize import normalizer
from granite_jax.keywords import spotter
from granite_jax.keywords.automaton import FIRST, BatchedAutomata, KeywordAutomaton, batch_automata, no_keywords
from granite_jax.keywords.lists import prepare
from granite_jax.keywords.options import BOOST, THRESHOLD, KeywordOptions
from granite_jax.keywords.phrases import IN_PLACE
from granite_jax.models import granite_speech
from granite_jax.models.granite_speech.config import Config
from granite_jax.models.layers.features import log_mel, num_frames
from granite_jax.recognition.buckets import Bucket, make_bucket
from granite_jax.recognition.encoding import Encoded
from granite_jax.recognition.speech_lm_programs import pad_drafts
from granite_jax.recognition.utterances import Utterance
from granite_jax.text.tokenizer import Tokenizer
from granite_jax.training.corpus import Corpus
from granite_jax.training.recipes.demo.grammar import invent_name
from granite_jax.transcriber import Transcriber
from granite_jax.waveform import SAMPLING_RATE

COUNTS = (0, 100, 500, 2000)
BOOSTS = (2.0, 4.0, 8.0, 12.0)
THRESHOLDS: tuple[float | bool, ...] = (-0.8, -1.2, -2.0, -3.0, False)
CURVE, CURVE_UTTERANCES = 500, 600  # distractors of the curve, and of how many utterances it is
UNRELATED = 500  # keywords none of which is spoken
COMPILATION = "/jax/core/compile/backend_compile_duration"
MEASURES = ("B-WER", "U-WER", "deleted", "false", "misplaced")


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


def encode_once(asr: Transcriber) -> None:
    """Keeps what the encoder makes of each input; lists of keywords are scored against that by a program of its own."""
    recognizer: Any = asr.recognizer()
    config, dtype, encode = asr.config, recognizer.programs.dtype, recognizer._encode
    kept: dict[tuple[Any, str], tuple[np.ndarray, ...]] = {}

    @jax.jit
    def ctc_logits(params: Any, samples: jax.Array, lengths: jax.Array) -> jax.Array:
        hidden = granite_speech.encode(
            config, params, log_mel(samples, lengths), num_frames(lengths), dtype=dtype
        ).hidden
        return granite_speech.ctc_logits(config, params, hidden, dtype=dtype)

    score = jax.jit(spotter.score_keywords)

    def remembered(bucket: Bucket, utterances: Sequence[Utterance]) -> Encoded:
        size = bucket.batch * recognizer.programs.devices.replicas
        rows = [*utterances, *[utterances[0]] * (size - len(utterances))]
        lengths = np.array([len(utterance.audio.samples) for utterance in rows], np.int32)
        names = [(bucket, utterance.audio.name) for utterance in rows]
        if any(name not in kept for name in names):
            samples = np.stack([np.pad(u.audio.samples, (0, bucket.samples - len(u.audio.samples))) for u in rows])
            plain = [dataclasses.replace(utterance, keywords=None) for utterance in utterances]
            encoded = encode(bucket, plain)
            found = encoded.audio, encoded.labels, encoded.entropy, encoded.speech_frames
            found = (*found, ctc_logits(asr.params, samples, lengths))
            # The rows behind those of utterances are padding, of which `encode` makes nothing.
            kept.update(zip(names[: len(utterances)], zip(*map(np.asarray, found), strict=True), strict=False))
        audio, labels, entropy, speech_frames, logits = (
            np.stack(parts) for parts in zip(*(kept[name] for name in names), strict=True)
        )
        keywords = spotter.make_keyword_batch([u.keywords and u.keywords.labels for u in rows])
        spotting = score(logits, num_frames(lengths), keywords)
        return Encoded(audio, labels, entropy, spotting, None, speech_frames, None)

    recognizer._encode = remembered


def rates(asr: Transcriber, speech: Speech, parts: Sequence[str], results: Path, setting: dict[str, Any]) -> None:
    """Runs the conditions that are missing in `results`."""
    encode_once(asr)
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
            segment_seconds=None,
            guards=False,
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


normalize = functools.cache(normalizer("english"))


def count(speech: Speech, texts: Sequence[str], lists: Sequence[Sequence[str]]) -> dict[str, Counts]:
    """The events of each measure in every utterance, and what they are counted against."""
    said, written = ([normalize(text) for text in group] for group in (speech.texts, texts))
    names, listed = ([set(map(normalize, group)) for group in groups] for groups in (speech.names, lists))
    names_counts, others_counts = keyword_counts(said, written, listed)
    deleted, false, misplaced = np.zeros((3, len(said)), np.int64)
    for row, (reference, hypothesis) in enumerate(zip(said, written, strict=True)):
        wrong = [(spoken, put) for spoken, put in align_words(reference, hypothesis) if spoken != put]
        distractors = listed[row] - names[row]
        deleted[row] = sum(put == GAP for _, put in wrong)
        false[row] = sum(put in distractors for _, put in wrong)
        misplaced[row] = sum(put in names[row] for _, put in wrong)
    utterances = np.ones(len(said), np.int64)
    return {
        "B-WER": names_counts,
        "U-WER": others_counts,
        "deleted": Counts(deleted, names_counts.total + others_counts.total),
        "false": Counts(false, utterances),
        "misplaced": Counts(misplaced, utterances),
    }


def with_interval(value: Rate, style: str = ".2f", unit: str = "") -> str:
    return f"{value.rate:{style}}{unit} ({value.low:{style}} to {value.high:{style}})"


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
            counts, none = (count(speech, record["texts"], listed) for record in (ours, plain))
            found = {measure: with_interval(rate([counts[measure]])) for measure in MEASURES}
            cells = [title, "", found["B-WER"], "", found["U-WER"], "", found["deleted"]]
            if name != base:
                changes = {measure: difference([none[measure]], [counts[measure]]) for measure in ("U-WER", "deleted")}
                relative = relative_difference([none["B-WER"]], [counts["B-WER"]])
                cells[1], cells[3] = heard(speech, ours), with_interval(relative, "+.0f", " %")
                cells[5], cells[6] = (with_interval(change, "+.2f") for change in changes.values())
            cells += [found["false"], found["misplaced"], changed(ours, plain)]
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
            counts = count(part, done[name]["texts"][:CURVE_UTTERANCES], listed)
            _, threshold, boost = name.split(", ") if name != "none" else ("", "none", "")
            values = " | ".join(f"{rate([counts[measure]]).rate:.2f}" for measure in MEASURES)
            print(f"| {threshold} | {boost} | {values} |", flush=True)


def print_ratios(title: str, runs: dict[str, Callable[[], Any]], turns: int) -> None:
    """Prints a Markdown table of the time of each run over the first's, compilation aside."""
    for run in runs.values():
        jax.block_until_ready(run())
    seconds = measure_in_turns({name: functools.partial(elapsed, run) for name, run in runs.items()}, turns)
    print(f"\n| {title} | time |\n| --- | --- |")
    for name, ratio in median_ratios(seconds).items():
        print(f"| {name} | {ratio:.3f} |", flush=True)


def invented_lists(seed: int) -> Iterator[list[tuple[str, None]]]:
    """Lists of 2,000 names without end."""
    rng = np.random.default_rng(seed)
    while True:
        yield [(name, None) for name in dict.fromkeys(invent_name(rng, "heldout") for _ in range(4000))][:2000]


def cost(asr: Transcriber, batch: int, turns: int) -> None:
    """Prints decode steps and encodings with and without keywords, by time and compiled bytes; and recompilations."""
    # A token that is never written as the end of text: there is a step to time, regardless of what the model hears.
    decoder = dataclasses.replace(asr.config.decoder, eos_token_id=asr.config.audio_token_id)
    config, params = dataclasses.replace(asr.config, decoder=decoder), asr.params
    programs: Any = Transcriber(config, params, asr.tokenizer, batch_size=batch).recognizer().programs
    bucket = make_bucket(config, batch, 5.0)
    lists = invented_lists(seed=0)
    make = functools.partial(prepare, tokenizer=asr.tokenizer, num_labels=config.encoder.output_dim)
    entries = next(lists)
    ungated, gated = make(entries, KeywordOptions(threshold=None)), make(entries, KeywordOptions())
    rng = np.random.default_rng(0)
    samples = rng.uniform(-0.1, 0.1, (batch, bucket.samples)).astype(np.float32)
    lengths = np.full(batch, bucket.samples, np.int32)

    def make_candidates(keywords):
        return jax.tree.map(jax.numpy.asarray, spotter.make_keyword_batch([keywords and keywords.labels] * batch))

    def encode(candidates) -> Encoded:
        return programs.encode(params, samples, lengths, candidates, np.zeros(batch, np.int32))

    audio = encode(make_candidates(None)).audio
    length = 20 + int(config.num_audio_tokens(bucket.samples // 320))
    tokens = np.full((batch, bucket.prompt), 5, np.int32)
    tokens[:, 10 : length - 10] = config.audio_token_id
    draft = pad_drafts([()] * batch, bucket.draft)
    limits, thresholds = np.full(batch, 100, np.int32), np.full(batch, np.inf, np.float32)

    def prefill(automata: BatchedAutomata) -> Any:
        prompts = params, tokens, np.full(batch, length, np.int32), audio, draft
        return jax.block_until_ready(programs.prefill(*prompts, automata, capacity=bucket.capacity))

    def decode(automata: BatchedAutomata) -> float:
        verified, cache = prefill(automata)
        start = time.perf_counter()
        state = programs.decode(
            params, verified, cache, draft, limits, thresholds, automata, max_out_length=bucket.max_out_length
        )
        steps = int(np.asarray(state.num_forward_passes).max()) - 1
        return (time.perf_counter() - start) / steps

    def compiled_bytes(automata: BatchedAutomata) -> int:
        drafts = params, *prefill(automata), draft, limits, thresholds, automata
        memory = programs.decode.lower(*drafts, max_out_length=bucket.max_out_length).compile().memory_analysis()
        return memory.argument_size_in_bytes + memory.temp_size_in_bytes

    def pooled(trie: KeywordAutomaton | None) -> BatchedAutomata:
        return jax.tree.map(jax.numpy.asarray, batch_automata([trie] if trie else [], [0 if trie else -1] * batch))

    tables = {
        "smallest tables": jax.tree.map(jax.numpy.asarray, no_keywords(batch, states=8)),
        "no keywords": pooled(None),
        "2,000 keywords, no gate": pooled(ungated.always_automaton),
    }
    steps = {name: functools.partial(decode, table) for name, table in tables.items()}
    for run in steps.values():
        run()
    sizes = {name: compiled_bytes(table) for name, table in tables.items()}
    print(f"\n| decode step, batch {batch} | time | compiled bytes |\n| --- | --- | --- |")
    for name, ratio in median_ratios(measure_in_turns(steps, turns)).items():
        print(f"| {name} | {ratio:.3f} | {sizes[name] / next(iter(sizes.values())):.3f} |", flush=True)
    candidates = {"no keywords": make_candidates(None), "2,000 keywords": make_candidates(gated)}
    encodings = {name: functools.partial(encode, labels) for name, labels in candidates.items()}
    print_ratios(f"encode and gate, batch {batch}, 5 s", encodings, turns)

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


def gate_cost(tokenizer: Tokenizer, batch: int, seconds: float, turns: int) -> None:
    """Prints the time of the gate over that of granite-4.0-1b-speech's encoder, with random weights in float32."""
    config = Config.granite_4_0_1b()
    params = {"encoder": jax.jit(lambda: granite_speech.init(config, jax.random.key(0))["encoder"])()}
    rng = np.random.default_rng(0)
    samples = rng.uniform(-0.1, 0.1, (batch, int(seconds * SAMPLING_RATE))).astype(np.float32)
    lengths = np.full(batch, samples.shape[1], np.int32)

    @jax.jit
    def encode(params: Any, samples: jax.Array, lengths: jax.Array) -> jax.Array:
        hidden = granite_speech.encode(config, params, log_mel(samples, lengths), num_frames(lengths)).hidden
        return granite_speech.ctc_logits(config, params, hidden)

    logits = encode(params, samples, lengths)
    score = jax.jit(spotter.score_keywords)
    names = next(invented_lists(seed=0))
    for number in COUNTS[1:]:
        keywords = prepare(names[:number], KeywordOptions(), tokenizer, config.encoder.output_dim)
        candidates = jax.tree.map(jax.numpy.asarray, spotter.make_keyword_batch([keywords.labels] * batch))
        runs = {
            "encoder": functools.partial(encode, params, samples, lengths),
            "gate": functools.partial(score, logits, num_frames(lengths), candidates),
        }
        print_ratios(f"granite-4.0-1b-speech, batch {batch}, {seconds:g} s, {number:,} keywords", runs, turns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["rates", "report", "cost", "gate"])
    parser.add_argument("audio", type=Path, nargs="?", help="a directory of synthesis.py")
    parser.add_argument("results", type=Path, nargs="?", help="JSON lines, one a condition")
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--parts", nargs="+", choices=["lists", "ctc", "curve"], default=["lists", "ctc", "curve"])
    parser.add_argument("--limit", type=int, help="utterances; default all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=11, help="of timing")
    parser.add_argument("--seconds", type=float, default=10.0, help="of audio, for `gate`")
    args = parser.parse_args()
    if args.command != "report":
        asr = Transcriber.from_pretrained(args.checkpoint, dtype="float32", batch_size=args.batch)
    if args.command == "cost":
        cost(asr, args.batch, args.turns)
        return
    if args.command == "gate":
        gate_cost(asr.tokenizer, args.batch, args.seconds, args.turns)
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
