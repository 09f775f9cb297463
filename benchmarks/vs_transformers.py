"""How fast this is beside `transformers` on the machine at hand: the same weights, audio, prompt and new tokens.

    python benchmarks/vs_transformers.py [--model demo random] [--batch 1 8] [--turns 5] [--clips 32] [--format json]
    python benchmarks/vs_transformers.py --profile       # where the time goes, stage by stage

Needs torch, torchaudio and transformers 5.8.1, which `make parity` installs. Both compute in float32 on the CPU, with
as many threads as there are cores. `transformers` is GraniteSpeechForConditionalGeneration as it comes, with its
processor and `generate`. Both are given waveforms in memory, sort them by length, and return texts.

    demo      the embedded checkpoint, exported by `granite-jax convert`
    random    160 million random parameters in the proportions of granite-4.0-1b-speech, but with the vocabulary of
              tests/hf_fixture.py, of about 300 tokens; it writes 16 tokens, because end-of-text is never the best

Modes of this program, each against `transformers` with greedy decoding:

    greedy             without drafts
    lossless           with drafts of the CTC head; those of the random model are noise, the worst that drafts can be
    verified drafts    the draft is the answer, so that one pass accepts it: the best that drafts can be

Everything runs once to compile and then in turns within this process. The ratio of the times is taken within a turn,
and its median and range over the turns are printed. The rates are of this machine alone. "Differ" counts texts that are
not those of `transformers` for single clips, and in brackets those of them where the two best logits are more than 1e-3
apart. `transformers` itself differs in batches, because its encoder has no mask for padding.
"""

import argparse
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np
import torch
import transformers
from hf_fixture import (  # pyright: ignore[reportMissingImports]
    make_tokenizer,
    random_tensors,
    write_random_checkpoint,
    write_tensors,
)

import granite_jax as gj
from benchmarks.speculation import MARGIN, ONE_PASS, first_difference, margin, read_speech
from benchmarks.stages import Measures, own_stages
from benchmarks.timing import elapsed, measure_in_turns
from granite_jax.convert import convert
from granite_jax.evaluation.heldout import CLIPS

RATE = 16_000
BASELINE = "transformers"
NEW_TOKENS = {"demo": 200, "random": 16}
# The letters that the tokenizer of tests/hf_fixture.py never joins: a text encodes to the tokens that it was made of.
LETTERS = "BCDGHJLMOPQVWXYZ"
# fmt: off
RANDOM: dict[str, Any] = {
    "encoder_config": {"num_layers": 8, "hidden_dim": 512, "num_heads": 8, "dim_head": 64, "feedforward_mult": 4,
                       "context_size": 200, "max_pos_emb": 512},
    "projector_config": {"hidden_size": 512, "encoder_hidden_size": 512, "num_attention_heads": 8,
                         "intermediate_size": 2048},
    "text_config": {"hidden_size": 1024, "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 4,
                    "head_dim": 128, "intermediate_size": 2048, "attention_multiplier": 0.0078125,
                    "max_position_embeddings": 4096},
}
# fmt: on

Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Generated:
    """What `transformers` writes for one clip."""

    text: str
    tokens: Tokens


@dataclasses.dataclass(frozen=True)
class Measured:
    """A mode of this program beside `transformers`.

    Fields:
      ratio: times as fast, the median over turns.
      ratio_range: the least and the most of a turn.
      rate, reference_rate: seconds of audio a second, of this program and of `transformers`.
      differ, differ_by_margin: texts that are not those of `transformers` for single clips, of all and of those that
        are no ties.
      reference_differ: texts of `transformers` in batches that are not its own for single clips.
      passes: of the language model, for each utterance.
    """

    model: str
    batch: int
    mode: str
    ratio: float
    ratio_range: tuple[float, float]
    rate: float
    reference_rate: float
    differ: int
    differ_by_margin: int
    reference_differ: int
    passes: float


class Reference:
    """A Hugging Face checkpoint as `transformers` runs it."""

    def __init__(self, directory: Path, max_new_tokens: int):
        load = transformers.GraniteSpeechForConditionalGeneration.from_pretrained
        self.model: Any = load(directory, dtype=torch.float32).eval()
        config = self.model.config
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(directory, padding_side="left")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(config.text_config.eos_token_id)
        self.extract = transformers.GraniteSpeechFeatureExtractor(
            projector_window_size=config.window_size, projector_downsample_rate=config.downsample_rate
        )
        self.processor = transformers.GraniteSpeechProcessor(self.extract, self.tokenizer)
        self.max_new_tokens = max_new_tokens

    def inputs(self, audio: Sequence[np.ndarray], instruction: str) -> Any:
        """Prompts and features of a batch."""
        turn = [{"role": "user", "content": f"<|audio|>{instruction}"}]
        prompt = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        waveforms = [torch.from_numpy(samples) for samples in audio]
        return self.processor([prompt] * len(audio), waveforms, return_tensors="pt")

    @torch.inference_mode()
    def generate(self, audio: Sequence[np.ndarray], instruction: str) -> list[Generated]:
        """Greedy texts of one batch."""
        inputs = self.inputs(audio, instruction)
        rows = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        rows = rows[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        ends = {self.model.config.text_config.eos_token_id, self.model.config.text_config.pad_token_id}
        return [
            Generated(text.strip(), tuple(token for token in row if token not in ends))
            for text, row in zip(texts, rows.tolist(), strict=True)
        ]

    def transcribe(self, audio: Sequence[np.ndarray], instruction: str, batch: int) -> list[Generated]:
        """Greedy texts in batches of clips of similar length, in the order of the clips."""
        order = sorted(range(len(audio)), key=lambda index: len(audio[index]))
        texts: dict[int, Generated] = {}
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            texts |= zip(rows, self.generate([audio[index] for index in rows], instruction), strict=True)
        return [texts[index] for index in range(len(audio))]


def write_random(directory: Path) -> None:
    """Writes the random model. It writes `LETTERS` alone: the output head's rows of all other tokens are zero."""
    config = write_random_checkpoint(directory, **RANDOM)
    tensors = random_tensors(config, 0)
    tokenizer = make_tokenizer()
    written = [tokenizer.token_to_id(letter) for letter in LETTERS]
    head = tensors["language_model.lm_head.weight"]
    head[np.setdiff1d(np.arange(len(head)), written)] = 0
    write_tensors(directory, tensors)


def write_checkpoint(model: str, directory: Path) -> None:
    """Writes a model in Hugging Face format."""
    if model == "demo":
        convert("demo", directory)
    else:
        write_random(directory)


def count_differences(
    asr: gj.Transcriber,
    params: Callable[[], Any],
    audio: Sequence[np.ndarray],
    ours: Sequence[Any],
    theirs: Sequence[Any],
) -> tuple[int, int]:
    """How many texts differ, and how many of these where the two best logits are no tie."""
    pairs = [(x, a.tokens, b.tokens) for x, a, b in zip(audio, ours, theirs, strict=True) if a.tokens != b.tokens]
    margins = [margin(asr, params(), samples, b[: first_difference(a, b)]) for samples, a, b in pairs]
    return len(pairs), sum(value > MARGIN for value in margins)


def compare(
    model: str, directory: Path, reference: Reference, audio: list[np.ndarray], batch: int, turns: int
) -> Iterator[Measured]:
    """Measures all modes of this program in turn with `transformers`."""
    asr = gj.Transcriber.from_pretrained(directory, dtype="float32", batch_size=batch)
    params = functools.cache(lambda: gj.load(directory, dtype="float32")[1])
    instruction = asr.capabilities.prompts.transcribe
    ours = functools.partial(asr.transcribe, audio, max_new_tokens=reference.max_new_tokens, **ONE_PASS)
    runs: dict[str, Callable[[], list[Any]]] = {
        BASELINE: lambda: reference.transcribe(audio, instruction, batch),
        "greedy": lambda: ours(speculative=False),
        "lossless": ours,
    }
    texts = {name: run() for name, run in runs.items()}
    if model == "random":
        answers = [transcript.text for transcript in texts["greedy"]]
        runs["verified drafts"] = lambda: ours(draft=answers)
        texts["verified drafts"] = runs["verified drafts"]()
    alone = texts[BASELINE] if batch == 1 else reference.transcribe(audio, instruction, 1)
    measured = measure_in_turns({name: functools.partial(elapsed, run) for name, run in runs.items()}, turns)
    total = sum(map(len, audio)) / RATE
    for mode in list(runs)[1:]:
        ratios = [theirs / own for theirs, own in zip(measured[BASELINE], measured[mode], strict=True)]
        differ, differ_by_margin = count_differences(asr, params, audio, texts[mode], alone)
        yield Measured(
            model,
            batch,
            mode,
            statistics.median(ratios),
            (min(ratios), max(ratios)),
            total / statistics.median(measured[mode]),
            total / statistics.median(measured[BASELINE]),
            differ,
            differ_by_margin,
            sum(a.tokens != b.tokens for a, b in zip(texts[BASELINE], alone, strict=True)),
            statistics.mean(transcript.stats["llm_passes"] for transcript in texts[mode]),
        )


def reference_stages(reference: Reference, audio: list[np.ndarray], instruction: str, steps: int) -> Measures:
    """The stages of `transformers` for one batch."""
    model, extract = reference.model, reference.extract
    inputs = reference.inputs(audio, instruction)
    waveforms = [torch.from_numpy(samples) for samples in audio]

    def prefill() -> Any:
        # Without features, so that the encoder is not run again: another embedding is in the place of the audio's.
        prompts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return model(**prompts, use_cache=True, logits_to_keep=1)

    def decode(output: Any) -> None:
        mask = inputs["attention_mask"]
        for _ in range(steps):
            best, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            mask = torch.cat([mask, torch.ones_like(best)], dim=1)
            output = model(input_ids=best, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def timed_decode() -> float:
        output = prefill()
        return elapsed(lambda: decode(output))

    return {
        "log-mel": lambda: elapsed(lambda: extract(waveforms)),
        "encoder, projector": lambda: elapsed(lambda: model.get_audio_features(inputs["input_features"])),
        "prefill": lambda: elapsed(prefill),
        f"decode, {steps} steps": timed_decode,
        "all": lambda: elapsed(lambda: reference.generate(audio, instruction)),
    }


@torch.inference_mode()
def profile(
    model: str, directory: Path, reference: Reference, audio: list[np.ndarray], batch: int, turns: int
) -> Iterator[dict[str, Any]]:
    """Measures the stages of both sides in turn for the batch of middle length, in seconds."""
    asr = gj.Transcriber.from_pretrained(directory, dtype="float32", batch_size=batch)
    _, params = gj.load(directory, dtype="float32")
    start = max(0, (len(audio) - batch) // 2)
    chosen = sorted(audio, key=len)[start : start + batch]
    instruction = asr.capabilities.prompts.transcribe
    steps = max(len(row.tokens) for row in reference.generate(chosen, instruction)) - 1
    theirs = reference_stages(reference, chosen, instruction, steps)
    ours = own_stages(asr, params, chosen, reference.max_new_tokens, steps)
    measures = {
        f"{side} {name}": run for name in ours for side, run in ((BASELINE, theirs[name]), ("ours", ours[name]))
    }
    for run in measures.values():
        run()
    medians = {name: statistics.median(times) for name, times in measure_in_turns(measures, turns).items()}
    sides = {side: with_rest({name: medians[f"{side} {name}"] for name in ours}) for side in (BASELINE, "ours")}
    for name in sides["ours"]:
        seconds = {side: stages[name] for side, stages in sides.items()}
        yield {"model": model, "batch": batch, "stage": name, **seconds, "longest": len(chosen[-1]) / RATE}


def with_rest(stages: Mapping[str, float]) -> dict[str, float]:
    """Adds the time that is in "all" but in none of the other stages."""
    parts = {name: seconds for name, seconds in stages.items() if name != "all"}
    return {**parts, "the rest": stages["all"] - sum(parts.values()), "all": stages["all"]}


def modes_table(rows: Sequence[Measured]) -> Iterator[str]:
    """Markdown of the comparison."""
    yield (
        "| model | batch | mode | times as fast (range) | s of audio / s | of transformers | passes / utterance "
        "| differ | transformers' differ |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        low, high = row.ratio_range
        yield (
            f"| {row.model} | {row.batch} | {row.mode} | {row.ratio:.2f} ({low:.2f} to {high:.2f}) | {row.rate:.1f} "
            f"| {row.reference_rate:.1f} | {row.passes:.2f} | {row.differ} ({row.differ_by_margin}) "
            f"| {row.reference_differ} |"
        )


def stages_table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Markdown of the profile."""
    yield "| model | batch | longest clip, s | stage | transformers, ms | granite_jax, ms | times as fast |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        theirs, ours = row[BASELINE], row["ours"]
        ratio = f"{theirs / ours:.2f}" if row["stage"] != "the rest" else ""
        yield (
            f"| {row['model']} | {row['batch']} | {row['longest']:.1f} | {row['stage']} | {1e3 * theirs:.1f} "
            f"| {1e3 * ours:.1f} | {ratio} |"
        )


def read_clips(count: int) -> list[np.ndarray]:
    """Held-out clips of all kinds."""
    audio = read_speech(CLIPS, None).audio
    return audio[:: max(1, len(audio) // count)][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=NEW_TOKENS, default=list(NEW_TOKENS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--turns", type=int, default=5, help="of timing")
    parser.add_argument("--clips", type=int, default=32, help="held-out clips, at most 300")
    parser.add_argument("--format", choices=("txt", "json"), default="txt")
    parser.add_argument("--profile", action="store_true", help="stages instead of modes")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    transformers.logging.set_verbosity_error()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    audio = read_clips(args.clips)
    about = {
        "clips": len(audio),
        "seconds": round(sum(map(len, audio)) / RATE, 1),
        "turns": args.turns,
        "threads": threads,
        "jax": jax.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    rows: list[Any] = []
    for model in args.model:
        with tempfile.TemporaryDirectory() as parent:
            directory = Path(parent) / "hf"
            write_checkpoint(model, directory)
            reference = Reference(directory, NEW_TOKENS[model])
            about[f"{model} parameters"] = sum(parameter.numel() for parameter in reference.model.parameters())
            measure = profile if args.profile else compare
            for batch in args.batch:
                rows += measure(model, directory, reference, audio, batch, args.turns)
    if args.format == "json":
        print(json.dumps({**about, "rows": [dataclasses.asdict(row) if not args.profile else row for row in rows]}))
        return
    print(", ".join(f"{name} {value}" for name, value in about.items()) + "\n")
    print("\n".join(stages_table(rows) if args.profile else modes_table(rows)))


if __name__ == "__main__":
    main()
