"""Opening, loading and saving checkpoint directories."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hf_fixture
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from granite_jax.checkpoint.directory import parse_dtype
from granite_jax.checkpoint.tree import flatten, unflatten
from granite_jax.convert import convert
from granite_jax.errors import CheckpointError
from granite_jax.files.atomic import new_directory
from granite_jax.pretrained import load, open_checkpoint, save

TINY: dict[str, Any] = {
    "encoder_config": {"num_layers": 2, "hidden_dim": 8, "dim_head": 4, "max_pos_emb": 40},
    "projector_config": {"encoder_hidden_size": 8, "num_hidden_layers": 1},
    "text_config": {"num_hidden_layers": 2},
}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    hf_fixture.write_random_checkpoint(tmp_path / "hf", dtype="bfloat16", **TINY)
    return tmp_path / "hf"


@pytest.fixture
def own(hf: Path, tmp_path: Path) -> Path:
    convert(hf, tmp_path / "own")
    return tmp_path / "own"


def change_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", jnp.bfloat16, None])
def test_both_kinds_load_the_same_parameters(hf: Path, own: Path, dtype) -> None:
    # Given a checkpoint as Hugging Face and as Orbax directory, when both are loaded, verified or not
    config, expected = load(hf, dtype)
    loaded = [load(own, dtype), (open_checkpoint(own).config, open_checkpoint(own).load_params(dtype, verify=False))]

    # Then parameters and configuration are the same, in the dtype asked for
    wanted = jnp.dtype(dtype or jnp.float32)
    for found, params in loaded:
        assert found == config
        for path, leaf in flatten(params).items():
            assert isinstance(leaf, jax.Array)
            assert leaf.dtype == wanted, path
            np.testing.assert_array_equal(leaf, flatten(expected)[path], strict=True)


@pytest.mark.parametrize("verify", [True, False])
def test_parameters_arrive_in_their_sharding(own: Path, verify: bool) -> None:
    # Given a mesh over all devices, when parameters are loaded with one sharding or a tree of them
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = open_checkpoint(own).load_params("float32", replicated, verify)
    again = open_checkpoint(own).load_params("float32", jax.tree.map(lambda x: x.sharding, params), verify)

    # Then every leaf has it
    assert all(x.sharding == replicated for x in [*jax.tree.leaves(params), *jax.tree.leaves(again)])


@pytest.mark.parametrize("verify", [True, False])
def test_a_tree_of_shardings_must_be_the_parameters(own: Path, verify: bool) -> None:
    # Given a tree of shardings that lacks a leaf, or has one too many, when it is loaded into, then the error names it
    opened = open_checkpoint(own)
    shardings = unflatten(dict.fromkeys(opened.stored(), jnp.zeros(()).sharding))
    bias = shardings["encoder"]["out"].pop("bias")
    with pytest.raises(CheckpointError, match=r"^no sharding for encoder\.out\.bias$"):
        opened.load_params("float32", shardings, verify)
    shardings["encoder"]["out"] |= {"bias": bias, "extra": bias}
    with pytest.raises(CheckpointError, match=r"^a sharding for what is no leaf: encoder\.out\.extra$"):
        opened.load_params("float32", shardings, verify)


def test_of_two_writers_the_first_wins(tmp_path: Path) -> None:
    # Given two writers of one directory, when the first is done, then the second fails and leaves nothing
    with pytest.raises(OSError, match="not empty"), new_directory(tmp_path / "out") as second:
        (second / "file").write_text("second")
        with new_directory(tmp_path / "out") as first:
            (first / "file").write_text("first")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "first"


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    # Given a writer that is killed, and one that is not
    code = "import os, sys; from granite_jax.files.atomic import new_directory\n"
    code += "with new_directory(sys.argv[1]): os.kill(os.getpid(), 9)"
    killed = subprocess.run([sys.executable, "-c", code, tmp_path / "out"], check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with new_directory(tmp_path / "out") as alive:
        assert not left.exists()

        # When a third one writes to the same place, then what the killed one left is gone, and nothing of the other
        with contextlib.suppress(ZeroDivisionError), new_directory(tmp_path / "out"):
            raise ZeroDivisionError
        assert list(tmp_path.iterdir()) == [alive]


def test_no_file_names_the_directory_it_was_written_in(own: Path) -> None:
    # Given a checkpoint, when its files are searched for the path that they were written to, then it is nowhere
    assert [file for file in own.rglob("*") if file.is_file() and os.fsencode(own.parent) in file.read_bytes()] == []


def test_a_flipped_byte_is_detected_by_name(own: Path) -> None:
    # Given one flipped bit in the middle of the file that holds the weights
    file = max((own / "params").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)

    # When the checkpoint is loaded, then the error names the tensor; Orbax alone does not notice
    with pytest.raises(CheckpointError, match=r"damaged \(hash differs from tensors.json\): \w+\.\w+"):
        open_checkpoint(own).load_params()
    open_checkpoint(own).load_params(verify=False)


def test_a_changed_or_missing_hash_is_an_error(own: Path) -> None:
    # Given another hash, no hash, and no file of hashes; when the checkpoint is loaded, then the error says which
    path = own / "tensors.json"
    change_json(path, lambda t: t["encoder.out.bias"].update(sha256="0" * 64))
    with pytest.raises(CheckpointError, match=r"damaged \(hash differs from tensors.json\): encoder.out.bias$"):
        open_checkpoint(own).read()
    change_json(path, lambda t: t.pop("encoder.out.bias"))
    with pytest.raises(CheckpointError, match=r"no hash for encoder.out.bias$"):
        open_checkpoint(own).read()
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tensors.json: no such file; .*verify=False"):
        open_checkpoint(own).read()


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("encoder_config", {"num_layers": 3}, r"wrong shape: encoder\.layers.* \[2, .*\], not \[3, "),
        ("encoder_config", {"output_dim": 7}, r"wrong shape: encoder.out.bias \[348\], not \[7\]"),
        ("text_config", {"intermediate_size": 81}, r"wrong shape: decoder.layers.down.kernel .* not \[2, 81"),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_weights_of_another_config_are_named(own: Path, section: str, change: dict, message: str, verify: bool) -> None:
    # Given a config.json that the weights do not fit, when they are loaded, then the error names the leaves
    change_json(own / "config.json", lambda config: config[section].update(change))
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(own).load_params(verify=verify)


def test_damaged_orbax_metadata_is_a_checkpoint_error(own: Path) -> None:
    # Given Orbax metadata that is no JSON, when the weights are loaded, then the error names the directory
    for name in ("_METADATA", "_CHECKPOINT_METADATA"):
        for file in (own / "params").rglob(name):
            file.write_bytes(b"{")
    with pytest.raises(CheckpointError, match="own/params: "):
        open_checkpoint(own).read()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/no/such/directory", "/no/such/directory: no such directory$"),
        ("./nope", "./nope: no such directory$"),
        ("../nope", "../nope: no such directory$"),
        ("here/nope", "here/nope: no such directory$"),
        (Path("nope"), "nope: no such directory$"),
        ("a/b/c", "a/b/c: no such directory$"),
        ("x" * 5000, "no such directory"),
        ("file", "file: not a directory"),
        ("here", "here: no checkpoint, config.json is missing"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source, message: str) -> None:
    # Given a working directory with an empty directory and a file, when a source is opened, then the error is exact
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source)


def test_a_directory_must_be_of_one_kind(hf: Path, own: Path) -> None:
    # Given both kinds of weights, or neither, when the directory is opened, then it is refused
    assert (open_checkpoint(hf).kind, open_checkpoint(str(own)).kind) == ("hf", "orbax")
    (hf / "params").mkdir()
    with pytest.raises(CheckpointError, match="holds both params/ and model.safetensors"):
        open_checkpoint(hf)
    (hf / "params").rmdir()
    (hf / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds neither params/ nor model.safetensors"):
        open_checkpoint(hf)
    change_json(hf / "config.json", lambda config: config.update(model_type="whisper"))
    (hf / "params").mkdir()
    with pytest.raises(CheckpointError, match=r"hf/config\.json: config: model_type 'whisper'"):
        open_checkpoint(hf)


def test_saving_writes_all_or_nothing(hf: Path, tmp_path: Path) -> None:
    # Given parameters, when they are saved with their companions
    opened = open_checkpoint(hf)
    params = opened.load_params("float32")
    save(tmp_path / "new", opened.raw_config, params, tokenizer_file=hf / "tokenizer.json", chat_template="{{ x }}")

    # Then they can be opened; a tree that does not fit is named and leaves nothing; nothing is overwritten
    again = open_checkpoint(tmp_path / "new")
    stored = flatten(again.read())
    assert all(np.array_equal(x, stored[path]) for path, x in flatten(params).items())
    assert again.chat_template().source == "{{ x }}"
    assert again.tokenizer().vocab_size == opened.config.decoder.vocab_size
    del params["encoder"]["out"]["bias"]
    with pytest.raises(CheckpointError, match="missing: encoder.out.bias"):
        save(tmp_path / "bad", opened.raw_config, params)
    with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
        save(tmp_path / "new", opened.raw_config, params)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "new"}


def test_the_chat_template_is_found_wherever_it_is(hf: Path) -> None:
    # Given templates in every file that may carry one, when the preferred one goes, then the next is taken
    def put(name: str, template) -> None:
        content = {"chat_template": template, "bos_token": {"content": "<bos>"}, "eos_token": "<eos>"}
        (hf / name).write_text(json.dumps(content))

    put("tokenizer_config.json", [{"name": "other", "template": "no"}, {"name": "default", "template": "4"}])
    put("processor_config.json", "3")
    put("chat_template.json", "2")
    (hf / "chat_template.jinja").write_text("1")
    opened = open_checkpoint(hf)
    found = []
    for name in ("chat_template.jinja", "chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = opened.chat_template()
        found.append((template.source, template.bos_token, template.eos_token))
        (hf / name).unlink()
    assert found == [(source, "<bos>", "<eos>") for source in "1234"]
    assert opened.chat_template().source is None


def test_a_tokenizer_of_another_model_is_refused(hf: Path) -> None:
    # Given a tokenizer whose ids are not the model's, when it is opened, then the error says how they differ
    opened, path = open_checkpoint(hf), hf / "tokenizer.json"
    text, size = path.read_text(), opened.config.decoder.vocab_size
    assert opened.tokenizer().encode("the") == hf_fixture.make_tokenizer().encode("the").ids
    path.write_text(text.replace("<|audio|>", "<|other|>"))
    with pytest.raises(CheckpointError, match=r"tokenizer.json: the tokenizer has no token '<\|audio\|>'"):
        opened.tokenizer()
    path.write_text(text.replace("<|audio|>", "<|other|>").replace("<|pad|>", "<|audio|>"))
    with pytest.raises(CheckpointError, match=rf"<\|audio\|> is token {size - 3}, but {size - 1} in config.json"):
        opened.tokenizer()
    tokenizer = hf_fixture.make_tokenizer()
    tokenizer.add_special_tokens(["<|more|>"])
    tokenizer.save(str(path))
    with pytest.raises(CheckpointError, match=f"tokenizer.json: has {size + 1} tokens, the model {size}"):
        opened.tokenizer()


def test_the_tokenizer_class_decides_how_text_is_cut(hf: Path) -> None:
    # Given a file that keeps each character apart, when tokenizer_config.json names GPT-2's class, then its rule wins
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    change_json(
        hf / "tokenizer.json",
        lambda t: t.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, level]}),
    )
    lengths = {}
    for name in ("PreTrainedTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast"):
        change_json(hf / "tokenizer_config.json", lambda c, name=name: c.update(tokenizer_class=name))
        lengths[name] = len(open_checkpoint(hf).tokenizer().encode("speech"))
    assert (
        lengths["PreTrainedTokenizerFast"] == len("speech") > lengths["GPT2Tokenizer"] == lengths["GPT2TokenizerFast"]
    )


def test_capabilities_come_from_the_config(hf: Path) -> None:
    # Given a checkpoint that says what it was trained for, when it is opened, then its capabilities are that
    assert "translate" in open_checkpoint(hf).capabilities.tasks
    change_json(hf / "config.json", lambda c: c.update(granite_jax={"tasks": ["transcribe"], "languages": []}))
    assert open_checkpoint(hf).capabilities.tasks == ("transcribe",)


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", None, "float32"),
        ("tpu", None, "bfloat16"),
        ("gpu", "7.5", "float32"),
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
    ],
)
def test_the_default_dtype_is_what_the_device_has(monkeypatch, platform: str, capability, expected: str) -> None:
    # Given a device, when no dtype is asked for, then bfloat16 is chosen where the device has it
    device = SimpleNamespace(platform=platform, **({"compute_capability": capability} if capability else {}))
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert parse_dtype(None) == expected


@pytest.mark.parametrize("dtype", ["float16", "int8", "", 3, np.float64])
def test_other_dtypes_are_refused(dtype) -> None:
    # Given a dtype that is not supported, when it is asked for, then the error lists those that are
    with pytest.raises(CheckpointError, match='only "float32" and "bfloat16"'):
        parse_dtype(dtype)
