"""Reads the fields of an untrusted JSON object, with errors that name them."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from granite_jax.errors import CheckpointError


def read_json(path: str | Path) -> dict[str, Any]:
    """Reads a JSON object from a file. Raises CheckpointError naming the file."""
    try:
        raw = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: no UTF-8 or JSON, or a number of 5,000 digits
        raise CheckpointError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds {type(raw).__name__}, not a JSON object")
    return raw


def section(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The object under a key."""
    value = raw.get(key)
    if not isinstance(value, Mapping):
        raise CheckpointError(f"config: {key} is missing or not an object")
    return value


def number(raw: Mapping[str, Any], prefix: str, key: str, kind: type, default: Any) -> Any:
    """An `int`, or a finite `float`."""
    value = raw.get(key, default)
    accepted = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, accepted):
        raise CheckpointError(f"config: {prefix}{key} is {value!a:.80}, not {kind.__name__}")
    if kind is float and not abs(value) <= sys.float_info.max:  # NaN, infinite, or an integer that no float can hold
        raise CheckpointError(f"config: {prefix}{key} is {value!a:.80}, not a finite number")
    return kind(value)


def positive_integer(raw: Mapping[str, Any], prefix: str, key: str, default: int) -> int:
    """An integer of 1 or more."""
    value = number(raw, prefix, key, int, default)
    # No real model comes near the bound; larger values would overflow shapes before an error could name the key.
    if not 0 < value < 2**31:
        raise CheckpointError(f"config: {prefix}{key} is {value!a:.80}, not a positive 32-bit integer")
    return value


def positive_number(raw: Mapping[str, Any], prefix: str, key: str, default: float) -> float:
    """A finite number above 0."""
    value = number(raw, prefix, key, float, default)
    if not value > 0:
        raise CheckpointError(f"config: {prefix}{key} is not positive, but {value!a:.80}")
    return value


def boolean(raw: Mapping[str, Any], prefix: str, key: str) -> bool | None:
    """true or false; None if the key is absent or null."""
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"config: {prefix}{key} is {value!a:.80}, neither true nor false")
    return value


def without_nulls(raw: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """The object without those of `keys` (by default all) that are null: transformers takes these for absent."""
    return {key: value for key, value in raw.items() if value is not None or (keys and key not in keys)}


def require(raw: Mapping[str, Any], prefix: str, key: str, supported: tuple, default: Any = None) -> None:
    """Raises CheckpointError unless a key has one of the supported values."""
    value = raw.get(key, default)
    if value not in supported:
        raise CheckpointError(
            f"config: {prefix}{key} {value!a:.80} is not supported, only {' or '.join(map(repr, supported))}"
        )
