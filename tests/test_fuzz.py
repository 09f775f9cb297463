"""Hostile checkpoints: damaged headers, indices and configurations, each of which is either read or refused by name.

No case may allocate more than its files hold. GRANITE_JAX_TESTS says how many cases there are: see conftest.py.
"""

import contextlib
import json
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hf_fixture
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from granite_jax.checkpoint.directory import Checkpoint
from granite_jax.convert import adapter
from granite_jax.errors import CheckpointError
from granite_jax.models.granite_speech.config import Config
from granite_jax.pretrained import open_checkpoint

pytestmark = pytest.mark.fuzz

SLACK = 3 << 20  # Python's objects for a header and the parameter tree's shapes
TINY: dict[str, Any] = {
    "encoder_config": {"num_layers": 1, "hidden_dim": 4, "dim_head": 2, "max_pos_emb": 40, "output_dim": 6},
    "projector_config": {"encoder_hidden_size": 4, "num_hidden_layers": 1, "hidden_size": 6, "intermediate_size": 4},
    "text_config": {"num_hidden_layers": 1, "hidden_size": 8, "head_dim": 4, "intermediate_size": 8},
}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "rank_pattern": {}, "bias": "none"}
MODULE = "base_model.model.language_model.model.layers.0.self_attn.q_proj"

SIZES = st.sampled_from([0, 1, 2, 3, 8, 2**31, 2**48, 2**63, 2**64 + 1, 10**30, -1])
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    SIZES,
    st.integers(-9, 99),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["F32", "BF16", "I64", "F4", "../x"]),
)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=4) | st.dictionaries(st.text(max_size=6), v, max_size=3), max_leaves=6
)


def check_refused_or_read(read: Callable[[], object], *files: Path) -> None:
    """`read` returns or raises CheckpointError, of one line, and allocates no more than the files hold."""
    held = sum(file.stat().st_size for file in files if file.is_file())
    peaks: list[int] = []
    # A thread that an earlier test left behind may allocate meanwhile, but not every time.
    while len(peaks) < 3 and (not peaks or peaks[-1] > held + SLACK):
        tracemalloc.start()
        try:
            read()
        except CheckpointError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, str(error)[:3000]
        finally:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
    assert peaks[-1] <= held + SLACK, f"{peaks} bytes allocated, files of {held}"


def read_leaves(opened: Checkpoint) -> None:
    for _ in opened.leaves():
        pass


def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """A copy of a JSON value with one member, at any depth, dropped, doubled under another name, or replaced."""
    if not isinstance(tree, dict | list) or not tree or draw(st.integers(0, 4)) == 0:
        return draw(VALUES)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key, action = draw(st.sampled_from(keys)), draw(st.sampled_from(["deeper"] * 4 + ["drop", "double"]))
    copy = tree.copy()
    if action == "deeper":
        copy[key] = mutated(draw, copy[key])
    elif action == "drop":
        del copy[key]
    elif isinstance(copy, dict):
        copy[draw(st.text(max_size=6) | st.sampled_from([f"{k}x" for k in keys[:3]]))] = copy[key]
    else:
        copy.append(copy[key])
    return copy


@st.composite
def damaged_text(draw: st.DrawFn, tree: Any) -> bytes:
    """JSON of a mutated tree; sometimes with bytes flipped, cut off or inserted."""
    for _ in range(draw(st.integers(1, 2))):
        tree = mutated(draw, tree)
    text = bytearray(json.dumps(tree).encode())
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        place = draw(st.integers(0, max(len(text) - 1, 0)))
        text[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    return bytes(text[: draw(st.sampled_from([len(text)] * 5 + [len(text) // 2]))])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint with an adapter. Tests damage one file, and put it back."""
    directory = tmp_path_factory.mktemp("fuzz")
    hf_fixture.write_random_checkpoint(directory, tied=True, **TINY)
    factors = {f"{MODULE}.lora_A.weight": np.zeros((2, 8), "f4"), f"{MODULE}.lora_B.weight": np.zeros((16, 2), "f4")}
    save_file(factors, directory / adapter.WEIGHTS)
    (directory / adapter.CONFIG).write_text(json.dumps(LORA))
    open_checkpoint(directory).read()  # it is sound, or the test would test nothing
    return directory


def safetensors(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


@contextlib.contextmanager
def replaced(file: Path, content: bytes) -> Iterator[None]:
    """The file with another content while inside."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


@pytest.mark.parametrize("name", ["model.safetensors", adapter.WEIGHTS])
def test_headers(base: Path, name: str) -> None:
    # Given a header with members, lengths or bytes changed
    file = base / name
    header, data = parts(file)
    opened = open_checkpoint(base)

    @given(
        damaged_text(header),
        st.sampled_from([None] * 8 + [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1]),
        st.sampled_from([0] * 6 + [1, 8, 100, len(data)]),
    )
    def check(text: bytes, length: int | None, cut: int) -> None:
        # When the weights are read, then they are read or refused
        with replaced(file, safetensors(text, data[: len(data) - cut], length)):
            check_refused_or_read(lambda: read_leaves(opened), *base.iterdir())

    check()


def test_indices(base: Path, tmp_path: Path) -> None:
    # Given shards whose index is damaged, with secrets outside the directory
    config = json.loads((base / "config.json").read_text())
    directory = tmp_path / "shards"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    hf_fixture.write_tensors(directory, hf_fixture.random_tensors(config, 0), shards=2)
    index, opened = directory / "model.safetensors.index.json", open_checkpoint(directory)
    (tmp_path / "x").write_bytes((directory / "model-00001-of-00002.safetensors").read_bytes())

    @given(damaged_text(json.loads(index.read_text())))
    def check(text: bytes) -> None:
        # When the weights are read, then they are read or refused
        with replaced(index, text):
            check_refused_or_read(lambda: read_leaves(opened), *directory.iterdir())

    check()


def test_adapter_configs(base: Path) -> None:
    # Given a damaged adapter_config.json
    file = base / adapter.CONFIG

    @given(damaged_text(LORA))
    def check(text: bytes) -> None:
        # When the weights are loaded, then they are loaded or refused
        with replaced(file, text):
            check_refused_or_read(lambda: read_leaves(open_checkpoint(base)), *base.iterdir())

    check()


def test_configs(base: Path) -> None:
    # Given a damaged config.json
    file = base / "config.json"

    @given(damaged_text(json.loads(file.read_text())))
    def check(text: bytes) -> None:
        # When the checkpoint is opened, then it is opened or refused
        with replaced(file, text), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "config.json: ")  # that the tensors decide what the file leaves open
            check_refused_or_read(lambda: open_checkpoint(base), *base.iterdir())

    check()


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("encoder_config", "num_layers"),
        ("encoder_config", "output_dim"),
        ("encoder_config", "feedforward_mult"),
        ("projector_config", "num_hidden_layers"),
        ("text_config", "num_hidden_layers"),
        ("text_config", "vocab_size"),
        ("text_config", "intermediate_size"),
    ],
)
@pytest.mark.parametrize("value", [2**31 - 1])
def test_configs_of_other_sizes_than_the_weights(base: Path, section: str, key: str, value: int) -> None:
    # Given a valid configuration of a larger model, when its weights are loaded, then the error names tensors
    file = base / "config.json"
    raw = json.loads(file.read_text())
    raw[section][key] = value
    with contextlib.suppress(CheckpointError):  # sizes whose product no array can have
        Config.from_dict(raw)
    with replaced(file, json.dumps(raw).encode()):
        tracemalloc.start()
        with pytest.raises(CheckpointError, match=r"missing|wrong shape|no place|exceeds|outside|too large|too many"):
            open_checkpoint(base).load_params("float32")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100 << 20  # of the tracing of the larger model
