"""Conversion is a bijection on every tensor that carries information, and names what it cannot place."""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import hf_fixture
import ml_dtypes
import numpy as np
import pytest
from hf_fixture import TINY
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from granite_jax import cli
from granite_jax.audio.load import load_audio
from granite_jax.checkpoint.tree import expected_shapes, flatten, unflatten
from granite_jax.convert import convert, mapping, writer
from granite_jax.convert.reader import read_leaves
from granite_jax.errors import AudioError, CheckpointError
from granite_jax.models.granite_speech.config import Config, TensorFacts
from granite_jax.models.granite_speech.family import FAMILY
from granite_jax.pretrained import open_checkpoint

TABLE = FAMILY.tensors
FULL_SIZE = json.loads((Path(__file__).parents[1] / "granite_jax/models/granite_speech/config.json").read_text())
CLIP = Path(__file__).parents[1] / "samples" / "request.wav"
Q0 = "encoder.layers.0.attn.to_q.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    hf_fixture.write_random_checkpoint(tmp_path / "hf", **TINY)
    return tmp_path / "hf"


def read(directory: Path) -> dict:
    return unflatten(dict(read_leaves(directory, Config.from_file(directory / "config.json"))))


def all_tensors(directory: Path) -> dict[str, np.ndarray]:
    main = {k: v for file in directory.glob("model*.safetensors") for k, v in load_file(file).items()}
    head = directory / "out_llm.safetensors"
    return main | ({f"out_llm.{k}": v for k, v in load_file(head).items()} if head.exists() else {})


@pytest.mark.parametrize(
    ("dtype", "names", "tied", "shards", "bpe_labels"),
    [
        ("float32", "released", False, 1, 0),
        ("bfloat16", "released", True, 1, 9),
        ("bfloat16", "new", False, 3, 5),
        ("float16", "new", True, 2, 0),
        ("bfloat16", "nested", False, 2, 0),
        ("float32", "nested", True, 1, 7),
    ],
)
def test_round_trip_is_bit_exact(
    tmp_path: Path, dtype: str, names: Any, tied: bool, shards: int, bpe_labels: int
) -> None:
    # Given a checkpoint, with values whose bits arithmetic would not keep
    config = hf_fixture.write_random_checkpoint(tmp_path / "hf", tied=tied, dtype=dtype, bpe_labels=bpe_labels, **TINY)
    tensors = hf_fixture.random_tensors(config, seed=3)
    odd = np.array([0x7FC10000, 0xFF800000, 0x80000000, 0x00010000], np.uint32).view(np.float32)
    tensors["encoder.layers.1.ff1.up_proj.bias"][:4] = odd  # NaN with payload, -inf, -0, subnormal
    (tmp_path / "hf" / "model.safetensors").unlink()
    hf_fixture.write_tensors(tmp_path / "hf", tensors, names, shards, dtype)

    # When it is converted there and back
    convert(tmp_path / "hf", tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "back", names=names)

    # Then names, shapes, dtypes and bits are the same, and so are the other files
    before, after = all_tensors(tmp_path / "hf"), all_tensors(tmp_path / "back")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
        assert tensor.tobytes() == after[name].tobytes() or "num_batches_tracked" in name, name
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "hf" / file).read_bytes() == (tmp_path / "back" / file).read_bytes(), file
    assert before.get("out_llm.bias", np.zeros(0)).size == bpe_labels


def test_tensors_take_the_axes_the_modules_expect(source: Path) -> None:
    # Given a checkpoint, when its parameters are read
    tensors, leaves = all_tensors(source), flatten(read(source))
    layer, inner = "encoder.layers.1", 16

    def ours(path: str) -> np.ndarray:
        return leaves[f"encoder.layers.{path}"][1]

    # Then products run over the same axes as in the reference, key before value and value before gate
    np.testing.assert_array_equal(ours("attention.q.kernel"), tensors[f"{layer}.attn.to_q.weight"].T)
    key, value = np.split(tensors[f"{layer}.attn.to_kv.weight"], 2)
    np.testing.assert_array_equal(ours("attention.kv.kernel")[:, 0], key.T)
    np.testing.assert_array_equal(ours("attention.kv.kernel")[:, 1], value.T)
    up = tensors[f"{layer}.conv.up_conv.weight"][:, :, 0]
    np.testing.assert_array_equal(ours("convolution.up.kernel")[:, 1], up[inner:].T)
    np.testing.assert_array_equal(ours("convolution.up.bias")[0], tensors[f"{layer}.conv.up_conv.bias"][:inner])
    depthwise = tensors[f"{layer}.conv.depth_conv.conv.weight"]
    np.testing.assert_array_equal(ours("convolution.depthwise")[2], depthwise[:, 0, 2])
    np.testing.assert_array_equal(ours("convolution.batch_norm.var"), tensors[f"{layer}.conv.batch_norm.running_var"])


def test_full_size_accounts_for_every_tensor_of_the_release() -> None:
    # Given the configuration of granite-4.0-1b-speech and the tensors transformers has for it
    shapes = expected_shapes(Config.from_dict(FULL_SIZE))
    tensors = dict(hf_fixture.hf_shapes(FULL_SIZE))
    counters = [name for name in tensors if name.endswith("num_batches_tracked")]

    # When they are matched
    leaves, tied_head = mapping.match(tensors, TABLE, shapes)

    # Then every tensor but the counters has a place of its shape, and the sums are those of the released files
    placed = [name for leaf in leaves for name in leaf.names]
    assert sorted(placed + counters) == sorted(tensors)
    assert tied_head is None
    assert all(tensors[name] == leaf.tensor_shape for leaf in leaves for name in leaf.names)
    count = {part: sum(name.startswith(part) for name in tensors) for part in ("encoder", "projector", "language")}
    assert count == {"encoder": 534, "projector": 57, "language": 363}
    size = {
        part: sum(int(np.prod(s)) for p, s in shapes.items() if p.startswith(part)) for part in ("enc", "pro", "dec")
    }
    assert size == {"enc": 440_234_332, "pro": 35_697_664, "dec": 1_837_275_136}
    assert 2 * sum(size.values()) + 8 * len(counters) == 4_626_414_392


@pytest.mark.parametrize("tied", [False, True])
def test_the_table_covers_the_parameter_tree(tied: bool) -> None:
    # Given the parameter tree, when it is compared with the table, then each leaf has exactly one rule
    config = hf_fixture.make_config(hf_fixture.make_tokenizer(), tied, "float32")
    paths = [rule.path for rule in TABLE.rules]
    assert len(set(paths)) == len(paths) == len({rule.hf for rule in TABLE.rules})
    head = {"decoder.head.kernel"} if tied else set()
    assert set(paths) - head == set(
        expected_shapes(Config.from_dict(config, TensorFacts(not tied, 8, bpe_output_dim=5)))
    )


def test_names_translate_both_ways() -> None:
    # Given every released name, when it is respelt, then it is what other transformers have, and it comes back
    for name, _ in hf_fixture.hf_shapes(FULL_SIZE):
        for names in mapping.SPELLINGS:
            assert mapping.spelled(name, names) == hf_fixture.spell(name, names)
            assert mapping.released_name(hf_fixture.spell(name, names)) == name


def test_wrapped_models_are_read(source: Path, tmp_path: Path) -> None:
    # Given the weights as compiled, distributed and wrapped models save them
    expected, weights = read(source), all_tensors(source)
    for wrapped in ("_orig_mod.{}", "module.{}", "module._orig_mod.{}", "_orig_mod.module.{}", "base_model.model.{}"):
        save_file({wrapped.format(name): x for name, x in weights.items()}, source / "model.safetensors")
        # When they are read, then they are the model's
        found = read(source)
        assert all(np.array_equal(x, flatten(found)[path]) for path, x in flatten(expected).items())
    # And so they are where a wrapper is within the model
    assert (
        mapping.released_name("encoder._fsdp_wrapped_module.layers.0._checkpoint_wrapped_module.attn.to_q.weight") == Q0
    )


def test_an_adapter_that_is_not_merged_is_named(source: Path) -> None:
    # Given the weights of a peft model, when they are read, then the error says what they are and what to save
    weights = all_tensors(source)
    weights[Q0.replace("to_q.", "to_q.base_layer.")] = weights.pop(Q0)
    save_file({f"base_model.model.{name}": x for name, x in weights.items()}, source / "model.safetensors")
    with pytest.raises(CheckpointError, match="hf: the weights are of a peft model whose adapter is not merged: save"):
        read(source)


def test_one_option_writes_any_spelling(source: Path, tmp_path: Path) -> None:
    # Given a checkpoint, when it is written in any spelling, then the names are that spelling, and the bits the same
    expected = all_tensors(source)
    for names in mapping.SPELLINGS:
        convert(source, tmp_path / names / "own")
        convert(tmp_path / names / "own", tmp_path / names / "hf", names=names)
        found = all_tensors(tmp_path / names / "hf")
        assert set(found) == {hf_fixture.spell(name, names) for name in expected}
        assert all(found[hf_fixture.spell(name, names)].tobytes() == x.tobytes() for name, x in expected.items()
                   if "num_batches_tracked" not in name)  # fmt: skip


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"weight": (5, 9), "bias": (5,)}, r"wrong shape: out_llm.weight \[5, 9\], not \[5, 8\]"),
        ({"weight": (5, 8)}, "missing: out_llm.bias"),
        ({"bias": (5,)}, "no place in the model for out_llm.bias"),
        ({"weight": (5, 8), "bias": (5,), "scale": (5,)}, "no place in the model for out_llm.scale"),
        ({"weight": (400, 8), "bias": (400,)}, "the BPE head has 400 labels, more than the vocabulary and a blank"),
    ],
)
def test_a_bpe_head_that_does_not_fit_is_named(source: Path, head: dict[str, Any], message: str) -> None:
    # Given an out_llm.safetensors of another model, when the checkpoint is read, then the error names the tensor
    save_file({name: np.zeros(shape, np.float32) for name, shape in head.items()}, source / "out_llm.safetensors")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(source).stored()


def test_a_damaged_bpe_head_is_noticed(tmp_path: Path) -> None:
    # Given a converted checkpoint whose BPE head has another hash, when it is loaded, then the error names the leaf
    hf_fixture.write_random_checkpoint(tmp_path / "hf", bpe_labels=6, **TINY)
    convert(tmp_path / "hf", tmp_path / "own")
    tensors = json.loads((tmp_path / "own" / "tensors.json").read_text())
    tensors["encoder.out_bpe.kernel"]["sha256"] = "0" * 64
    (tmp_path / "own" / "tensors.json").write_text(json.dumps(tensors))
    with pytest.raises(CheckpointError, match=r"damaged .*: encoder.out_bpe.kernel$"):
        open_checkpoint(tmp_path / "own").read()


def test_casting_casts_the_declared_dtype_too(source: Path, tmp_path: Path) -> None:
    # Given a float32 checkpoint, when it is converted to bfloat16 and exported to float32
    report = convert(source, tmp_path / "own", dtype="bfloat16")
    convert(tmp_path / "own", tmp_path / "back", dtype="float32")

    # Then values are rounded once, and config.json declares what is stored
    assert report.dtype == "bfloat16"
    before, after = all_tensors(source), all_tensors(tmp_path / "back")
    np.testing.assert_array_equal(after[Q0], before[Q0].astype(ml_dtypes.bfloat16).astype(np.float32))
    declared = {name: json.loads((tmp_path / name / "config.json").read_text())["dtype"] for name in ("own", "back")}
    assert declared == {"own": "bfloat16", "back": "float32"}


def test_large_checkpoints_are_sharded(source: Path, tmp_path: Path) -> None:
    # Given a limit on the size of a file, when a checkpoint is exported
    convert(source, tmp_path / "own")
    opened, out, limit = open_checkpoint(tmp_path / "own"), tmp_path / "out", 40_000
    out.mkdir()
    writer.export(opened, out, max_bytes=limit)

    # Then no file of several tensors exceeds it, tensors are aligned, and reading gives the same
    files = sorted(out.glob("model-*-of-*.safetensors"))
    assert len(files) > 2
    for file in files:
        length = struct.unpack("<Q", file.read_bytes()[:8])[0]
        assert length % 8 == 0
        assert file.stat().st_size - length - 8 <= limit or len(load_file(file)) == 1
    before = all_tensors(source)
    assert all(np.array_equal(x, before[name]) or not x.ndim for name, x in all_tensors(out).items())
    assert flatten(read(out)).keys() == flatten(opened.read()).keys()


def test_the_report_and_progress_count_tensors(source: Path, tmp_path: Path) -> None:
    # Given a checkpoint, when it is converted both ways
    seen: list[tuple[int, int]] = []
    there = convert(source, tmp_path / "own", progress=lambda *x: seen.append(x))
    back = convert(tmp_path / "own", tmp_path / "back")

    # Then the report counts tensors and parameters, and progress ends with all tensors
    tensors = {name: x for name, x in all_tensors(source).items() if x.ndim}
    assert (there.kind, back.kind) == ("orbax", "hf")
    assert there.tensors == back.tensors == len(tensors) == seen[-1][0] == seen[-1][1]
    assert sum(there.parameters.values()) == sum(x.size for x in tensors.values())
    assert back.bytes == sum(file.stat().st_size for file in (tmp_path / "back").iterdir())


@pytest.mark.parametrize("direction", ["import", "export"])
def test_an_interrupted_conversion_leaves_nothing(source: Path, tmp_path: Path, direction: str, monkeypatch) -> None:
    # Given a conversion that is interrupted while it writes
    if direction == "export":
        convert(source, tmp_path / "own")
    before = sorted(tmp_path.rglob("*"))

    def interrupt(*_):
        assert len(list(tmp_path.glob(".out.partial-*"))) == 1
        raise KeyboardInterrupt

    # When it is
    with pytest.raises(KeyboardInterrupt):
        if direction == "export":
            convert(tmp_path / "own", tmp_path / "out", progress=interrupt)
        else:
            monkeypatch.setattr("granite_jax.checkpoint.orbax.ocp.partial.save", interrupt)
            convert(source, tmp_path / "out")

    # Then nothing is left of it
    assert sorted(tmp_path.rglob("*")) == before


def test_a_destination_in_use_is_refused(source: Path, tmp_path: Path) -> None:
    # Given a directory that holds something, when it is the destination, then it is left alone
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
        convert(source, tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]
    with pytest.raises(CheckpointError, match="'old' is none of nested, new, released"):
        convert(source, tmp_path / "other", names="old")  # type: ignore[arg-type]


def test_a_leaf_of_several_dtypes_is_read_as_the_widest(tmp_path: Path) -> None:
    # Given a bfloat16 checkpoint with one layer's tensor in float32, as a fine-tune may leave it
    hf_fixture.write_random_checkpoint(tmp_path / "hf", **TINY, dtype="bfloat16")
    path = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(path)
    tensors[Q0] = np.random.default_rng(0).normal(size=tensors[Q0].shape).astype(np.float32)
    save_file(tensors, path)
    # When it is loaded, or converted to a dtype, then the tensor has its values
    for dtype in ("float32", "bfloat16"):
        loaded = flatten(open_checkpoint(tmp_path / "hf").load_params(dtype))["encoder.layers.attention.q.kernel"]
        expected = tensors[Q0].T.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float32)
        assert np.array_equal(np.asarray(loaded[0]), expected)
        report = convert(tmp_path / "hf", tmp_path / dtype, dtype=dtype)
        assert report.dtype == dtype
    # And a conversion that keeps dtypes, which could not come back, names the tensor and the option
    with pytest.raises(
        CheckpointError, match=r"is bfloat16, encoder\.layers\.0\.attn\.to_q.* float32: pass dtype \(--dtype\)"
    ):
        convert(tmp_path / "hf", tmp_path / "kept")


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a2146' * 8}\nsize 12345\n"
LFS = "is a Git LFS pointer: the file itself is not here (git lfs pull)"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json: no such file"),
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tokenizer.json", "", "tokenizer.json"),
        ("tokenizer.json", POINTER, f"tokenizer.json: {LFS}"),
        ("config.json", POINTER, f"config.json: {LFS}"),
        ("model.safetensors", POINTER, f"model.safetensors: {LFS}"),
        ("chat_template.jinja", POINTER, f"chat_template.jinja: {LFS}"),
        ("tokenizer_config.json", POINTER, f"tokenizer_config.json: {LFS}"),
        ("chat_template.jinja", "{{ messages", "chat template: "),
        ("chat_template.jinja", "hello", "chat template: has the instruction 0 times, expected once"),
    ],
)
@pytest.mark.parametrize("command", ["convert", "inspect", "transcribe"])
def test_what_is_missing_for_text_is_found(source: Path, command: str, name: str, content: str, message: str) -> None:
    # Given a checkpoint one of whose files is missing, damaged, or a Git LFS pointer
    (source / name).unlink(missing_ok=True)
    if content is not None:
        (source / name).write_text(content)
    # When it is converted, inspected or loaded, then one line names the file, and nothing is written
    arguments = {"convert": [source, source.parent / "own"], "transcribe": [CLIP, "--checkpoint", source]}
    result = CliRunner().invoke(cli.app, [command, *map(str, arguments.get(command, [source]))])
    assert result.exit_code == (2 if command == "transcribe" else 1)
    (error,) = result.stderr.splitlines()
    assert message in error
    assert [path.name for path in source.parent.iterdir()] == ["hf"]


def test_pointers_among_orbaxs_files_are_recognized(source: Path, tmp_path: Path) -> None:
    # Given a converted checkpoint whose arrays were not fetched, when it is loaded, then the file is named
    convert(source, tmp_path / "own")
    path = max(
        (path for path in (tmp_path / "own" / "params").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
    )
    path.write_text(POINTER)
    with pytest.raises(CheckpointError, match=re.escape(f"{path}: {LFS}")):
        open_checkpoint(tmp_path / "own").load_params("float32")


def test_audio_that_is_a_pointer_is_recognized(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text(POINTER)
    with pytest.raises(AudioError, match=re.escape(f"a.wav: {LFS}")):
        load_audio(tmp_path / "a.wav")


WITH_QUOTA = """
import resource, sys
from granite_jax import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
cli.app(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("quota", [1000, 100_000, 1_000_000])
@pytest.mark.parametrize("kind", ["orbax", "hf"])
def test_a_full_disk_is_one_line(tmp_path: Path, kind: str, quota: int) -> None:
    # Given room for files of so many bytes, when a checkpoint is converted, then one line says so, and nothing is left
    source = "demo"
    if kind == "orbax":
        source = str(tmp_path / "hf")
        convert("demo", source)
    command = [sys.executable, "-c", WITH_QUOTA, str(quota), "convert", source, str(tmp_path / "new" / "own")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "File too large" in line
    assert not list((tmp_path / "new").iterdir())
