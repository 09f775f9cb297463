"""The compiled programs of the encoder alone, on the shapes of a `Bucket`, of which they use samples and rows."""

from typing import Any

import jax.numpy as jnp
from jax.stages import Lowered
from jaxtyping import DTypeLike

from granite_jax.array_types import Lengths, Params, Samples
from granite_jax.engine.compilation import Lowerable
from granite_jax.engine.programs import Programs
from granite_jax.engine.sharding import BATCH, REPLICATED, DeviceMesh
from granite_jax.keywords.spotter import KeywordBatch
from granite_jax.models.family import CTCModel, ModelConfig
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


class CTCPrograms(Programs):
    """`encode` without projector, in two forms, and `align`."""

    def __init__(self, config: ModelConfig, dtype: DTypeLike, devices: DeviceMesh | None = None):
        super().__init__(devices)
        self.config = config
        self.dtype = jnp.dtype(dtype)
        self.model: CTCModel = model_of(config, "ctc")
        self.encode = self.compile("encode", self._encode, (REPLICATED, *[BATCH] * 3), BATCH, static="with_logits")
        self.align = self.compile("align", align_texts, [BATCH] * 4, BATCH)

    def needed_params(self, params: Any) -> dict[str, Any]:
        """The part of the model's parameters that the programs take."""
        return {part: params[part] for part in self.model.parts}

    def _encode(
        self, params: Params, samples: Samples, lengths: Lengths, keywords: KeywordBatch, with_logits: bool = False
    ) -> Encoded:
        encoding = self.model.encode(self.config, params, samples, lengths, dtype=self.dtype, with_audio=False)
        return read_encoding(encoding, keywords, with_logits=with_logits, with_confidence=True)

    def lowerables(self, params: Any, bucket: Bucket) -> list[Lowerable]:
        """The programs for a bucket, for arguments of the types that `CTC` passes.

        Args:
          params: the model's parameters as shapes with shardings.
        """
        size = bucket.batch * self.devices.replicas
        counts = abstract_rows(size, jnp.int32)

        def encode(with_logits: bool) -> Lowered:
            inputs = abstract_rows(size, jnp.float32, bucket.samples), counts, abstract_keywords(size)
            return self.encode.lower(self.needed_params(params), *inputs, with_logits=with_logits)

        labels, by_row = abstract_rows(size, jnp.int32, bucket.max_labels), self.devices.result_shardings(BATCH)
        return [
            Lowerable(ENCODE, lambda _: encode(False), by_row),
            Lowerable(ENCODE_WITH_LOGITS, lambda _: encode(True), by_row, is_default=False),
            Lowerable(
                ALIGN,
                lambda results: self.align.lower(results[ENCODE_WITH_LOGITS].logits, counts, labels, counts),
                is_default=False,
            ),
        ]
