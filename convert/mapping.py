"""Finds the leaf of every tensor of a Hugging Face checkpoint, and the tensors of every leaf, by a family's table.

Three spellings of names exist: `released` (`encoder.*`, `language_model.model.*`), which the tables use; `new`
(`model.encoder.*`), of transformers since 5.10; and `nested` (`language_model.model.model.*`), which transformers about
5.19 saved. Each of them is known, too, as wrapped modules of PyTorch have it (`_orig_mod.*`, `module.*`).
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np

from granite_jax.array_types import Shape
from granite_jax.checkpoint.tree import raise_named
from granite_jax.errors import CheckpointError
from granite_jax.models.tensor_table import Rule, TensorTable

HFTensor = tuple[str, Shape, str, Callable[[Any], np.ndarray]]  # name, shape, path of its leaf, leaf -> tensor

Spelling = Literal["released", "new", "nested"]

# Prefixes (as released, otherwise); the first that matches counts.
_SPELLINGS: Mapping[Spelling, tuple[tuple[str, str], ...]] = {
    "nested": (("language_model.model.", "language_model.model.model."),),
    "new": (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("encoder.", "model.encoder."),
        ("projector.", "model.projector."),
    ),
    "released": (),
}
SPELLINGS: tuple[Spelling, ...] = tuple(_SPELLINGS)
# What torch.compile, DataParallel, FSDP, activation checkpointing and peft add to names when a wrapped model is saved.
_WRAPPERS = re.compile(
    r"^(module\.|base_model\.model\.)+|\b(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_OF_ADAPTER = (".base_layer.", ".lora_A.", ".lora_B.", ".lora_magnitude_vector")
_LAYER = re.compile(r"\.(layers?)\.(0|[1-9][0-9]{0,5})\.")
_TILE = 16


def released_name(name: str) -> str:
    """The released spelling of a name in any spelling, without what wrappers add to it."""
    while (unwrapped := _WRAPPERS.sub("", name)) != name:
        name = unwrapped
    for prefixes in _SPELLINGS.values():
        for released, other in prefixes:
            if name.startswith(other):
                return released + name[len(other) :]
    return name


def spelled(name: str, spelling: Spelling) -> str:
    """A released name in another spelling."""
    for released, other in _SPELLINGS[spelling]:
        if name.startswith(released):
            return other + name[len(released) :]
    return name


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the tree: its shape, and the checkpoint's own names of the tensors it consists of, in layer order."""

    rule: Rule
    shape: Shape
    names: tuple[str, ...]

    @property
    def tensor_shape(self) -> Shape:
        """Shape of each tensor in the Hugging Face checkpoint."""
        return self.rule.transform.hf_shape(self.shape[1:] if self.rule.stacked else self.shape)


def match(names: Iterable[str], table: TensorTable, shapes: Mapping[str, Shape]) -> tuple[list[Leaf], str | None]:
    """Finds the leaf of every tensor of a checkpoint.

    Args:
      names: tensor names, in any spelling.
      table: the table of the model's family.
      shapes: dotted path -> shape of every leaf the config asks for.

    Returns:
      A `Leaf` for every path, and the name of an `lm_head` that repeats a tied embedding, or None.

    Raises:
      CheckpointError: naming tensors that have no leaf, appear in several spellings, or are missing; the tensors are
        those of an adapter that is not merged.
    """
    rules = {rule.hf: rule for rule in table.rules}
    head = table.tied and table.tied[0]
    matched: dict[tuple[str, int], str] = {}
    unmatched, duplicate, tied_head = [], [], None
    for name in names:
        released = released_name(name)
        template, layer = _template(released)
        rule = rules.get(template)
        if template == table.counter or template in table.ignored:
            continue
        if rule is not None and rule.hf == head and rule.path not in shapes:
            duplicate += [name] if tied_head else []
            tied_head = name
        elif rule is None or rule.path not in shapes or (rule.stacked and layer >= shapes[rule.path][0]):
            unmatched.append(name)
        elif (rule.path, layer) in matched:
            duplicate += [matched[rule.path, layer], name]
        else:
            matched[rule.path, layer] = name
    rules_of_model = [rule for rule in table.rules if rule.path in shapes]
    missing = (
        rule.hf.format(layer=layer)
        for rule in rules_of_model
        for layer in _layers(rule, shapes)
        if (rule.path, layer) not in matched
    )
    total = sum(len(_layers(rule, shapes)) for rule in rules_of_model)
    if any(part in name for name in unmatched for part in _OF_ADAPTER):
        raise CheckpointError(
            "the weights are of a peft model whose adapter is not merged: save merge_and_unload() of it, or its base "
            "model and its adapter as files of their own"
        )
    raise_named("no place in the model for", unmatched)
    raise_named("more than one tensor for the same place:", duplicate)
    raise_named("missing:", missing, total - len(matched))
    leaves = [
        Leaf(rule, shapes[rule.path], tuple(matched[rule.path, i] for i in _layers(rule, shapes)))
        for rule in rules_of_model
    ]
    return leaves, tied_head


def hf_tensors(table: TensorTable, shapes: Mapping[str, Shape]) -> Iterator[HFTensor]:
    """For every tensor of the leaves in `shapes`: its released name, shape, leaf, and the function that extracts it."""
    for rule in table.rules:
        if rule.path in shapes:
            shape = rule.transform.hf_shape(shapes[rule.path][1:] if rule.stacked else shapes[rule.path])
            for layer in _layers(rule, shapes):
                yield rule.hf.format(layer=layer), shape, rule.path, functools.partial(_tensor_of, rule, layer)


def counters(table: TensorTable, shapes: Mapping[str, Shape]) -> list[str]:
    """The names of the counters, which belong to the layers beside whose tensors they are."""
    if table.counter is None:
        return []
    prefix, _, _ = table.counter.partition("{layer}")
    rule = next(rule for rule in table.rules if rule.stacked and rule.hf.startswith(prefix))
    return [table.counter.format(layer=layer) for layer in _layers(rule, shapes)]


def _tensor_of(rule: Rule, layer: int, leaf: np.ndarray) -> np.ndarray:
    return rule.transform.to_hf(leaf[layer] if rule.stacked else leaf)


def copy(into: np.ndarray, array: np.ndarray) -> None:
    """`into[...] = array`, fast where `array` is a transposed view: rows of both then stay in the processor's cache."""
    if array.ndim < 2 or array.flags.c_contiguous:
        into[...] = array
        return
    for start in range(0, array.shape[-1], _TILE):
        into[..., start : start + _TILE] = array[..., start : start + _TILE]


def _template(name: str) -> tuple[str, int]:
    layer = _LAYER.search(name)
    if layer is None:
        return name.replace("{", ""), 0  # a literal "{layer}" in a name is not a layer
    return _LAYER.sub(r".\1.{layer}.", name, count=1), int(layer[2])


def _layers(rule: Rule, shapes: Mapping[str, Shape]) -> range:
    return range(shapes[rule.path][0] if rule.stacked else 1)
