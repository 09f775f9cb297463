"""The objects that say what a caller wants: checked where they are made, the same for every way in."""

import dataclasses
import inspect
import json
from pathlib import Path

import numpy as np
import pytest

import granite_jax as gj
from granite_jax import batch, evaluation
from granite_jax.batch.ray_data import Transcribe
from granite_jax.errors import GraniteError
from granite_jax.options import ModelOptions, TranscribeOptions, resolve


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "summarize"}, "unknown task 'summarize'"),
        ({"task": "translate"}, "needs target_language"),
        ({"prompt": "two\nlines", "allow_custom_prompt": True}, "control character"),
        ({"prompt": 3}, "prompt must be a string, not int"),
        ({"prompt": "x", "language": "fr"}, "a prompt excludes target_language and language"),
        ({"task": "translate", "target_language": "fr", "language": "en"}, "is a hint for transcripts"),
        ({"draft_from": "words"}, "draft_from is"),
        ({"draft_from": "bpe", "speculative": False}, "draft_from is for drafts"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, not a positive number"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"speculative": "fast"}, "speculative is one of"),
        ({"verify_threshold": 0.5}, "verify_threshold is for relaxed modes"),
        ({"keywords": "Kowalczyk"}, "keywords must be a list of strings"),
        ({"keyword_boost": -1}, "keyword_boost is -1"),
        ({"keyword_gate": 1.0}, "keyword_gate is 1.0"),
        ({"keywords_in": "nowhere"}, "keywords_in is one of"),
    ],
)
def test_what_is_to_be_written_is_checked_where_it_is_said(fields: dict, message: str) -> None:
    # Given a field that makes no sense, when the object is made, or a field of one replaced, then the field is named
    with pytest.raises(gj.GraniteError, match=message):
        TranscribeOptions(**fields)
    with pytest.raises(gj.GraniteError, match=message):
        dataclasses.replace(TranscribeOptions(), **fields)


@pytest.mark.parametrize("fields", [{"batch_size": 0}, {"model_parallel": 1.5}, {"parallel": "both"}])
def test_where_a_model_runs_is_checked_where_it_is_said(fields: dict) -> None:
    with pytest.raises(gj.GraniteError, match=next(iter(fields))):
        ModelOptions(**fields)


def test_drafts_are_for_raw_transcripts_alone() -> None:
    # Given tasks whose text the CTC head does not write, when drafts are asked for, then it makes none
    assert TranscribeOptions().drafting.drafts and TranscribeOptions().raw
    for fields in ({"task": "punctuate"}, {"prompt": "what?"}, {"speculative": False}):
        assert not TranscribeOptions(**fields).drafting.drafts


def test_numbers_of_numpy_are_plain_numbers() -> None:
    # Given options with NumPy's numbers, and keywords as a mapping
    options = TranscribeOptions(
        max_new_tokens=np.int64(9),
        keyword_boost=np.float32(2.5),
        keyword_gate=np.float64(-1),
        keywords={"Kai": np.int8(3)},
    )
    # When they are written as JSON, as the identity of a job is, then they read as plain ones do
    plain = TranscribeOptions(max_new_tokens=9, keyword_boost=2.5, keyword_gate=-1.0, keywords=[("Kai", 3)])
    assert json.dumps(dataclasses.asdict(options)) == json.dumps(dataclasses.asdict(plain))
    assert options == plain and ModelOptions(batch_size=np.int32(2)).batch_size == 2
    with pytest.raises(GraniteError, match="not a positive number"):
        ModelOptions(batch_size=np.int32(-1))


def test_equal_options_are_one(tmp_path: Path) -> None:
    # Given options with keywords, when compared and hashed, then equal ones share batches
    first, second = (TranscribeOptions(keywords=["a", ("b", 2.0)]) for _ in range(2))  # pyright: ignore
    assert first == second and len({first, second, TranscribeOptions()}) == 2


def test_fields_replace_those_of_either_object() -> None:
    # Given both objects, when fields of each are given beside them, then they take their places
    model, options = resolve(ModelOptions(batch_size=4), TranscribeOptions(task="punctuate"), {"dtype": "float32"})
    assert (model, options) == (ModelOptions(batch_size=4, dtype="float32"), TranscribeOptions(task="punctuate"))
    assert resolve("a/dir", None, {"max_new_tokens": 3})[0].checkpoint == "a/dir"
    with pytest.raises(TypeError, match="nonsense"):
        resolve("demo", None, {"nonsense": 1})


@pytest.mark.parametrize(
    ("function", "classes"),
    [
        (gj.Transcriber.transcribe, [TranscribeOptions]),
        (gj.Transcriber.from_pretrained, [ModelOptions]),
        (batch.run, [ModelOptions, TranscribeOptions]),
        (evaluation.evaluate, [ModelOptions, TranscribeOptions]),
        (Transcribe.__init__, [ModelOptions, TranscribeOptions]),
    ],
)
def test_help_shows_every_field(function, classes: list[type]) -> None:
    # Given a function that takes fields of the objects, when its signature is shown, then they are all there
    shown = inspect.signature(function).parameters
    assert [f.name for cls in classes for f in dataclasses.fields(cls) if f.name not in shown] == []
