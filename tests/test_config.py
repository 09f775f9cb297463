"""config.json as strangers write it: what the model cannot compute is refused, by its key."""

import json
from pathlib import Path
from typing import Any

import hf_fixture
import pytest

from granite_jax.errors import CheckpointError
from granite_jax.model.config import Config

ROPE = {"rope_theta": 1e4, "rope_type": "default"}


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("text_config", "rms_norm_eps", float("nan"), "rms_norm_eps is nan, not a finite number"),
        ("text_config", "embedding_multiplier", float("inf"), "embedding_multiplier is inf, not a finite number"),
        ("text_config", "residual_multiplier", -(10**400), r"residual_multiplier is -1000+, not a finite number"),
        ("text_config", "logits_scaling", 0, "logits_scaling is not positive"),
        ("text_config", "rope_parameters", {**ROPE, "rope_theta": "x"}, "rope_theta is 'x', not float"),
        ("text_config", "rope_parameters", {**ROPE, "rope_theta": float("nan")}, "rope_theta is nan, not a finite"),
        ("text_config", "rope_parameters", {**ROPE, "rope_theta": -1}, "rope_theta is not positive"),
        ("text_config", "rope_parameters", {"rope_type": "yarn" * 999}, "rope scaling .* is not supported, only"),
        ("text_config", "pad_token_id", -1, "pad_token_id is outside the vocabulary"),
        ("text_config", "pad_token_id", 10**30, "pad_token_id is outside the vocabulary"),
        ("text_config", "eos_token_id", 10**30, "eos_token_id is outside the vocabulary"),
        ("text_config", "vocab_size", 10**400, "vocab_size is 1000+, not a positive 32-bit integer"),
        ("encoder_config", "num_layers", 2.0, r"num_layers is 2\.0, not int"),
        ("encoder_config", "hidden_dim", "x" * 5000, "hidden_dim is 'x+, not int"),
        ("projector_config", "layer_norm_eps", 1e999, "layer_norm_eps is inf, not a finite number"),
        ("projector_config", "hidden_act", "relu\x1b" * 999, r"hidden_act 'relu\\x1b.* is not supported, only 'gelu'"),
    ],
)
def test_values_that_no_model_has_are_refused_by_key(section: str, key: str, value: Any, message: str) -> None:
    # Given a sound configuration, when one value makes no sense, then a short message names its key
    raw = hf_fixture.make_config(hf_fixture.make_tokenizer(), False, "float32")
    Config.from_dict(raw)
    raw[section][key] = value
    with pytest.raises(CheckpointError, match=f"^config: .*{message}") as caught:
        Config.from_dict(raw)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not a readable JSON file"),
        (b"\xff{}", "not a readable JSON file"),
        (b"[" * 100_000, "not a readable JSON file"),
        (b'{"x": ' + b"1" * 5000 + b"}", r"not a readable JSON file \(Exceeds the limit"),
        (b"[1]", "holds list, not a JSON object"),
    ],
)
def test_files_that_are_no_json_object_are_named(tmp_path: Path, text: bytes, message: str) -> None:
    # Given a file that JSON readers trip over, when it is read, then the error names it
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        Config.from_file(tmp_path / "config.json")


def test_infinity_in_a_file_is_refused(tmp_path: Path) -> None:
    # Given Python's own spelling of infinity, which its JSON reader accepts, when it is read, then it is refused
    raw = hf_fixture.make_config(hf_fixture.make_tokenizer(), False, "float32")
    raw["text_config"]["attention_multiplier"] = float("inf")
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="attention_multiplier is inf"):
        Config.from_file(tmp_path / "config.json")
