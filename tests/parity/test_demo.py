"""The embedded checkpoint, exported to Hugging Face format and run by transformers, says the same."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GraniteSpeechForConditionalGeneration

import granite_jax as gj
from granite_jax.audio.load import load_audio
from granite_jax.convert import convert
from granite_jax.evaluation.heldout import CLIPS

NUM_CLIPS = 24


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("demo") / "hf"
    convert("demo", directory)
    return directory


def _reference_text(model, tokenizer, samples: np.ndarray, asr: gj.Transcriber) -> str:
    """Greedy text of transformers, one utterance at a time. Features are ours, which parity tests compare elsewhere."""
    features = np.asarray(gj.log_mel(jnp.asarray(samples)[None], jnp.array([len(samples)])))
    audio = "<|audio|>" * asr.config.num_audio_tokens(features.shape[1])
    prompt = f"USER: {audio}can you transcribe the speech into a written format?\n ASSISTANT:"
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        out = model.generate(
            **{key: ids[key] for key in ("input_ids", "attention_mask")},
            input_features=torch.tensor(features),
            max_new_tokens=300,
            do_sample=False,
            num_beams=1,
        )
    return tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def test_transformers_hears_the_same_texts_in_the_exported_checkpoint(exported):
    # Given the exported checkpoint in transformers and the embedded one here, both in float32
    model = GraniteSpeechForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(exported)
    asr = gj.Transcriber.from_pretrained("demo", dtype="float32", compilation_cache=False)
    clips = [json.loads(line)["audio"] for line in (CLIPS / "heldout.jsonl").read_text().splitlines()[:NUM_CLIPS]]
    # When both transcribe held-out clips
    ours = [transcript.text for transcript in asr.transcribe([CLIPS / clip for clip in clips], guards=False)]
    theirs = [_reference_text(model, tokenizer, load_audio(CLIPS / clip).samples, asr) for clip in clips]
    # Then the texts are equal
    assert len(ours) == NUM_CLIPS and all(ours)
    assert ours == theirs
