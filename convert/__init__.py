"""Conversion between Hugging Face checkpoints and this program's own: `convert(source, destination)`.

`mapping` matches tensors with leaves, `reader` and `writer` are its two directions, `adapter` does the same for LoRA.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from granite_jax.convert.api import Report, convert

__all__ = ["Report", "convert"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from granite_jax.convert import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
