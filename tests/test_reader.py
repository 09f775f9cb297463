"""Reading Hugging Face checkpoints: what cannot be placed, or is not what its header says, is named."""

import importlib.metadata
import io
import json
import sys
from pathlib import Path
from typing import Any

import hf_fixture
import numpy as np
import pytest
from hf_fixture import TINY
from safetensors.numpy import load_file, save_file

from granite_jax.checkpoint.tree import flatten, unflatten
from granite_jax.convert.reader import read_leaves
from granite_jax.convert.safetensors_file import StoredTensor
from granite_jax.errors import CheckpointError
from granite_jax.models.granite_speech.config import Config
from granite_jax.models.granite_speech.family import FAMILY
from granite_jax.pretrained import open_checkpoint

_, EMBEDDING = FAMILY.tensors.tied
Q0 = "encoder.layers.0.attn.to_q.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    hf_fixture.write_random_checkpoint(tmp_path / "hf", **TINY)
    return tmp_path / "hf"


def read(directory: Path) -> dict:
    return unflatten(dict(read_leaves(directory, Config.from_file(directory / "config.json"))))


def rewrite(directory: Path, change) -> None:
    """Applies `change` to the dictionary of tensors of a one-file checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(extra=t[Q0]), "no place in the model for extra"),
        (lambda t: t.update({Q0.replace(".0.", ".2."): t[Q0]}), "no place in the model for encoder.layers.2.attn"),
        (lambda t: t.update({Q0.replace(".0.", ".01."): t[Q0]}), "no place in the model for encoder.layers.01.attn"),
        (
            lambda t: t.update({Q0.replace("0", "{layer}"): t.pop(Q0)}),
            "no place in the model for encoder.layers.{layer}",
        ),
        (lambda t: t.update({f"{Q0}.lora_A": t[Q0]}), "no place in the model for .*lora_A"),
        (lambda t: t.update({f"model.{Q0}": t[Q0]}), f"more than one tensor for the same place: .*{Q0}"),
        (lambda t: t.pop(Q0), f"missing: {Q0}"),
        (lambda t: t.update({Q0: t[Q0][:, :-1].copy()}), rf"wrong shape: {Q0} \[8, 7\], not \[8, 8\]"),
        (lambda t: t.update({Q0: t[Q0].astype(np.int8)}), f"{Q0} is I8; supported are F32, F16, BF16"),
        (
            lambda t: t.update({Q0: t[Q0].astype(np.float16)}),
            f"{Q0.replace('0', '1')} is float32, {Q0} float16: pass dtype",
        ),
        (lambda t: [t.pop(k) for k in list(t) if "conv" in k], "missing: .* and 18 more"),
    ],
)
def test_what_does_not_fit_is_named(source: Path, change, message: str) -> None:
    # Given a checkpoint with one thing wrong, when it is read, then the error names it
    rewrite(source, change)
    with pytest.raises(CheckpointError, match=message):
        read(source)


def test_what_carries_no_information_is_ignored(source: Path) -> None:
    # Given counters removed and buffers added, when the checkpoint is read, then nothing is missed
    before = flatten(read(source))
    counters = "encoder.layers.{}.conv.batch_norm.num_batches_tracked"
    rewrite(source, lambda t: [t.pop(counters.format(i)) for i in range(2)])
    rewrite(source, lambda t: t.update({"model.encoder.attention_dists": np.zeros((40, 40), np.int64)}))
    frequencies = {
        "language_model.model.rotary_emb.inv_freq": np.ones(4, np.float32),
        "model.language_model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    rewrite(source, lambda t: t.update(frequencies))
    assert all(np.array_equal(x, before[path]) for path, x in flatten(read(source)).items())


def test_a_head_beside_a_tied_embedding_must_repeat_it(tmp_path: Path) -> None:
    # Given a tied checkpoint that still carries a head equal to the embedding
    hf_fixture.write_random_checkpoint(tmp_path, tied=True, **TINY)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t[EMBEDDING].copy()}))
    assert "head" not in read(tmp_path)["decoder"]

    # When one bit of it differs, then the checkpoint is refused
    rewrite(tmp_path, lambda t: t["lm_head.weight"].view(np.uint32).__ixor__(1))
    with pytest.raises(CheckpointError, match=f"lm_head.weight differs from {EMBEDDING}"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (0, r"not a readable safetensors file \(0 bytes\)$"),
        (7, r"not a readable safetensors file \(7 bytes\)$"),
        (100, r"not a readable safetensors file \(100 bytes cannot hold a header of \d+\)$"),
        (-1, r"[\w.]+: cut short, it ends at byte \d+ of the data and the file at \d+$"),
        (-9000, r"[\w.]+: cut short, it ends at byte \d+ of the data and the file at \d+$"),
    ],
)
def test_a_truncated_file_is_named(source: Path, size: int, message: str) -> None:
    # Given a file cut short, when it is read, then the error names it and the first tensor that is not there
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {message}"):
        read(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(x="../model-00001-of-00002.safetensors"), "is not a file of this directory"),
        (lambda m: m.update(x="/etc/passwd"), "'/etc/passwd' is not a file of this directory"),
        (lambda m: m.update(x=".."), r"'\.\.' is not a file of this directory"),
        (lambda m: m.update(x=r"..\x"), "is not a file of this directory"),
        (lambda m: m.update(x=3), "weight_map is no map from tensors to files"),
        (lambda m: m.update(x="absent.safetensors"), r"absent\.safetensors: no such file"),
        (lambda m: m.update(x="model-00001-of-00002.safetensors"), "in the index but in no file: x"),
        (lambda m: m.pop(Q0), f"in a file but not in the index: {Q0}"),
        (lambda m: m.update(x="model.safetensors"), "is in more than one file"),
    ],
)
def test_a_wrong_index_is_named(tmp_path: Path, change, message: str) -> None:
    # Given shards with an index that is wrong in one place, when they are read, then the error names it
    config = hf_fixture.write_random_checkpoint(tmp_path, shards=2, **TINY)
    hf_fixture.write_tensors(tmp_path, hf_fixture.random_tensors(config, 0))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    change(index["weight_map"])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path)


class _Slow(io.BytesIO):
    """Reads at most seven bytes at once, as Linux reads at most 2 GiB."""

    def readinto(self, buffer: Any) -> int:
        return super().readinto(memoryview(buffer)[:7])


def test_a_tensor_is_read_in_as_many_pieces_as_it_takes() -> None:
    # Given a file that gives a few bytes at a time, when a tensor is read, then it is whole, or said to be cut short
    expected = np.arange(5, dtype=np.float32)
    file = _Slow(b"--" + expected.tobytes())
    tensor = StoredTensor("x", Path("f"), (5,), "F32", 2, 20, file)  # type: ignore[arg-type]
    np.testing.assert_array_equal(tensor.read(), expected)
    file.truncate(21)
    with pytest.raises(CheckpointError, match=r"^f: cut short while x was read$"):
        tensor.read()


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "takes torch >= 2.6, which is not installed; safetensors files need no torch$"),
        ("2.5.1+cpu", r"torch 2\.5\.1\+cpu can be made to run code by such a file; it takes torch >= 2.6"),
        ("1.13.0", r"torch 1\.13\.0 can be made to run code"),
        ("unknown", "torch unknown can be made to run code"),
    ],
)
def test_files_of_torch_take_a_safe_torch(tmp_path: Path, monkeypatch, version: str | None, message: str) -> None:
    # Given no torch, or one that such files can make run code, when there is no safetensors file, then it is not used
    hf_fixture.write_random_checkpoint(tmp_path, **TINY)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    def find(name: str) -> str:
        assert name == "torch"
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it fails the test
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin: .*{message}"):
        open_checkpoint(tmp_path).read()
