"""Equal layers one after another: how they are kept, and the one loop that runs them.

    stacked     leaves [l, ...]            scanned: one layer is compiled, for any number of them
    separate    {0: {...}, 1: {...}, ...}  unrolled: a CPU would copy the weights that it slices out of a stack

Checkpoints and `gj.load` have them stacked.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Carry = TypeVar("Carry")
M = TypeVar("M", bound=nnx.Module)


def make_layers(make: Callable[[nnx.Rngs], M], count: int, rngs: nnx.Rngs) -> M:
    """`count` layers, stacked."""
    return nnx.vmap(make, graph=False)(rngs.split(count))


def for_layers(
    layers: Any, body: Callable[[Carry, Any, Any], tuple[Carry, Any]], carry: Carry, *, remat: bool = False
) -> tuple[Carry, Any]:
    """Runs `carry, output = body(carry, layer, index)` for every layer.

    Args:
      layers: a module whose leaves are stacked, or an `nnx.List` of modules.
      remat: keep only the carries for the derivative, and compute each layer again in the backward pass
        (Chen et al., arXiv 1604.06174).

    Returns:
      The last carry, and the outputs, stacked on a leading axis.
    """
    if isinstance(layers, nnx.List):
        outputs = []
        for index, layer in enumerate(layers):
            definition, weights = nnx.split(layer, graph=False)
            run = _runner(definition, body, remat=remat, prevent_cse=True)
            carry, output = run(carry, (weights, jnp.int32(index)))
            outputs.append(output)
        return carry, jax.tree.map(lambda *each: jnp.stack(each), *outputs)
    definition, weights = nnx.split(layers, graph=False)
    count = len(jax.tree.leaves(weights)[0])
    # A scan's body is not merged with its backward pass, so nothing has to prevent that.
    run = _runner(definition, body, remat=remat, prevent_cse=False)
    return jax.lax.scan(run, carry, (weights, jnp.arange(count, dtype=jnp.int32)))


def _runner(definition: Any, body: Callable[..., Any], *, remat: bool, prevent_cse: bool) -> Callable[..., Any]:
    def run(carry: Any, weights_and_index: tuple[Any, Any]) -> tuple[Any, Any]:
        weights, index = weights_and_index
        return body(carry, nnx.merge(definition, weights), index)

    return jax.checkpoint(run, prevent_cse=prevent_cse) if remat else run


def separate(stacked: Any) -> dict[int, Any]:
    """The tree of a stack's leaves as trees of its layers."""
    count = len(jax.tree.leaves(stacked)[0])
    return {index: jax.tree.map(lambda leaf, index=index: leaf[index], stacked) for index in range(count)}
