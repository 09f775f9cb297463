"""The families by the `model_type` of their `config.json`, and the published models by name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from granite_jax.array_types import Shape
from granite_jax.errors import CheckpointError, GraniteError
from granite_jax.models.family import CTCModel, Family, Release
from granite_jax.models.granite_speech.family import FAMILY as GRANITE_SPEECH

FAMILIES: dict[str, Family] = {"granite_speech": GRANITE_SPEECH}
"""An entry makes a family known to everything: directories, conversion, recognizers, planning."""


def family_of(model_type: Any) -> Family:
    """The family of a `model_type`. Raises CheckpointError if there is none."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        supported = " or ".join(map(repr, FAMILIES))
        raise CheckpointError(f"config: model_type {model_type!a:.80} is not supported, only {supported}")
    return FAMILIES[model_type]


def model_of(config: Any, recognizer: str) -> Any:
    """What a recognizer asks of a configuration's model. Raises GraniteError if it cannot run that."""
    recognizers = family_of(config.model_type).recognizers
    if recognizer not in recognizers:
        known = " or ".join(map(repr, recognizers))
        raise GraniteError(f"recognizer={recognizer!r:.60} cannot run {config.model_type!r}, only {known} can")
    return recognizers[recognizer]


def encoder_of(config: Any) -> CTCModel:
    """The encoder with a CTC head that every recognizer of a configuration's model runs."""
    model = model_of(config, default_recognizer(config))
    return model if isinstance(model, CTCModel) else model.ctc


def default_recognizer(config: Any) -> Any:
    """The name of the recognizer that runs a configuration's model unless another is asked for."""
    return next(iter(family_of(config.model_type).recognizers))


def read_config(raw: Mapping[str, Any], shapes: Mapping[str, Shape] | None = None) -> Any:
    """Reads the dictionary of a Hugging Face `config.json` of any family.

    Args:
      shapes: of the parameter tree's leaves by dotted path, for what the file leaves open.

    Raises:
      CheckpointError: naming the key that is missing, ill-typed or asks for what is not implemented.
    """
    return family_of(raw.get("model_type")).read_config(raw, shapes)


def releases() -> dict[str, Release]:
    """The published models of all families by name."""
    return {name: release for family in FAMILIES.values() for name, release in family.releases.items()}


def release(name: str) -> Release:
    """The published model of this name, with or without `ibm-granite/`. Raises GraniteError if there is none."""
    known, key = releases(), name.removeprefix("ibm-granite/").lower()
    if key not in known:
        raise GraniteError(f"no published model {name!r:.80} is known, only {', '.join(known)}")
    return known[key]


def release_of(config: Any, raw: Mapping[str, Any], directory: Path) -> Release | None:
    """The published model that a checkpoint is, or was tuned from; None if that is unknown.

    Args:
      raw: the dictionary of its `config.json`.
    """
    return family_of(config.model_type).release_of(config, raw, directory)


def with_release_name(raw: Mapping[str, Any], config: Any, release: Release | None) -> Mapping[str, Any]:
    """The dictionary of a `config.json`, naming the release if only the directory's name does."""
    section = raw.get("granite_jax", {})
    if release is None or not isinstance(section, Mapping) or release_of(config, raw, Path("unnamed")) is release:
        return raw
    return {**raw, "granite_jax": {**section, "model": release.name}}
