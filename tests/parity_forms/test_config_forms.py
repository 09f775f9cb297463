"""Forms of config.json that are newer than transformers 5.8.1, or that releases read differently, against 5.24.0.

Run by `make parity-forms`, in an environment of its own. That release does not divide logits by `logits_scaling`.
"""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_fixture
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from goldens.cases import PROMPT, sounds
from transformers import GraniteSpeechForConditionalGeneration

from granite_jax.checkpoint.tree import flatten
from granite_jax.convert import convert
from granite_jax.models import granite_speech
from granite_jax.models.layers.features import log_mel, num_frames
from granite_jax.pretrained import open_checkpoint
from granite_jax.recognition.buckets import make_bucket
from granite_jax.transcriber import Transcriber

if transformers.__version__ != "5.24.0":
    raise ImportError(f"the oracle is transformers 5.24.0, not {transformers.__version__}")

TOLERANCE, TIE, NEW_TOKENS = 1e-4, 1e-3, 16
ORACLE = {"guards": False, "segment_seconds": None}
SOUNDS = ("noise-0.3s", "speech-numbers", "speech-30s")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 10000.0}
WIDE = {"encoder_config": {"dim_head": 20}}  # what an absent dim_head means since 5.9


def without(*paths: str) -> Callable[[dict[str, Any]], None]:
    """Takes keys away."""

    def change(config: dict[str, Any]) -> None:
        for path in paths:
            section, _, key = path.rpartition(".")
            (config[section] if section else config).pop(key, None)

    return change


def with_values(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Sets keys; `section__key` is one of a section."""

    def change(config: dict[str, Any]) -> None:
        for path, value in values.items():
            section, _, key = path.rpartition("__")
            (config[section] if section else config)[key] = value

    return change


# Name: what the weights are made for, whether they are tied, the changes of config.json, the version that it states.
FORMS: dict[str, tuple[dict[str, Any], bool, list[Callable[[dict[str, Any]], None]], str | None]] = {
    "dim_head absent": (WIDE, False, [without("encoder_config.dim_head")], "5.24.0"),
    "dim_head null": (WIDE, False, [with_values(encoder_config__dim_head=None)], None),
    "dim_head absent, no version": (WIDE, False, [without("encoder_config.dim_head")], None),
    "num_key_value_heads absent": (
        {"text_config": {"num_key_value_heads": 4}},
        False,
        [without("text_config.num_key_value_heads")],
        "5.24.0",
    ),
    "num_key_value_heads null": (
        {"text_config": {"num_key_value_heads": 4}},
        False,
        [with_values(text_config__num_key_value_heads=None)],
        None,
    ),
    "yarn in rope_parameters": (
        {"text_config": {"rope_parameters": YARN, "max_position_embeddings": 512}}, False, [], "5.24.0",
    ),
    "yarn in rope_scaling": (
        {"text_config": {"rope_parameters": None, "rope_scaling": YARN, "max_position_embeddings": 512}},
        False, [], None,
    ),
    "yarn, options": (
        {
            "text_config": {
                "rope_parameters": YARN | {"truncate": False, "beta_fast": 8, "beta_slow": 2, "attention_factor": 0.9},
                "max_position_embeddings": 512,
            }
        },
        False, [], "5.24.0",
    ),
    "ties absent, tied": ({}, True, [without("tie_word_embeddings", "text_config.tie_word_embeddings")], "5.24.0"),
    "ties absent, a head": ({}, False, [without("tie_word_embeddings", "text_config.tie_word_embeddings")], "5.24.0"),
    "ties contradict, tied": (
        {}, True, [with_values(tie_word_embeddings=True, text_config__tie_word_embeddings=False)], "5.24.0",
    ),
    "ties contradict, a head": (
        {}, False, [with_values(tie_word_embeddings=False, text_config__tie_word_embeddings=True)], "5.24.0",
    ),
    "ties contradict, a head against both": (
        {}, False, [with_values(tie_word_embeddings=True, text_config__tie_word_embeddings=True)], None,
    ),
    "ties contradict, tied, no version": (
        {}, True, [with_values(tie_word_embeddings=True, text_config__tie_word_embeddings=False)], None,
    ),
}  # fmt: skip


@pytest.fixture(params=FORMS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    options, tied, changes, version = copy.deepcopy(FORMS[request.param])
    config = hf_fixture.write_random_checkpoint(tmp_path / "hf", 5, tied=tied, names="released", **options)
    for change in changes:
        change(config)
    if version is not None:
        config["transformers_version"] = version
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    return tmp_path / "hf"


def reference(checkpoint: Path) -> Any:
    model, info = GraniteSpeechForConditionalGeneration.from_pretrained(
        checkpoint, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def test_logits_and_tokens_are_those_of_the_reference(checkpoint: Path) -> None:
    # Given a form of config.json, when a checkpoint of it is loaded by both, after a conversion here
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "config.json: ")
        convert(checkpoint, checkpoint.parent / "own")
        opened = open_checkpoint(checkpoint.parent / "own")
        bucket = make_bucket(opened.config, len(SOUNDS), 31.0)
        options = {"batch_size": bucket.batch, "buckets": [bucket], "compilation_cache": False}
        asr = Transcriber.from_pretrained(checkpoint.parent / "own", dtype="float32", **options)
    model, config, params = reference(checkpoint), opened.config, opened.load_params("float32")
    scaling = model.config.text_config.logits_scaling
    prompt = opened.chat_template().tokens(opened.tokenizer(), PROMPT)
    chosen = [sounds()[name] for name in SOUNDS]
    transcripts = asr.transcribe(chosen, max_new_tokens=NEW_TOKENS, **ORACLE)
    for name, sound, transcript in zip(SOUNDS, chosen, transcripts, strict=True):
        lengths = jnp.array([len(sound)])
        features = log_mel(jnp.asarray(sound)[None], lengths)
        frames = num_frames(lengths)
        audio_tokens = [config.audio_token_id] * int(config.num_audio_tokens(frames[0]))
        ids = np.array([[*prompt.prefix, *audio_tokens, *prompt.suffix]], np.int32)
        inputs = {
            "input_ids": torch.from_numpy(ids.astype(np.int64)),
            "input_features": torch.from_numpy(np.array(features)),
        }
        with torch.no_grad():
            expected = model(**inputs).logits[0].numpy() / scaling
            generated = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                eos_token_id=config.decoder.eos_token_id,
                suppress_tokens=[config.audio_token_id, config.decoder.pad_token_id],
                output_scores=True,
                return_dict_in_generate=True,
            )
        encoded = granite_speech.encode(config, params, features, frames)
        audio = granite_speech.project(config, params, encoded.hidden, frames)
        positions = jnp.arange(ids.shape[1])[None]
        logits, _ = granite_speech.prefill(
            config, params, jnp.asarray(ids), jnp.array([ids.shape[1]]), audio, logit_positions=positions
        )
        # Then logits of every position are the same
        error = np.abs(np.asarray(logits[0]) - expected).max() / np.sqrt(np.mean(expected**2))
        assert error < TOLERANCE, (name, error)
        # And so are greedy tokens, up to where the reference itself is undecided
        scores = np.sort(np.stack([score[0].numpy() for score in generated.scores]) / scaling, axis=-1)
        undecided = scores[:, -1] - scores[:, -2] <= TIE
        tokens = generated.sequences[0, ids.shape[1] :].tolist()
        decided = int(np.argmax(undecided)) if undecided.any() else len(tokens)
        ours = [*transcript.tokens, *[config.decoder.eos_token_id] * (transcript.stats["finish"] == "end")]
        assert ours[:decided] == tokens[:decided], name


def test_what_the_reference_saves_is_read_bit_by_bit(checkpoint: Path) -> None:
    # Given a checkpoint that this release of transformers loads and saves again, in its own form of config.json
    reference(checkpoint).save_pretrained(checkpoint.parent / "saved")
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (checkpoint.parent / "saved" / file).write_bytes((checkpoint / file).read_bytes())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "config.json: ")
        expected = flatten(open_checkpoint(checkpoint).read())

    # When it is read, then without a question, its weights are the same
    saved = open_checkpoint(checkpoint.parent / "saved")
    found = flatten(saved.read())
    assert found.keys() == expected.keys()
    assert all(found[path].tobytes() == x.tobytes() for path, x in expected.items())
    assert saved.raw_config["transformers_version"] == "5.24.0"
