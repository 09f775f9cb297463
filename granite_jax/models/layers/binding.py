"""Joins modules with parameters: the tree decides in which form layers and their weights are kept."""

import functools
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from granite_jax.models.layers.linear import ADAPTER, FORMS, Linear

M = TypeVar("M", bound=nnx.Module)


def bind(module: M, params: Mapping[str, Any]) -> M:
    """The module with these parameters.

    Args:
      module: of shapes (`nnx.eval_shape`), in the form that it is initialized in; a cache keeps it.
      params: nested dictionaries like the module's own parameters, except that a linear layer can have another form
        (`linear`), and a stack of layers can be `stack.separate`.

    Raises:
      ValueError: naming leaves that are missing, or have no place in the module.
    """
    return nnx.merge(_definition(module, jax.tree.structure(params)), params)


@functools.lru_cache(maxsize=64)
def _definition(module: nnx.Module, structure: Any) -> Any:
    """The module's structure with the forms of a tree of this structure."""
    tree = jax.tree.unflatten(structure, [None] * structure.num_leaves)
    definition, state = nnx.split(_shaped(nnx.clone(module, graph=False), tree), graph=False)
    expected, actual = (set(_paths(each)) for each in (nnx.to_pure_dict(state), tree))
    if expected != actual:
        problems = {"missing": expected - actual, "without a place in the module": actual - expected}
        raise ValueError("; ".join(f"{name}: {', '.join(sorted(each))}" for name, each in problems.items() if each))
    return definition


def _paths(tree: Any) -> list[str]:
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda x: x is None)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]


def _count(module: Any) -> int:
    """The number of layers if the module is a stack of them."""
    return next((leaf.shape[0] for leaf in jax.tree.leaves(nnx.state(module, graph=False)) if leaf.shape), 0)


def _shaped(module: Any, tree: Mapping[Any, Any]) -> Any:
    """The module, or an `nnx.List` of copies of it, in the form of the tree."""
    if 0 in tree and tree.keys() == set(range(_count(module))):
        return nnx.List([_shaped(nnx.clone(module, graph=False), layer) for layer in tree.values()])
    if isinstance(module, Linear):
        weights = tree.keys() - ADAPTER - {"bias"}
        if weights in FORMS and (tree.keys() >= ADAPTER or not ADAPTER & tree.keys()):
            del module.kernel
            for name in tree.keys() - {"bias"}:
                setattr(module, name, nnx.Param(jax.ShapeDtypeStruct((), jnp.float32)))
        return module
    for name, branch in tree.items():
        if isinstance(branch, Mapping) and hasattr(module, str(name)):
            setattr(module, name, _shaped(getattr(module, name), branch))
    return module
