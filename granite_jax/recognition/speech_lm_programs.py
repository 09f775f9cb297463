"""The compiled programs of the speech language model, each a jitted function of (params, inputs).

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
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jax.stages import Lowered
from jaxtyping import Array, DTypeLike, Float

from granite_jax import decoding
from granite_jax.array_types import AudioEmbeddings, Lengths, Params, Samples, Tokens
from granite_jax.decoding import DecodeState, Draft, DraftProposal, Greedy, VerifierOutput
from granite_jax.engine.compilation import Lowerable
from granite_jax.engine.programs import Programs
from granite_jax.engine.sharding import BATCH, REPLICATED, DeviceMesh
from granite_jax.errors import GraniteError
from granite_jax.keywords.automaton import BatchedAutomata, no_keywords
from granite_jax.keywords.bias import KeywordBias
from granite_jax.keywords.spotter import KeywordBatch
from granite_jax.models.family import SpeechLMConfig, SpeechLMModel
from granite_jax.models.layers.bpe_head import Importance
from granite_jax.models.layers.decoder import KVCache
from granite_jax.models.registry import model_of
from granite_jax.recognition.buckets import Bucket
from granite_jax.recognition.encoding import (
    ALIGN,
    ENCODE,
    ENCODE_WITH_LOGITS,
    Encoded,
    abstract_keywords,
    abstract_rows,
    align_texts,
    read_encoding,
)

_TILE = 16  # slots of a bfloat16 tile: unless the capacity is a multiple, the TPU compiler copies the cache


@dataclasses.dataclass(frozen=True)
class Speculation:
    """How drafts are made and proposed.

    Fields:
      window: draft tokens proposed in one decode step.
      realign: name of the rule in `decoding.REALIGN` that finds where the draft goes on after a rejection.
      importance: which activations the BPE head's weights of frames come from, as in `models.layers.bpe_head`. Nothing
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


PREFILL, DECODE = "prefill", "decode"


class SpeechLMPrograms(Programs):
    """The programs of one configuration."""

    def __init__(
        self,
        config: SpeechLMConfig,
        dtype: DTypeLike,
        speculation: Speculation | None = None,
        devices: DeviceMesh | None = None,
    ):
        super().__init__(devices)
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.model: SpeechLMModel = model_of(config, "speech-lm")
        self.speculation = speculation or Speculation()
        cache = KVCache(*[PartitionSpec(None, *BATCH)] * 2, lengths=BATCH)  # pyright: ignore[reportArgumentType]
        fields = {field.name: BATCH for field in dataclasses.fields(DecodeState)}
        state = DecodeState(**fields | {"cache": cache})  # pyright: ignore[reportArgumentType]
        tables = {field.name: REPLICATED for field in dataclasses.fields(BatchedAutomata)}
        keywords = BatchedAutomata(**tables | {"starts": BATCH})  # pyright: ignore[reportArgumentType]
        self.encode = self.compile("encode", self._encode, (REPLICATED, *[BATCH] * 4), BATCH, static="with_logits")
        prompts = (REPLICATED, BATCH, BATCH, BATCH, BATCH, keywords)
        self._prefilled = (BATCH, cache)
        self.prefill = self.compile("prefill", self._prefill, prompts, self._prefilled, static="capacity")
        drafts = (REPLICATED, BATCH, cache, BATCH, BATCH, BATCH, keywords)
        self.decode = self.compile("decode", self._decode, drafts, state, static="max_out_length", donate=2)
        self.align = self.compile("align", align_texts, [BATCH] * 4, BATCH)

    def lowerables(self, params: Any, bucket: Bucket) -> list[Lowerable]:
        """The programs for a bucket, for arguments of the types that `SpeechLM` passes.

        Args:
          params: the model's parameters as shapes with shardings.
        """
        size = bucket.batch * self.devices.replicas
        rows = functools.partial(abstract_rows, size)
        counts = rows(jnp.int32)
        draft = Draft(rows(jnp.int32, bucket.draft), counts)
        replicated = self.devices.sharding()
        tables = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), no_keywords(size))
        automata = dataclasses.replace(tables, starts=counts)

        def encode(with_logits: bool) -> Lowered:
            samples = rows(jnp.float32, bucket.samples)
            return self.encode.lower(params, samples, counts, abstract_keywords(size), counts, with_logits=with_logits)

        def prefill(results: Mapping[str, Any]) -> Lowered:
            encoded = results[ENCODE] if ENCODE in results else results[ENCODE_WITH_LOGITS]
            arguments = (params, rows(jnp.int32, bucket.prompt), counts, encoded.audio, draft, automata)
            return self.prefill.lower(*arguments, capacity=bucket.capacity)

        def decode(results: Mapping[str, Any]) -> Lowered:
            arguments = (params, *results[PREFILL], draft, counts, rows(jnp.float32), automata)
            return self.decode.lower(*arguments, max_out_length=bucket.max_out_length)

        def align(results: Mapping[str, Any]) -> Lowered:
            labels = rows(jnp.int32, bucket.max_labels)
            return self.align.lower(results[ENCODE_WITH_LOGITS].logits, counts, labels, counts)

        by_row, prefilled = self.devices.result_shardings(BATCH), self.devices.result_shardings(self._prefilled)
        return [
            Lowerable(ENCODE, lambda _: encode(False), by_row),
            Lowerable(PREFILL, prefill, prefilled),
            Lowerable(DECODE, decode),
            Lowerable(ENCODE_WITH_LOGITS, lambda _: encode(True), by_row, is_default=False),
            Lowerable(ALIGN, align, is_default=False),
        ]

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
        options: dict[str, Any] = {"importance": self.speculation.importance, "dtype": self.dtype, "with_audio": True}
        encoding = self.model.ctc.encode(self.config, params, samples, lengths, **options)
        bpe_labels = None
        if self.model.num_bpe_labels(self.config):
            packing, output = encoding.packing, encoding.output
            rows = packing.unpack(output.hidden), packing.unpack(output.importance), packing.lengths
            bpe_labels = self.model.bpe_labels(self.config, params, *rows, bpe_wanted, dtype=self.dtype)
        return read_encoding(encoding, keywords, bpe_labels, with_logits=with_logits)

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
        bias, choice = self._bias(keywords), self._choice
        return self.model.prefill_packed(
            self.config,
            params,
            tokens,
            lengths,
            audio,
            draft.tokens,
            draft.lengths,
            functools.partial(decoding.verify, bias=bias, choice=choice),
            DraftProposal.from_draft(draft, bias, choice.end_of_text),
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
            functools.partial(self.model.decode_step, self.config, params, dtype=self.dtype),
            verified,
            cache,
            draft,
            max_new_tokens,
            thresholds,
            self._bias(keywords),
            self._choice,
            max_out_length=max_out_length,
            window=self.speculation.window,
            realign=decoding.REALIGN[self.speculation.realign],
        )

    def _bias(self, keywords: BatchedAutomata) -> KeywordBias:
        return KeywordBias.from_automata(keywords, self.config.decoder.vocab_size)

    @property
    def _choice(self) -> Greedy:
        """Writes neither audio tokens nor padding."""
        audio, pad, end = self.config.audio_token_id, self.config.decoder.pad_token_id, self.config.decoder.eos_token_id
        return Greedy(end, (audio,) if pad is None or pad == end else (audio, pad))


def pad_drafts(drafts: Sequence[Sequence[int]], width: int) -> Draft:
    """Token ids of every row, none longer than `width`, as a Draft."""
    tokens = np.zeros((len(drafts), width), np.int32)
    for row, draft in enumerate(drafts):
        tokens[row, : len(draft)] = draft
    return Draft(jnp.asarray(tokens), jnp.array([len(draft) for draft in drafts], jnp.int32))
