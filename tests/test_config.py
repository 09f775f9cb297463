"""config.json as strangers write it: what the model cannot compute is refused, by its key."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import hf_fixture
import pytest

from granite_jax.batch.parts import weights_identity
from granite_jax.checkpoint.tree import expected_shapes, flatten
from granite_jax.convert import convert
from granite_jax.errors import CheckpointError, GraniteError
from granite_jax.models.granite_speech.config import Config, TensorFacts
from granite_jax.models.granite_speech.releases import RELEASES, release_of
from granite_jax.models.registry import release as release_named
from granite_jax.pretrained import open_checkpoint

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


# Keys whose meaning depends on the transformers that wrote the file.


def changed(**changes: Any) -> dict[str, Any]:
    """A configuration of 2 encoder heads and a hidden size of 40; None takes a key away, `null` makes it null."""
    raw = hf_fixture.make_config(hf_fixture.make_tokenizer(), False, "float32")
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        target = raw[section] if section else raw
        if value is None:
            target.pop(name, None)
        else:
            target[name] = None if value == "null" else value
    return raw


OLD, MIDDLE, NEW = "4.57.6", "5.8.1", "5.24.0"


@pytest.mark.parametrize(
    ("version", "value", "attention_dim", "expected"),
    [
        (OLD, None, 0, 128),
        (MIDDLE, None, 0, 128),
        ("5.9.0", None, 0, 20),
        (NEW, None, 0, 20),
        ("5.21.0.dev0", "null", 0, 20),
        (None, "null", 0, 20),  # only new releases read null at all
        (None, 7, 0, 7),
    ],
)
def test_the_width_of_encoder_heads_is_what_the_writer_meant(version, value, attention_dim, expected) -> None:
    # Given a file without dim_head, or with null, when it is read, then the width is what its transformers would take
    raw = changed(encoder_config__dim_head=value, transformers_version=version)
    assert Config.from_dict(raw, TensorFacts(True, attention_dim)).encoder.dim_head == expected


def test_without_a_version_the_tensors_tell_the_width_of_encoder_heads() -> None:
    # Given neither dim_head nor a version, when the tensors are known, then they decide, which is told
    raw = changed(encoder_config__dim_head=None)
    for attention_dim, dim_head in ((256, 128), (40, 20)):
        with pytest.warns(UserWarning, match=f"dim_head is absent, and the tensors make it {dim_head}"):
            assert Config.from_dict(raw, TensorFacts(True, attention_dim)).encoder.dim_head == dim_head
    # And otherwise, or if they fit neither meaning, the key is named
    for facts in (None, TensorFacts(True, 50)):
        with pytest.raises(CheckpointError, match="dim_head is absent, which means 128 or 20"):
            Config.from_dict(raw, facts)
    # And where both mean the same, nothing is told
    raw["encoder_config"]["hidden_dim"] = raw["projector_config"]["encoder_hidden_size"] = 256
    assert Config.from_dict(raw).encoder.dim_head == 128


@pytest.mark.parametrize("value", [None, "null"])
def test_absent_heads_of_keys_are_as_many_as_those_of_queries(value: str | None) -> None:
    # Given no num_key_value_heads and no head_dim, when it is read, then every query head has its own, equally wide
    raw = changed(text_config__num_key_value_heads=value, text_config__head_dim=value)
    assert (Config.from_dict(raw).decoder.num_key_value_heads, Config.from_dict(raw).decoder.head_dim) == (4, 12)


# Version, top level, text_config, whether there is a head -> tied; found by running those releases, but 4.57.
TIES = [
    (OLD, None, True, False, True),
    (OLD, False, True, True, True),  # and the head must repeat the embedding
    (OLD, True, False, True, False),
    (MIDDLE, False, None, False, False),  # a missing head, which is named later
    (MIDDLE, True, False, True, False),
    (MIDDLE, False, True, False, True),
    (MIDDLE, None, True, True, False),  # a head that is there is used
    (NEW, None, None, False, True),
    (NEW, None, False, False, True),
    (NEW, True, False, False, True),
    (NEW, True, True, True, False),
    ("5.10.0", None, False, False, True),
    ("5.9.1", None, False, False, False),
    (None, True, True, False, True),
    (None, None, True, False, True),
    (None, True, True, True, False),
    (None, None, None, True, False),
    (None, True, False, True, False),
]


@pytest.mark.parametrize(("version", "top", "text", "has_head", "tied"), TIES)
def test_ties_are_what_the_writer_meant(version, top, text, has_head: bool, tied: bool) -> None:
    # Given keys that are absent or contradict each other, when they are read, then the writer's transformers decides
    raw = changed(tie_word_embeddings=top, text_config__tie_word_embeddings=text, transformers_version=version)
    assert Config.from_dict(raw, TensorFacts(has_head, 24)).decoder.tie_word_embeddings is tied


@pytest.mark.parametrize(
    ("version", "top", "text", "wrong"),
    [
        (None, None, None, "is absent"),
        (None, False, True, "contradicts itself"),
        (NEW, False, True, "contradicts itself"),  # these would make the missing head of nothing
        (MIDDLE, True, None, "contradicts itself"),
    ],
)
def test_a_missing_head_that_any_key_ties_is_tied(version, top, text, wrong: str) -> None:
    # Given unclear keys, when there is no head, then that decides, and is told
    raw = changed(tie_word_embeddings=top, text_config__tie_word_embeddings=text, transformers_version=version)
    with pytest.warns(UserWarning, match=f"tie_word_embeddings {wrong}, and the tensors have no output head"):
        assert Config.from_dict(raw, TensorFacts(False, 24)).decoder.tie_word_embeddings
    # And without tensors and version, the key is named
    if version is None:
        with pytest.raises(CheckpointError, match=f"tie_word_embeddings {wrong}, which means one or the other"):
            Config.from_dict(raw)


def test_a_wrong_guess_about_the_head_names_it(tmp_path: Path) -> None:
    # Given a file that its transformers would not tie, without a head, when it is opened, then the head is missed
    hf_fixture.write_random_checkpoint(tmp_path, tied=True, **hf_fixture.TINY)
    raw = json.loads((tmp_path / "config.json").read_text()) | {
        "transformers_version": NEW,
        "tie_word_embeddings": False,
    }
    raw["text_config"]["tie_word_embeddings"] = False
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="missing: language_model.lm_head.weight"):
        open_checkpoint(tmp_path).stored()


@pytest.mark.parametrize("kind", ["hf", "orbax"])
def test_open_questions_are_answered_by_the_tensors_of_either_format(tmp_path: Path, kind: str) -> None:
    # Given a file without a version, dim_head and ties, of a tied checkpoint with a BPE head, when it is opened
    config = hf_fixture.write_random_checkpoint(
        tmp_path / "hf", tied=True, bpe_labels=9, encoder_config={"dim_head": 128, "num_layers": 2},
    )  # fmt: skip
    if kind == "orbax":
        convert(tmp_path / "hf", tmp_path / "orbax")
    del (
        config["encoder_config"]["dim_head"],
        config["tie_word_embeddings"],
        config["text_config"]["tie_word_embeddings"],
    )
    (tmp_path / kind / "config.json").write_text(json.dumps(config))
    with pytest.warns(UserWarning, match=r"^config.json: "):
        opened = open_checkpoint(tmp_path / kind)

    # Then its tensors decide, and it loads
    assert opened.config.encoder.dim_head == 128 and opened.config.decoder.tie_word_embeddings
    assert opened.config.encoder.bpe_output_dim == 9
    assert flatten(opened.read())["encoder.out_bpe.kernel"].shape == (40, 9)


# Published models.


def test_published_models_have_configurations_without_weights() -> None:
    # Given the registry, when the models are counted, then their sizes are those of the released files
    sizes = {}
    for name, release in RELEASES.items():
        shapes = expected_shapes(release.config)
        assert "encoder.out_bpe.bias" in shapes or name.endswith(("3.3-2b", "3.3-8b", "4.0-1b-speech"))
        sizes[name] = round(sum(math.prod(shape) for shape in shapes.values()) / 1e9, 2)
    assert sizes == {
        "granite-speech-3.3-2b": 3.01,
        "granite-speech-3.3-8b": 8.65,
        "granite-4.0-1b-speech": 2.31,
        "granite-speech-4.1-2b": 2.42,
        "granite-speech-5.0-2b": 2.42,
    }
    with pytest.raises(GraniteError, match="no published model 'granite-9' is known, only granite-speech-3.3-2b,"):
        release_named("granite-9")


@pytest.mark.parametrize(
    ("raw", "directory", "name", "found"),
    [
        ({}, "models/mine", "granite-4.0-1b-speech", None),
        (
            {"_name_or_path": "ibm-granite/granite-4.0-1b-speech"},
            "mine",
            "granite-4.0-1b-speech",
            "granite-4.0-1b-speech",
        ),
        ({"granite_jax": {"model": "granite-speech-3.3-2b"}}, "mine", "granite-speech-3.3-2b", "granite-speech-3.3-2b"),
        ({}, "cache/ibm-granite--granite-4.0-1b-speech/0123", "granite-4.0-1b-speech", "granite-4.0-1b-speech"),
        ({}, "models/Granite-4.0-1b-Speech", "granite-4.0-1b-speech", "granite-4.0-1b-speech"),
        ({"_name_or_path": "./granite-speech-3.3-2b/"}, "mine", "granite-speech-3.3-2b", "granite-speech-3.3-2b"),
        ({}, "mine", "granite-speech-4.1-2b", "granite-speech-4.1-2b"),
        ({}, "granite-4.0-1b-speech", "granite-speech-5.0-2b", "granite-speech-5.0-2b"),  # has YaRN, whatever its name
        ({"_name_or_path": 3, "granite_jax": []}, "mine", "granite-speech-5.0-2b", "granite-speech-5.0-2b"),
    ],
)
def test_checkpoints_are_recognized_by_name_or_by_what_only_one_model_has(raw, directory, name, found) -> None:
    # Given a configuration and a directory, when its model is asked for, then it is that of the name or of the shapes
    known = release_of(RELEASES[name].config, raw, Path(directory))
    assert (known and known.name) == found


def test_a_conversion_keeps_the_name_that_only_the_directory_told(tmp_path: Path) -> None:
    # Given a checkpoint that is known by its directory, when it goes to Orbax and back, then it is still known
    hf_fixture.write_random_checkpoint(tmp_path / "granite-4.0-1b-speech", **hf_fixture.TINY)
    convert(tmp_path / "granite-4.0-1b-speech", tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "back")
    for directory in ("own", "back"):
        opened = open_checkpoint(tmp_path / directory)
        assert opened.release is RELEASES["granite-4.0-1b-speech"]
        assert opened.capabilities.tasks == ("transcribe", "translate")
    # And a job does not mix its results with those of another name
    assert weights_identity(open_checkpoint(tmp_path / "own")) != weights_identity(renamed(tmp_path))


def renamed(directory: Path) -> Any:
    """The same weights, known as another model."""
    raw = json.loads((directory / "own" / "config.json").read_text()) | {
        "granite_jax": {"model": "granite-speech-4.1-2b"}
    }
    opened = open_checkpoint(directory / "own")
    return dataclasses.replace(opened, raw_config=raw)
