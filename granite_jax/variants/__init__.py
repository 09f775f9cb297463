"""The members of the family by the `model_type` of their `config.json`, and the published models by name."""

from collections.abc import Mapping
from typing import Any

from granite_jax.errors import CheckpointError
from granite_jax.model.config import Config, TensorFacts
from granite_jax.variants import granite_speech
from granite_jax.variants.releases import RELEASES, Release, recorded, release
from granite_jax.variants.variant import Variant

__all__ = ["RELEASES", "VARIANTS", "Release", "Variant", "read_config", "recorded", "release", "variant_of"]

VARIANTS: Mapping[str, Variant] = {"granite_speech": granite_speech.VARIANT}


def variant_of(model_type: Any) -> Variant:
    """The variant of a `model_type`. Raises CheckpointError if there is none."""
    if not isinstance(model_type, str) or model_type not in VARIANTS:
        supported = " or ".join(map(repr, VARIANTS))
        raise CheckpointError(f"config: model_type {model_type!a:.80} is not supported, only {supported}")
    return VARIANTS[model_type]


def read_config(raw: Mapping[str, Any], facts: TensorFacts | None = None) -> Config:
    """Reads the dictionary of a Hugging Face `config.json` of any variant.

    Args:
      facts: of the checkpoint's tensors, for what the file leaves open.

    Raises:
      CheckpointError: naming the key that is missing, ill-typed or asks for what is not implemented.
    """
    return variant_of(raw.get("model_type")).read_config(raw, facts)
