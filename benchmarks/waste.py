"""What is computed but not needed: work of the engine's batches against the work of the audio alone.

    python benchmarks/waste.py [--batch 64] [--durations FILE] [--format json]

Runs the engine's own batching on lists of durations, with stand-ins for the programs that compute nothing: they record
what the real programs would compute for each batch, by the same packing. No weights are needed. The model is the
released granite-4.0-1b-speech. Texts have 3.2 tokens a second, drafts are right.

    librispeech   2,620 durations of a gamma distribution (shape 2.2, scale 3.37 s), clipped to 1.3 to 35 s
    segments      1,000 of 15 to 30 s, as recordings are cut into
    mixed         1,000 of a log-normal distribution (median 3.3 s), from words to half a minute

The minimum of each count is that of the audio alone: its own frames, windows, prompt and draft positions, and pairs of
a query and a key; a decode step reads the weights and the filled slots of rows that still decode. FLOPs are counted by
`granite_jax.models.granite_speech.work`, which is tested against the compiler's own count.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from granite_jax.audio.load import Audio
from granite_jax.decoding import Draft
from granite_jax.engine.scheduler import Scheduler
from granite_jax.engine.sharding import DeviceMesh
from granite_jax.engine.stages import Reply
from granite_jax.keywords.spotter import no_scores
from granite_jax.models import granite_speech
from granite_jax.models.granite_speech import work
from granite_jax.models.granite_speech.config import Config
from granite_jax.models.granite_speech.functions import LOGIT_ROWS
from granite_jax.models.layers.decoder import KVCache
from granite_jax.models.layers.features import num_frames
from granite_jax.models.layers.packed.decoder import first_chunk_of_keys
from granite_jax.models.layers.packed.encoder import Blocks, window_groups
from granite_jax.models.layers.packed.packing import Packing
from granite_jax.models.registry import model_of, release
from granite_jax.recognition.buckets import default_buckets, new_token_budget
from granite_jax.recognition.encoding import Encoded
from granite_jax.recognition.recognizer import make_request
from granite_jax.recognition.speech_lm import SpeechLM
from granite_jax.recognition.utterances import Utterance
from granite_jax.text.chat_template import PromptTokens
from granite_jax.waveform import SAMPLING_RATE

MODEL = "granite-4.0-1b-speech"
TOKENS_PER_SECOND = 3.2
PROMPT = PromptTokens((1,) * 4, (2,) * 18)  # as many text tokens as the released model's prompt for transcripts has
DTYPE_BYTES = 2  # bfloat16
SHOWN = {
    "encoder": "frames",
    "projector": "windows",
    "prefill": "positions",
    "flops": "flops",
    "cache_bytes": "decode_bytes",
    "row_steps": "row_steps",
}
"""Counts that are printed, and their names there."""


@dataclasses.dataclass
class Count:
    """Work of some batches, or the least that their audio needs."""

    frames: float = 0
    windows: float = 0
    positions: float = 0
    row_steps: float = 0
    decode_bytes: float = 0
    encode_flops: float = 0
    project_flops: float = 0
    prefill_flops: float = 0

    def __add__(self, other: "Count") -> "Count":
        fields = (field.name for field in dataclasses.fields(self))
        return Count(**{name: getattr(self, name) + getattr(other, name) for name in fields})

    @property
    def flops(self) -> float:
        """FLOPs of encoder, projector and prefill."""
        return self.encode_flops + self.project_flops + self.prefill_flops


@dataclasses.dataclass(frozen=True)
class Result:
    """What was computed for a list, what it needs, and in how many batches of how many shapes."""

    computed: Count
    needed: Count
    batches: int
    shapes: int

    def ratios(self) -> dict[str, float]:
        """Computed / needed of every count."""
        names = [field.name for field in dataclasses.fields(Count)]
        return {name: getattr(self.computed, name) / getattr(self.needed, name) for name in [*names, "flops"]}


class CountingPrograms:
    """Stands in for `SpeechLMPrograms`: returns arrays of the right shapes, counts what would have been computed."""

    align = None  # no words are timed

    def __init__(self, config: Config):
        self.config, self.model = config, model_of(config, "speech-lm")
        self.devices = DeviceMesh.make(jax.devices()[:1])
        self.computed = Count()
        self.live_bytes = 0.0  # of the same decode steps, with the slots of unfinished rows alone
        self.batches = 0
        self.shapes: set[tuple[int, ...]] = set()

    def encode(self, params: Any, samples: np.ndarray, lengths: np.ndarray, *_: Any, with_logits: bool) -> Encoded:
        """Counts a batch of the encoder and the projector."""
        rows, longest = len(lengths), num_frames(samples.shape[1])
        self.batches += 1
        self.shapes.add(samples.shape)
        frames, blocks, groups = map(int, _encoder_loops(self.config, jnp.asarray(lengths), longest))
        self.computed += Count(
            frames=frames,
            windows=groups,
            encode_flops=work.encode(self.config, frames, blocks),
            project_flops=work.project(self.config, groups),
        )
        labels = np.zeros((rows, longest), np.int32)
        zeros = np.zeros(rows, np.float32)
        scores = jax.device_get(no_scores(jnp.asarray(lengths)))
        return Encoded(zeros, labels, zeros, scores, None, zeros, None)  # pyright: ignore[reportArgumentType]

    def prefill(
        self,
        params: Any,
        tokens: np.ndarray,
        lengths: np.ndarray,
        audio: Any,
        draft: Draft,
        automata: Any,
        capacity: int,
    ) -> tuple[np.ndarray, KVCache]:
        """Counts a batch of the prefill; returns its rows' draft lengths, and a cache without slots."""
        drafted = np.asarray(draft.lengths)
        longest = min(tokens.shape[1] + draft.tokens.shape[1], capacity)
        positions, pairs = map(int, _prefill_loops(jnp.asarray(lengths + drafted), longest))
        columns = max(1, LOGIT_ROWS // len(lengths))
        logits = len(lengths) * math.ceil((drafted.max() + 1) / columns) * columns
        self.computed += Count(positions=positions, prefill_flops=work.prefill(self.config, positions, pairs, logits))
        empty: Any = np.zeros((1, len(lengths), 1, capacity, 0))
        return drafted, KVCache(empty, empty, lengths)  # pyright: ignore[reportArgumentType]

    def decode(self, params: Any, drafted: np.ndarray, cache: KVCache, draft: Draft, *_: Any, **__: Any) -> Any:
        """Counts the steps of greedy decoding of a batch: the prefill writes the first token of each row."""
        rows = len(drafted)
        for step in range(drafted.max()):
            longest = np.where(drafted > step, cache.lengths + step, 0).max()
            slots = rows * min(size for size in cache.prefixes if size >= longest)
            self.computed += Count(row_steps=rows, decode_bytes=work.decode_bytes(self.config, DTYPE_BYTES, slots))
            live = np.where(drafted > step, cache.lengths + step, 0).sum()
            self.live_bytes += work.decode_bytes(self.config, DTYPE_BYTES, live)
        none, tokens = np.zeros(rows, np.int32), np.ones((rows, max(1, drafted.max())), np.int32)
        return SimpleNamespace(
            tokens=tokens, log_probs=np.zeros((rows, tokens.shape[1] + 1), np.float32), draft_positions=tokens * 0,
            num_tokens=drafted, num_forward_passes=none + 1, num_accepted=drafted, ended=none == 0, draft=draft,
        )  # fmt: skip


@functools.partial(jax.jit, static_argnums=(0, 2))
def _encoder_loops(config: Config, lengths: jax.Array, longest: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Frames, attention blocks and projector windows that are computed for rows of these samples."""
    packing = granite_speech.pack_frames(config, num_frames(lengths), longest)
    blocks = Blocks.of(packing, config.encoder.context_size)
    group, num_groups = window_groups(packing, config.projector.window_size)
    return packing.computed, blocks.num_groups * blocks.group, group * num_groups


@functools.partial(jax.jit, static_argnums=1)
def _prefill_loops(lengths: jax.Array, longest: int) -> tuple[jax.Array, jax.Array]:
    """Positions, and pairs of a query and a key, that are computed for rows of these lengths."""
    packing = Packing.of(lengths, longest)

    def pairs(start: jax.Array, total: jax.Array) -> jax.Array:
        chunks = start // packing.chunk + 1 - first_chunk_of_keys(packing, start)
        return total + chunks * packing.chunk**2

    return packing.computed, packing.for_chunks(pairs, jnp.int32(0))


def needed(config: Config, seconds: float) -> Count:
    """The least that one utterance needs, but for the weights that its batch reads in each step."""
    frames = num_frames(int(seconds * SAMPLING_RATE))
    windows = math.ceil(frames / config.projector.window_size)
    prompt = windows * config.projector.num_queries + len(PROMPT.prefix) + len(PROMPT.suffix)
    draft = _tokens(seconds)
    positions = prompt + draft
    blocks = frames / config.encoder.context_size  # a part-filled block needs a part of the work, at least
    return Count(
        frames=frames,
        windows=windows,
        positions=positions,
        row_steps=draft,
        encode_flops=work.encode(config, frames, blocks),
        project_flops=work.project(config, windows),
        prefill_flops=work.prefill(config, positions, positions * (positions + 1) / 2, draft + 1),
    )


def _tokens(seconds: float) -> int:
    return max(1, round(TOKENS_PER_SECOND * seconds))


def run(config: Config, durations: Sequence[float], batch: int) -> Result:
    """Work of a list, in its order."""
    programs = CountingPrograms(config)
    tokenizer: Any = SimpleNamespace(encode=lambda text: [], decode=lambda tokens: "text")
    nothing = SimpleNamespace(start=lambda *_: None, wait=lambda *_: None)
    stand_ins: Any = {"programs": programs, "tokenizer": tokenizer, "compiler": nothing}
    recognizer = SpeechLM(config, None, buckets=default_buckets(config, batch), **stand_ins)
    scheduler = Scheduler(programs.devices.replicas, batch, clock=lambda: 0.0)  # rows are not due by time
    is_done = [False] * len(durations)

    def reply(number: int, result: Reply) -> None:
        if result.error is not None:
            raise result.error
        is_done[number] = True

    with scheduler.expecting():  # part-filled batches wait while more comes
        for number, seconds in enumerate(durations):
            audio = Audio(str(number), np.zeros(int(seconds * SAMPLING_RATE), np.float32))
            draft = (3,) * _tokens(seconds)
            utterance = Utterance(audio, prompt=PROMPT, max_new_tokens=new_token_budget(seconds), draft=draft)
            request = make_request(recognizer, utterance)
            if request is None:
                raise ValueError(f"{seconds:g} s fit no bucket")
            scheduler.submit(request, functools.partial(reply, number))
            if scheduler.num_unfinished >= 2 * scheduler.read_ahead:  # as a Transcriber, whose results come in order
                first = number + 1 - scheduler.num_unfinished
                while not is_done[first]:
                    scheduler.advance()
    while scheduler.has_work:
        scheduler.advance()
    least = sum((needed(config, seconds) for seconds in durations), Count(decode_bytes=programs.live_bytes))
    return Result(programs.computed, least, programs.batches, len(programs.shapes))


def lists(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """The durations in seconds."""
    return {
        "librispeech": np.clip(rng.gamma(2.2, 3.37, 2620), 1.3, 35),
        "segments": rng.uniform(15, 30, 1000),
        "mixed": np.clip(np.exp(rng.normal(1.2, 0.7, 1000)), 0.6, 30),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--durations", type=Path, help="text file of seconds, one a line, in place of the lists")
    parser.add_argument("--format", choices=("txt", "json"), default="txt")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    named = lists(rng)
    if arguments.durations:
        named = {arguments.durations.stem: np.loadtxt(arguments.durations, ndmin=1)}
    config = release(MODEL).config
    if arguments.format == "txt":
        print(f"{MODEL}, batch {arguments.batch}, bfloat16: computed / needed\n")
        print("| list | order | batches | shapes | " + " | ".join(SHOWN) + " |")
        print("| --- " * (4 + len(SHOWN)) + "|")
    for name, durations in named.items():
        for order, listed in (("sorted", np.sort(durations)), ("shuffled", rng.permutation(durations))):
            result = run(config, listed.tolist(), arguments.batch)
            found = {shown: round(result.ratios()[count], 3) for shown, count in SHOWN.items()}
            line = {"list": name, "order": order, "batches": result.batches, "shapes": result.shapes, **found}
            if arguments.format == "json":
                print(json.dumps(line), flush=True)
            else:
                print("| " + " | ".join(map(str, line.values())) + " |", flush=True)


if __name__ == "__main__":
    main()
