"""Files that only torch writes, and directories that only transformers reads."""

import json
import pickle
from pathlib import Path

import hf_fixture
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoProcessor, GraniteSpeechForConditionalGeneration

from granite_jax.checkpoint.tree import flatten
from granite_jax.convert import convert
from granite_jax.errors import CheckpointError
from granite_jax.pretrained import open_checkpoint


@pytest.fixture(params=["float32", "bfloat16"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    hf_fixture.write_random_checkpoint(tmp_path / "hf", dtype=request.param)
    return tmp_path / "hf"


@pytest.mark.parametrize("shards", [1, 3])
def test_pytorch_model_bin_is_read(source: Path, shards: int) -> None:
    # Given the same weights as torch saves them, in one file or several with an index
    expected = flatten(open_checkpoint(source).read())
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    if shards == 1:
        torch.save(tensors, source / "pytorch_model.bin")
    else:
        names = {name: f"pytorch_model-{i % shards}.bin" for i, name in enumerate(tensors)}
        for file in set(names.values()):
            torch.save({n: x for n, x in tensors.items() if names[n] == file}, source / file)
        (source / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))

    # When they are read, then they are the same, bit for bit
    found = flatten(open_checkpoint(source).read())
    assert found.keys() == expected.keys()
    assert all(found[path].tobytes() == x.tobytes() for path, x in expected.items())


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("evil"),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda t: _Evil(), "torch does not load it"),
        (lambda t: [1], "holds list, not a dictionary of tensors"),
        (lambda t: {**t, "x": 3}, "x: is not a dense tensor"),
        (lambda t: {**t, 3: t["projector.query"]}, "3 is no tensor name"),
        (lambda t: {**t, "x": torch.zeros(1).expand(1 << 40)}, "x: is not stored in full"),
        (lambda t: {**t, "x": t["projector.query"]}, "shares its memory with another tensor: (x|projector.query)$"),
        (
            lambda t: {**t, "projector.query": torch.zeros(3, 3)},
            r"wrong shape: projector.query \[3, 3\], not \[1, 3, 36\]",
        ),
        (
            lambda t: {**t, "projector.query": t["projector.query"].double()},
            "projector.query is float64; supported are",
        ),
    ],
)
def test_a_hostile_pytorch_model_bin_is_refused(tmp_path: Path, monkeypatch, make, message: str) -> None:
    # Given a file that torch would load, or run, when it is read, then the error says what is wrong, and nothing ran
    monkeypatch.chdir(tmp_path)
    hf_fixture.write_random_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(make(tensors), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path).read()
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CheckpointError, match="torch does not load it"):
        open_checkpoint(tmp_path).read()
    assert not (tmp_path / "evil").exists()


def test_an_export_works_with_transformers(source: Path, tmp_path: Path) -> None:
    # Given a checkpoint that came without processor files, when it goes to Orbax and back
    convert(source, tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "back")

    # Then transformers loads model and processor, and computes the same logits of the same prompt with audio
    answers = []
    for directory in (source, tmp_path / "back"):
        reference = GraniteSpeechForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
        processor = AutoProcessor.from_pretrained(tmp_path / "back")
        turn = [{"role": "user", "content": "<|audio|>can you transcribe the speech into a written format?"}]
        text = processor.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        sound = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 16_000)).astype(np.float32))
        with torch.no_grad():
            answers.append(reference(**processor(text, sound, return_tensors="pt")).logits.numpy())
    assert np.isfinite(answers[0]).all()
    np.testing.assert_array_equal(*answers)
