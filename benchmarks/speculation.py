"""What drafts save: passes of the language model, tokens a pass, throughput against greedy decoding, word error rates.

    python benchmarks/speculation.py [--checkpoint demo] [--audio DIR] [--batch 8] [--sweep | --bpe-head FILE]

Prints Markdown tables. Drafts are those of the encoder's CTC head, as they are and with 10 and 20 % of their words
corrupted (replaced, misspelt, left out, or followed by another). Two procedures to compare with accept the same tokens
as the lossless mode, but use less of the draft:

    notebook   the draft as a whole, or else greedy decoding from scratch        (counted, not run)
    paper      the draft's agreeing prefix, then a token a pass                  (run: `realign="none"`)

Tokens are counted without end-of-text, the prefill as one pass. All modes are timed in turn in this process, after a
run that compiles, and the ratio of greedy decoding's time to each mode's is taken within a turn; the median over the
turns is printed.

`--bpe-head` adds an out_llm.safetensors to the checkpoint and compares the drafts of both heads instead, by the kind of
the utterances.
"""

import argparse
import dataclasses
import functools
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).parents[1]))

import granite_jax as gj
from benchmarks.timing import elapsed, measure_in_turns, median_ratios
from granite_jax.convert import convert
from granite_jax.evaluation.heldout import CLIPS
from granite_jax.evaluation.metrics import score
from granite_jax.recognition.speech_lm_programs import Speculation
from granite_jax.text.tasks import instruction
from granite_jax.transcriber import Transcriber, Transcript

CORRUPTED = (0.0, 0.1, 0.2)
MARGIN = 1e-3


ONE_PASS: Any = {"segment_seconds": None, "guards": False}  # drafts are for one pass, and guards would mend texts


@dataclasses.dataclass(frozen=True)
class Speech:
    """Utterances with their transcripts."""

    audio: list[np.ndarray]
    texts: list[str]
    kinds: list[str]


def read_speech(directory: Path, limit: int | None) -> Speech:
    """Reads a directory of audio files and their `*.jsonl`."""
    (index,) = directory.glob("*.jsonl")
    entries = [json.loads(line) for line in index.read_text().splitlines()][:limit]
    audio = [soundfile.read(directory / entry["audio"], dtype="float32")[0] for entry in entries]
    return Speech(audio, [entry["text"] for entry in entries], [entry.get("kind", "all") for entry in entries])


def corrupt(text: str, rate: float, vocabulary: Sequence[str], rng: random.Random) -> str:
    """The text with each word corrupted at this rate."""
    words = []
    for word in text.split():
        if rng.random() >= rate:
            words.append(word)
            continue
        match rng.choice(("replace", "misspell", "leave out", "insert")):
            case "replace":
                words.append(rng.choice(vocabulary))
            case "misspell":
                place = rng.randrange(len(word))
                words.append(word[:place] + rng.choice("abcdefghijklmnopqrstuvwxyz") + word[place + 1 :])
            case "insert":
                words += [word, rng.choice(vocabulary)]
    return " ".join(words)


def margin(asr: Transcriber, params: Any, samples: np.ndarray, tokens: Sequence[int]) -> float:
    """How far the two best logits are apart after these tokens, of the utterance alone and without a cache."""
    length = jnp.array([len(samples)])
    frames = gj.num_frames(length)
    features = gj.log_mel(jnp.asarray(samples)[None], length)
    hidden = gj.encode(asr.config, params, features, frames).hidden
    audio = gj.project(asr.config, params, hidden, frames)
    prompt = asr.template.tokens(asr.tokenizer, instruction())
    ids = [*prompt.prefix, *[asr.config.audio_token_id] * audio.shape[1], *prompt.suffix, *tokens]
    logits, _ = gj.prefill(asr.config, params, jnp.array([ids]), jnp.array([len(ids)]), audio)
    best = jnp.sort(logits[0, -1])
    return float(best[-1] - best[-2])


def first_difference(a: Sequence[int], b: Sequence[int]) -> int:
    """The first place at which two different texts differ, where one of them may end."""
    return next(i for i, (x, y) in enumerate(zip((*a, -1), (*b, -1), strict=False)) if x != y)


def differences(asr: Transcriber, params: Any, speech: Speech, ours: list[Transcript], greedy: list[Transcript]) -> str:
    """How many texts differ from greedy decoding's, and at how many of these the two best logits are no tie."""
    margins = []
    for samples, a, b in zip(speech.audio, ours, greedy, strict=True):
        if a.tokens != b.tokens:
            margins.append(margin(asr, params, samples, b.tokens[: first_difference(a.tokens, b.tokens)]))
    return f"{len(margins)} of {len(ours)} differ, {sum(m > MARGIN for m in margins)} by a margin above {MARGIN}"


def tokens_per_pass(transcripts: list[Transcript], passes: list[int]) -> float:
    """Generated tokens over passes of the language model."""
    return sum(len(t.tokens) for t in transcripts) / max(sum(passes), 1)


def passes_of(transcripts: list[Transcript]) -> list[int]:
    """Passes of the language model over each utterance."""
    return [t.stats["llm_passes"] for t in transcripts]


def notebook_passes(drafts: Sequence[Sequence[int]], greedy: list[Transcript]) -> list[int]:
    """Passes if a draft is accepted as a whole or not at all."""
    return [
        1 if tuple(draft) == t.tokens and t.stats["finish"] == "end" else 1 + t.stats["llm_passes"]
        for draft, t in zip(drafts, greedy, strict=True)
    ]


def throughputs(modes: dict[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Throughput of every mode over that of the first: the median over turns in which each runs once."""
    runs = {name: functools.partial(elapsed, run) for name, run in modes.items()}
    seconds = measure_in_turns(runs, turns)
    return median_ratios({name: [1 / value for value in values] for name, values in seconds.items()})


def compare(ours: Transcriber, paper: Transcriber, params: Any, speech: Speech, turns: int) -> None:
    """Prints modes against drafts."""
    audio, vocabulary = speech.audio, sorted({word for text in speech.texts for word in text.split()})
    greedy = ours.transcribe(audio, speculative=False, **ONE_PASS)
    print("\n| drafts | mode | passes / utterance | tokens / pass | throughput / greedy | WER |")
    print("| --- | --- | --- | --- | --- | --- |")
    notes = []
    for rate in CORRUPTED:
        rng = random.Random(0)
        drafts = [corrupt(t.ctc_text, rate, vocabulary, rng) for t in greedy]
        given = {"draft": drafts} if rate else {}
        modes = {
            "greedy": lambda: ours.transcribe(audio, speculative=False, **ONE_PASS),
            "paper": lambda given=given: paper.transcribe(audio, **given, **ONE_PASS),
            "lossless": lambda given=given: ours.transcribe(audio, **given, **ONE_PASS),
        }
        if not rate:  # relaxed modes take no drafts but the encoder's own
            modes |= {
                name: lambda name=name: ours.transcribe(audio, speculative=name, **ONE_PASS)
                for name in ("relaxed-accurate", "relaxed-fast")
            }
        found = {name: run() for name, run in modes.items()}
        speed = throughputs(modes, turns)
        passes = {name: passes_of(transcripts) for name, transcripts in found.items()}
        found["notebook"] = greedy
        passes["notebook"] = notebook_passes([ours.tokenizer.encode(text) for text in drafts], greedy)
        for name in ("greedy", "notebook", *list(modes)[1:]):
            error = score(speech.texts, [t.text for t in found[name]]).wer
            ratio = f"{speed[name]:.2f}" if name in speed else ""
            each = sum(passes[name]) / len(audio)
            saved = tokens_per_pass(found[name], passes[name])
            print(f"| {rate:.0%} corrupted | {name} | {each:.2f} | {saved:.2f} | {ratio} | {error} |", flush=True)
        notes += [
            f"{rate:.0%}, {name}: {differences(ours, params, speech, found[name], greedy)}"
            for name in ("paper", "lossless")
        ]
        routes = [t.stats["route"] for name in ("relaxed-accurate", "relaxed-fast") for t in found.get(name, [])]
        if routes:
            half = len(routes) // 2
            notes += [
                f"{name}: "
                + ", ".join(f"{route} {part.count(route)}" for route in ("ctc", "verified", "resumed", "greedy"))
                for name, part in (("relaxed-accurate", routes[:half]), ("relaxed-fast", routes[half:]))
            ]
    print("\n" + "\n".join(f"- {note}" for note in notes))


def sweep(make: Callable[[Speculation], Transcriber], speech: Speech, turns: int) -> None:
    """Prints windows."""
    settings = [Speculation(window) for window in (2, 4, 8, 16)]
    transcribers = {setting: make(setting) for setting in settings}
    audio, vocabulary = speech.audio, sorted({word for text in speech.texts for word in text.split()})
    greedy = transcribers[settings[0]].transcribe(audio, speculative=False, **ONE_PASS)
    print("\n| window | " + " | ".join(f"tokens / pass, {rate:.0%}" for rate in CORRUPTED) + " | throughput / greedy |")
    print("| --- |" + " --- |" * (len(CORRUPTED) + 1))
    for setting, asr in transcribers.items():
        columns = []
        for rate in CORRUPTED:
            rng = random.Random(0)
            drafts = [corrupt(t.ctc_text, rate, vocabulary, rng) for t in greedy]
            found = asr.transcribe(audio, draft=drafts, **ONE_PASS)
            columns.append(f"{tokens_per_pass(found, passes_of(found)):.2f}")
        modes = {
            "greedy": lambda asr=asr: asr.transcribe(audio, speculative=False, **ONE_PASS),
            "lossless": lambda asr=asr: asr.transcribe(audio, **ONE_PASS),
        }
        for run in modes.values():
            run()
        columns.append(f"{throughputs(modes, turns)['lossless']:.2f}")
        print(f"| {setting.window} | {' | '.join(columns)} |", flush=True)


def compare_heads(checkpoint: str, head: Path, speech: Speech, batch: int) -> None:
    """Prints the drafts of both heads and what they save, for every kind of utterance."""
    with tempfile.TemporaryDirectory() as directory:
        convert(checkpoint, Path(directory) / "hf")
        shutil.copyfile(head, Path(directory) / "hf" / "out_llm.safetensors")
        asr = Transcriber.from_pretrained(Path(directory) / "hf", dtype="float32", batch_size=batch)
        greedy = asr.transcribe(speech.audio, speculative=False, **ONE_PASS)
        print("\n| utterances | drafts | WER of the drafts | accepted | passes / utterance | tokens / pass | differ |")
        print("| --- | --- | --- | --- | --- | --- | --- |")
        drafted = {name: asr.transcribe(speech.audio, draft_from=name, **ONE_PASS) for name in ("ctc", "bpe")}
        for kind in dict.fromkeys(speech.kinds):
            rows = [i for i, other in enumerate(speech.kinds) if other == kind]
            references = [speech.texts[i] for i in rows]
            for name, found in [("none", greedy), *drafted.items()]:
                chosen = [found[i] for i in rows]
                drafts = [asr.tokenizer.decode(t.draft) for t in chosen]
                error = score(references, drafts).wer if name != "none" else ""
                share = sum(t.stats["accepted_tokens"] for t in chosen) / sum(len(t.tokens) for t in chosen)
                passes = passes_of(chosen)
                differ = sum(t.tokens != greedy[i].tokens for i, t in zip(rows, chosen, strict=True))
                print(f"| {kind}, {len(rows)} | {name} | {error} | {share:.0%} | {sum(passes) / len(rows):.2f} "
                      f"| {tokens_per_pass(chosen, passes):.2f} | {differ} |", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="demo")
    parser.add_argument("--audio", type=Path, default=CLIPS)
    parser.add_argument("--limit", type=int, help="utterances; default all")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5, help="of timing")
    parser.add_argument("--sweep", action="store_true", help="windows instead of modes")
    parser.add_argument("--bpe-head", type=Path, help="heads instead of modes")
    args = parser.parse_args()
    speech = read_speech(args.audio, args.limit)
    checkpoint = Transcriber.from_pretrained(args.checkpoint, dtype="float32", batch_size=args.batch)
    _, params = gj.load(args.checkpoint, dtype="float32")

    def make(speculation: Speculation) -> Transcriber:
        return Transcriber(
            checkpoint.config,
            params,
            checkpoint.tokenizer,
            template=checkpoint.template,
            capabilities=checkpoint.capabilities,
            batch_size=args.batch,
            speculation=speculation,
        )

    seconds = sum(len(samples) for samples in speech.audio) / 16_000
    print(f"{len(speech.audio)} utterances, {seconds:.0f} s, {args.checkpoint}, float32, batch {args.batch}, "
          f"{jax.devices()[0].device_kind}")  # fmt: skip
    if args.bpe_head:
        compare_heads(args.checkpoint, args.bpe_head, speech, args.batch)
    elif args.sweep:
        sweep(make, speech, args.turns)
    else:
        compare(make(Speculation()), make(Speculation(realign="none")), params, speech, args.turns)


if __name__ == "__main__":
    main()
