"""LoRA adapters in the parameter tree: the subtree `lora`, named like the leaves it changes.

    decoder.layers.attention.q.kernel [l, in, out]  ->  lora.decoder.layers.attention.q.a [l, in, r], .b [l, r, out]

`r` is the largest rank of the layers; smaller ranks are padded with zeros, layers without an adapter are all zeros.
Merged: `kernel + scale * a @ b`, where scale is alpha / rank, or alpha / sqrt(rank) for rslora (arXiv 2312.03732).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from granite_jax.array_types import Shape

LORA = "lora"
ALONE = "is a LoRA adapter without its base model: put its files into a directory with that model's"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a checkpoint's adapter adds to its parameter tree.

    Fields:
      rank, alpha: of modules without their own.
      target_modules: names that adapted modules end in, or one regular expression for the whole name.
      shapes: dotted path of every leaf of the subtree -> its shape.
      scales: dotted path of every adapted kernel -> float32 scale of each layer `[l]`, or `[]` if it is not stacked.
    """

    rank: int
    alpha: float
    target_modules: tuple[str, ...] | str
    shapes: Mapping[str, Shape]
    scales: Mapping[str, np.ndarray]


def merge(kernel: np.ndarray, a: np.ndarray, b: np.ndarray, scale: np.ndarray, dtype: Any) -> np.ndarray:
    """`kernel + scale * a @ b`, computed in float32 and rounded once, to `dtype`. `[l, in, out]` or `[in, out]`."""
    merged = np.empty(kernel.shape, dtype)
    for layer in np.ndindex(kernel.shape[:-2]):  # layer by layer: float32 copies stay small
        delta = (a[layer].astype(np.float32) @ b[layer].astype(np.float32)) * scale[layer]
        merged[layer] = kernel[layer].astype(np.float32) + delta
    return merged


def factor_paths(kernel_path: str) -> tuple[str, str]:
    """Dotted paths of `a` and `b` of an adapted kernel."""
    stem = f"{LORA}.{kernel_path.removesuffix('.kernel')}"
    return f"{stem}.a", f"{stem}.b"
