"""The linear layer: the one place that knows how its weights are stored.

    kernel [in, *out]                    as initialized, trained and saved
    weight [*out, in]                    transposed, as an embedding table that is the output head, too
    q int8 [in, *out], scale [*out]      quantized: the product is multiplied by one scale for each output
    a [in, r], b [r, *out], alpha []     a LoRA adapter beside any of these (arXiv 2106.09685): adds alpha (x @ a) @ b
    bias [*out]

A parameter tree can have any of these forms in the place of any linear layer: blocks do not notice (`binding.bind`).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, DTypeLike

FORMS = (frozenset({"kernel"}), frozenset({"weight"}), frozenset({"q", "scale"}))
ADAPTER = frozenset({"a", "b", "alpha"})

OUTPUTS: Mapping[str, int] = {"kernel": -1, "weight": -2, "q": -1, "scale": -1, "b": -1, "bias": -1}
"""Part -> the axis that is split where devices share the outputs (column-parallel); the others are replicated."""
INPUTS: Mapping[str, int] = {"kernel": -2, "q": -2, "weight": -1, "a": -2}
"""Part -> the axis that is split where devices share the inputs (row-parallel), if there is one axis of outputs."""


class Linear(nnx.Module):
    """`x @ kernel + bias` over the last axis of `x`, for float weights, in the wider dtype of the two."""

    def __init__(self, inputs: int, outputs: int | tuple[int, ...], rngs: nnx.Rngs, *, use_bias: bool = True):
        """`outputs` can be several axes."""
        shape = outputs if isinstance(outputs, tuple) else (outputs,)
        kernel = nnx.initializers.lecun_normal()(rngs.params(), (inputs, int(np.prod(shape))), jnp.float32)
        self.kernel = nnx.Param(kernel.reshape(inputs, *shape))
        if use_bias:
            rngs.params()  # as Flax's own layer does, so that the same keys give the same models
            self.bias = nnx.Param(jnp.zeros(shape, jnp.float32))

    @property
    def parts(self) -> dict[str, Array]:
        """The weights by name."""
        return {name: value[...] for name, value in vars(self).items() if isinstance(value, nnx.Variable)}

    def __call__(self, x: jax.Array) -> jax.Array:
        return apply(self.parts, x)


def apply(parts: Mapping[str, ArrayLike], x: jax.Array, dtype: DTypeLike | None = None) -> jax.Array:
    """Applies a linear layer of these parts to `x` `[..., in]`: `[..., *out]`.

    Args:
      dtype: of the result, in which products are accumulated; default that of `x` and the weights.
    """
    parts = {name: jnp.asarray(part) for name, part in parts.items()}
    if "q" in parts:
        y = _dot(x, parts["q"].astype(x.dtype), -parts["q"].ndim, jnp.float32)
        y = (y * _like(y, parts["scale"])).astype(dtype or x.dtype)
    elif "weight" in parts:
        y = _dot(x, parts["weight"], -1, dtype)
    else:
        y = _dot(x, parts["kernel"], -parts["kernel"].ndim, dtype)
    if "a" in parts:
        low = _dot(x, parts["a"].astype(x.dtype), 0)
        y += (parts["alpha"].astype(y.dtype) * _dot(low, parts["b"].astype(x.dtype), 0, y.dtype)).astype(y.dtype)
    if "bias" in parts:
        y += _like(y, parts["bias"])
    return y


def _dot(x: jax.Array, weights: jax.Array, axis: int, dtype: DTypeLike | None = None) -> jax.Array:
    """Contracts the last axis of `x` with an axis of the weights."""
    wide = jnp.result_type(x, weights)
    dimensions = (((x.ndim - 1,), (axis % weights.ndim,)), ((), ()))
    return jax.lax.dot_general(x.astype(wide), weights.astype(wide), dimensions, preferred_element_type=dtype)


def _like(y: jax.Array, part: jax.Array) -> jax.Array:
    """A part `[*out]` with the dtype and the number of axes of `y`."""
    return part.astype(y.dtype).reshape((1,) * (y.ndim - part.ndim) + part.shape)
