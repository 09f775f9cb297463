"""Rotary position embeddings, extended beyond the positions of pretraining by YaRN.

References: RoFormer (arXiv 2104.09864); YaRN (arXiv 2309.00071) as `modeling_rope_utils` of transformers computes it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from granite_jax.errors import CheckpointError
from granite_jax.files.json_fields import boolean, number, positive_integer, positive_number, without_nulls

_PREFIX, _MAX_FACTOR = "text_config.", 1e6
_KEYS = {
    "default": {"rope_type", "type", "rope_theta", "partial_rotary_factor"},
    "yarn": {
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings"),
        *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    },
}


@dataclasses.dataclass(frozen=True)
class Yarn:
    """How YaRN stretches the rotary embedding.

    Fields:
      factor: by how much low frequencies are slowed down.
      original_positions: positions of pretraining.
      beta_fast, beta_slow: rotations over `original_positions`. Channels that rotate more often than `beta_fast` keep
        their frequency, those that rotate less often than `beta_slow` are slowed down by `factor`, and the ramp lies
        between them.
      attention_factor: multiplies cosines and sines, hence attention scores by its square.
      truncate: whether the ramp begins and ends at whole channels.
    """

    factor: float
    original_positions: int
    beta_fast: float
    beta_slow: float
    attention_factor: float
    truncate: bool


@dataclasses.dataclass(frozen=True)
class Rotary:
    """A rotary embedding.

    Fields:
      theta: base of the wavelengths.
      yarn: its extension, or None.
    """

    theta: float
    yarn: Yarn | None = None

    @classmethod
    def from_dict(cls, text: Mapping[str, Any], max_positions: int, version: tuple[int, int] | None) -> "Rotary":
        """Reads `rope_scaling` or `rope_parameters`, and `rope_theta`, of a `text_config`.

        Args:
          max_positions: the `text_config`'s own positions.
          version: major and minor version of the transformers that wrote it, if known.

        Raises:
          CheckpointError: naming the key that is ill-typed, unknown, or contradicts another.
        """
        text, rope = without_nulls(text), _rope_section(text)
        name = rope.get("rope_type", rope.get("type", "default"))
        if not isinstance(name, str) or name not in _KEYS:
            raise CheckpointError(
                f"config: text_config rope scaling {name!a:.80} is not supported, only {' or '.join(_KEYS)}"
            )
        unknown = next((key for key in rope if key not in _KEYS[name]), None)
        if unknown is not None:
            raise CheckpointError(f"config: text_config rope scaling {name!r} has the unknown key {unknown!a:.80}")
        for place in (rope, text):
            if place.get("partial_rotary_factor") not in (None, 1):
                raise CheckpointError("config: text_config partial_rotary_factor is not supported, only 1")
        theta = positive_number(rope if "rope_theta" in rope else text, _PREFIX, "rope_theta", 10000.0)
        _check_agreement(text, "rope_theta", theta)
        if name == "yarn" and theta <= 1:
            raise CheckpointError(f"config: text_config.rope_theta is {theta:g}, not above 1")
        return cls(theta, _yarn(rope, text, max_positions, version) if name == "yarn" else None)

    def inverse_frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each pair of channels, float32 `[head_dim / 2]`.

        Computed on the host: accelerators round powers differently, and at position 16,000 the last bit counts.
        """
        exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
        powers = np.power(self.theta, exponents.astype(np.float64)).astype(np.float32)
        unchanged = np.float32(1) / powers
        if self.yarn is None:
            return unchanged
        slowed = np.float32(1) / (np.float32(self.yarn.factor) * powers)
        low, high = self._ramp_ends(self.yarn, head_dim)
        ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
        kept = np.float32(1) - np.clip(ramp, 0, 1)
        return slowed * (np.float32(1) - kept) + unchanged * kept

    def tables(
        self, positions: Int[Array, "b p"], head_dim: int
    ) -> tuple[Float[Array, "b p h"], Float[Array, "b p h"]]:
        """Cosines and sines of every position, float32; the second half of the channels repeats the first."""
        frequencies = jnp.asarray(self.inverse_frequencies(head_dim))
        angles = positions[..., None].astype(jnp.float32) * frequencies[None, None, :]
        angles = jnp.concatenate([angles, angles], axis=-1)
        scale = 1.0 if self.yarn is None else self.yarn.attention_factor
        return jnp.cos(angles) * scale, jnp.sin(angles) * scale

    def _ramp_ends(self, yarn: Yarn, head_dim: int) -> tuple[float, float]:
        """The channel pairs between which frequencies go from unchanged to slowed down."""

        def channel(rotations: float) -> float:
            wavelengths = yarn.original_positions / (rotations * 2 * math.pi)
            return head_dim * math.log(wavelengths) / (2 * math.log(self.theta))

        low, high = channel(yarn.beta_fast), channel(yarn.beta_slow)
        if yarn.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = float(max(low, 0)), float(min(high, head_dim - 1))
        return low, high + 0.001 if low == high else high


def _rope_section(text: Mapping[str, Any]) -> dict[str, Any]:
    """`rope_scaling` of transformers 4, or `rope_parameters` of transformers 5, without nulls."""
    found = {key: text[key] for key in ("rope_scaling", "rope_parameters") if text.get(key)}
    for key, value in found.items():
        if not isinstance(value, Mapping):
            raise CheckpointError(f"config: text_config.{key} is {value!a:.80}, not an object")
    sections = [without_nulls(value) for value in found.values()]
    if len(sections) == 2 and sections[0] != sections[1]:
        raise CheckpointError("config: text_config.rope_scaling contradicts text_config.rope_parameters")
    return sections[0] if sections else {}


def _yarn(
    rope: Mapping[str, Any], text: Mapping[str, Any], max_positions: int, version: tuple[int, int] | None
) -> Yarn:
    original = positive_integer(rope, _PREFIX, "original_max_position_embeddings", max_positions)
    _check_agreement(text, "original_max_position_embeddings", original)
    ratio = max_positions / original
    factor = positive_number(rope, _PREFIX, "factor", ratio)
    if factor > _MAX_FACTOR:
        raise CheckpointError(f"config: text_config rope factor is {factor:g}, at most {_MAX_FACTOR:g} is supported")
    stated = "original_max_position_embeddings" in rope
    if version is not None and version < (4, 57) and stated and factor != ratio:
        raise CheckpointError(
            f"config: text_config rope factor {factor:g} contradicts {max_positions} positions of {original}, and "
            "transformers before 4.57 used their ratio instead"
        )
    mscales = [number(rope, _PREFIX, key, float, 0.0) for key in ("mscale", "mscale_all_dim")]
    scale, divisor = mscales if all(mscales) else (1.0, 0.0)
    attention_factor = _attention_factor(factor, scale) / _attention_factor(factor, divisor)
    return Yarn(
        factor=factor,
        original_positions=original,
        beta_fast=positive_number(rope, _PREFIX, "beta_fast", 32.0),
        beta_slow=positive_number(rope, _PREFIX, "beta_slow", 1.0),
        attention_factor=positive_number(rope, _PREFIX, "attention_factor", attention_factor),
        truncate=boolean(rope, _PREFIX, "truncate") is not False,
    )


def _attention_factor(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _check_agreement(text: Mapping[str, Any], key: str, value: float | int) -> None:
    """A `text_config` can have a key of the rope section beside it, where not all versions of transformers look."""
    if text.get(key) not in (None, value):
        raise CheckpointError(
            f"config: text_config.{key} {text[key]!a:.80} contradicts {value!a:.80} of its rope section"
        )
