"""Layer normalization with float32 statistics."""

import jax
from flax import nnx


class LayerNorm(nnx.LayerNorm):
    """Flax's layer normalization under JAX's default promotion of dtypes and ranks, which callers may have forbidden.

    Flax takes the float32 mean from bfloat16 activations, which is such a promotion.
    """

    def __init__(self, width: int, epsilon: float, rngs: nnx.Rngs):
        super().__init__(width, epsilon=epsilon, use_fast_variance=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return super().__call__(x)
