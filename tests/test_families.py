"""A family is one entry of the registry."""

import dataclasses
import json
from pathlib import Path

import hf_fixture
import numpy as np
import pytest
from hf_fixture import TINY
from safetensors.numpy import load_file, save_file

from granite_jax.checkpoint.tree import flatten
from granite_jax.convert import convert
from granite_jax.errors import CheckpointError
from granite_jax.models import registry
from granite_jax.models.family import Family
from granite_jax.models.granite_speech.config import read_config
from granite_jax.pretrained import open_checkpoint
from granite_jax.text.tasks import Capabilities

RELEASED, RENAMED = "encoder.input_linear.weight", "encoder.first.weight"


def _family() -> Family:
    """Granite Speech under another name, with a tensor renamed and one task."""
    base = registry.FAMILIES["granite_speech"]
    rules = tuple(dataclasses.replace(r, hf=RENAMED) if r.hf == RELEASED else r for r in base.tensors.rules)
    return dataclasses.replace(
        base,
        read_config=lambda raw, shapes: dataclasses.replace(
            read_config({**raw, "model_type": "granite_speech"}, shapes), model_type=raw["model_type"]
        ),
        tensors=dataclasses.replace(base.tensors, rules=rules),
        capabilities=Capabilities(tasks=("punctuate",), languages=()),
    )


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint of `granite_speech_renamed`."""
    directory = tmp_path / "hf"
    hf_fixture.write_random_checkpoint(directory, **TINY)
    tensors = load_file(directory / "model.safetensors")
    tensors[RENAMED] = tensors.pop(RELEASED)
    save_file(tensors, directory / "model.safetensors")
    raw = json.loads((directory / "config.json").read_text()) | {"model_type": "granite_speech_renamed"}
    raw.pop("granite_jax", None)
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


def test_an_entry_is_read_converted_and_exported(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a registry with one more entry
    monkeypatch.setattr(registry, "FAMILIES", {**registry.FAMILIES, "granite_speech_renamed": _family()})
    # When a checkpoint of that type is converted there and back
    convert(source, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "back")
    # Then its own tensor names, its tensors and its tasks are those of the entry
    before, after = (load_file(path / "model.safetensors") for path in (source, tmp_path / "back"))
    assert set(after) == set(before)
    assert all(np.array_equal(after[name], before[name]) for name in before if "num_batches_tracked" not in name)
    opened = open_checkpoint(tmp_path / "orbax")
    assert opened.config.model_type == "granite_speech_renamed"
    assert opened.capabilities.tasks == ("punctuate",)
    assert flatten(opened.read())["encoder.input.kernel"].T.tolist() == before[RENAMED].tolist()


def test_an_unknown_type_is_named(source: Path) -> None:
    # Given a checkpoint of a type without an entry, when it is opened, then the error names the file, type and choices
    with pytest.raises(CheckpointError, match=r"config\.json: config: model_type 'granite_speech_renamed' .*only"):
        open_checkpoint(source)
