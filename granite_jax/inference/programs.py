"""The compiled programs of inference, each a jitted function of (params, inputs).

    encode    waveforms, CTC labels of keywords -> audio embeddings, best labels of the CTC heads, keyword scores
                                                              on shapes (batch, samples)
    prefill   prompts, audio embeddings, drafts, keyword automata -> verifier output, KV cache
                                                              on shapes (batch, prompt, draft, capacity)
    decode    verifier output, KV cache, drafts, keyword automata -> tokens
                                                              on shapes (batch, draft, capacity, output)
    align     CTC logits, labels of texts -> the frames of every label
                                                              on shapes (batch, samples)

A `Bucket` fixes all of these shapes, so there are at most five compilations per bucket, with and without drafts and
keywords: their arrays have a fixed size, of which only the filled part is computed. `encode` has two forms, because the
logits are big and only `align` needs them: where no words are timed, three programs per bucket remain.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int

from granite_jax import decoding
from granite_jax.array_types import AudioEmbeddings, CTCLogits, Lengths, Params, Samples, Tokens
from granite_jax.decoding import DecodeState, Draft, DraftProposal, VerifierOutput
from granite_jax.errors import GraniteError
from granite_jax.inference.sharding import BATCH, REPLICATED, DeviceMesh
from granite_jax.keywords import spotter
from granite_jax.keywords.automaton import BatchedAutomata
from granite_jax.keywords.selector import KeywordSelector
from granite_jax.keywords.spotter import KeywordBatch, SpottingScores
from granite_jax.model import ctc, granite_speech
from granite_jax.model.bpe_head import Importance
from granite_jax.model.config import Config
from granite_jax.model.ctc_alignment import Alignment, align
from granite_jax.model.decoder import KVCache
from granite_jax.model.features import num_frames, packed_log_mel
from granite_jax.model.packed_encoder import pack_frames

_TILE = 16  # slots of a bfloat16 tile: unless the capacity is a multiple, the TPU compiler copies the cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoded:
    """The encode program's results for a batch.

    Fields:
      audio: audio embeddings `[b, a, e]`.
      labels: best CTC label of every frame, int32, blank past the row's end.
      entropy: float32, the largest entropy of a valid frame's labels, in nats.
      spotting: the keywords with the best scores.
      bpe_labels: best label of the BPE head for every window of four frames, int32, blank past the row's end and in
        rows that did not ask for them; None without such a head.
      speech_frames: int32, the valid frames in which characters have more than a fifth of the probability.
      logits: CTC logits, float32, if they were asked for.
    """

    audio: AudioEmbeddings
    labels: Int[Array, "b t"]
    entropy: Float[Array, "b"]
    spotting: SpottingScores
    bpe_labels: Int[Array, "b w"] | None
    speech_frames: Int[Array, "b"]
    logits: CTCLogits | None


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How drafts are made and proposed.

    Fields:
      window: draft tokens proposed in one decode step.
      realign: name of the rule in `decoding.REALIGN` that finds where the draft goes on after a rejection.
      importance: which activations the BPE head's weights of frames come from, as in `model.bpe_head`. Nothing
        published says which one the released heads were trained with.
    """

    window: int = decoding.WINDOW
    realign: str = "nearest"
    importance: Importance = "before"

    def __post_init__(self):
        if self.window < 0 or self.realign not in decoding.REALIGN:
            raise GraniteError(f"{self}: window is 0 or more, realign one of {', '.join(decoding.REALIGN)}")
        if self.importance not in ("before", "after"):
            raise GraniteError(f'importance is "before" or "after", not {self.importance!r:.60}')


class Programs:
    """The programs of one configuration, and for each of their traces the type of every array, by argument."""

    def __init__(
        self,
        config: Config,
        dtype: DTypeLike,
        speculation: Speculation | None = None,
        devices: DeviceMesh | None = None,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.speculation = speculation or Speculation()
        self.traces: dict[str, list[dict[str, str]]] = {name: [] for name in ("encode", "prefill", "decode", "align")}
        self.devices = devices or DeviceMesh.make(jax.devices()[:1])
        cache = KVCache(*[PartitionSpec(None, *BATCH)] * 2, lengths=BATCH)  # pyright: ignore[reportArgumentType]
        fields = {field.name: BATCH for field in dataclasses.fields(DecodeState)}
        state = DecodeState(**fields | {"cache": cache})  # pyright: ignore[reportArgumentType]
        tables = {field.name: REPLICATED for field in dataclasses.fields(BatchedAutomata)}
        keywords = BatchedAutomata(**tables | {"starts": BATCH})  # pyright: ignore[reportArgumentType]
        compiled = self.devices.compile
        self.encode = compiled(self._counted(self._encode), (REPLICATED, *[BATCH] * 4), BATCH, static="with_logits")
        self.result_shardings = {
            "encode": self.devices.result_shardings(BATCH),
            "prefill": self.devices.result_shardings((BATCH, cache)),
        }
        prompts = (REPLICATED, BATCH, BATCH, BATCH, BATCH, keywords)
        self.prefill = compiled(self._counted(self._prefill), prompts, (BATCH, cache), static="capacity")
        drafts = (REPLICATED, BATCH, cache, BATCH, BATCH, BATCH, keywords)
        self.decode = compiled(self._counted(self._decode), drafts, state, static="max_out_length", donate=2)
        self.align = compiled(self._counted(self._align), [BATCH] * 4, BATCH)

    def _counted(self, function: Callable) -> Callable:
        signature, traces = inspect.signature(function), self.traces[function.__name__.strip("_")]

        @functools.wraps(function)
        def counted(*args, **kwargs):
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            leaves = jax.tree.leaves_with_path(arguments)
            traces.append(
                {jax.tree_util.keystr(path, simple=True, separator="."): _type(leaf) for path, leaf in leaves}
            )
            return function(*args, **kwargs)

        return counted

    def _encode(
        self,
        params: Params,
        samples: Samples,
        lengths: Lengths,
        keywords: KeywordBatch,
        bpe_wanted: Lengths,
        with_logits: bool = False,
    ) -> Encoded:
        """`bpe_wanted`: int32, 0 for rows that do not ask for the BPE head's labels."""
        frames = num_frames(lengths)
        packing = pack_frames(self.config, frames, num_frames(samples.shape[1]))
        features = packed_log_mel(samples, lengths, packing)
        options: dict[str, Any] = {"importance": self.speculation.importance, "dtype": self.dtype}
        output, found, audio = granite_speech.encode_packed(self.config, params, features, packing, **options)
        valid = jnp.arange(packing.longest, dtype=jnp.int32)[None, :] < frames[:, None]
        labels = jnp.where(valid, packing.unpack(found.labels), ctc.BLANK)
        logits = packing.unpack(found.logits) if with_logits else None
        bpe = None
        if self.config.encoder.bpe_output_dim:
            rows = packing.unpack(output.hidden), packing.unpack(output.importance)
            bpe = granite_speech.bpe_labels(self.config, params, *rows, frames, bpe_wanted, dtype=self.dtype)
        spotting = jax.lax.cond(
            keywords.counts.max() > 0,
            lambda: spotter.score_keywords(packing.unpack(found.logits), frames, keywords),
            lambda: spotter.no_scores(frames),
        )
        return Encoded(audio, labels, found.entropy, spotting, bpe, found.speech_frames, logits)

    def _prefill(
        self,
        params: Params,
        tokens: Tokens,
        lengths: Lengths,
        audio: AudioEmbeddings,
        draft: Draft,
        keywords: BatchedAutomata,
        capacity: int,
    ) -> tuple[VerifierOutput, KVCache]:
        """Prefills prompts `tokens` `[b, p]`, each followed by its draft. The cache holds `capacity` and a window."""
        selector = self._selector(keywords)
        return granite_speech.prefill_packed(
            self.config,
            params,
            tokens,
            lengths,
            audio,
            draft.tokens,
            draft.lengths,
            functools.partial(decoding.verify, selector=selector),
            DraftProposal.from_draft(draft, selector),
            capacity=-(-(capacity + self.speculation.window) // _TILE) * _TILE,
            dtype=self.dtype,
        )

    def _decode(
        self,
        params: Params,
        verified: VerifierOutput,
        cache: KVCache,
        draft: Draft,
        max_new_tokens: Lengths,
        thresholds: Float[Array, "b"],
        keywords: BatchedAutomata,
        max_out_length: int,
    ) -> DecodeState:
        return decoding.decode(
            functools.partial(granite_speech.decode_step, self.config, params, dtype=self.dtype),
            verified,
            cache,
            draft,
            max_new_tokens,
            thresholds,
            self._selector(keywords),
            max_out_length=max_out_length,
            window=self.speculation.window,
            realign=decoding.REALIGN[self.speculation.realign],
        )

    def _align(self, logits: CTCLogits, lengths: Lengths, labels: Int[Array, "b n"], num_labels: Lengths) -> Alignment:
        """`lengths`: samples of each row."""
        return align(logits, num_frames(lengths), labels, num_labels)

    def _selector(self, keywords: BatchedAutomata) -> KeywordSelector:
        decoder = self.config.decoder
        return KeywordSelector.from_automata(keywords, decoder.vocab_size, decoder.eos_token_id, self._suppressed)

    @property
    def _suppressed(self) -> tuple[int, ...]:
        """Tokens that are never written."""
        audio, pad = self.config.audio_token_id, self.config.decoder.pad_token_id
        return (audio,) if pad is None or pad == self.config.decoder.eos_token_id else (audio, pad)


def _type(leaf: Any) -> str:
    """The type of an argument's leaf: a change of it causes a retrace."""
    return f"{jax.typeof(leaf)}{' (weak)' * jax.typeof(leaf).weak_type}" if isinstance(leaf, jax.Array) else str(leaf)


def pad_drafts(drafts: Sequence[Sequence[int]], width: int) -> Draft:
    """Token ids of every row, none longer than `width`, as a Draft."""
    tokens = np.zeros((len(drafts), width), np.int32)
    for row, draft in enumerate(drafts):
        tokens[row, : len(draft)] = draft
    return Draft(jnp.asarray(tokens), jnp.array([len(draft) for draft in drafts], jnp.int32))
