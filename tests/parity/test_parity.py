"""Every stage against transformers 5.8.1 in float32: the oracle one utterance at a time, ours in one padded batch.

A relative error is the largest difference over the root mean square of the reference's tensor.
"""

import copy
import json

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from goldens.cases import CASES
from parity.comparison import TIE, margins, relative_error, rms_error
from transformers import AutoTokenizer

from granite_jax.pretrained import open_checkpoint
from granite_jax.text.tasks import instruction

TOLERANCE = 1e-4


def exact_log_mel(extractor, sound: np.ndarray) -> np.ndarray:
    """The feature extractor's own formula in float64, its window too: what float32 arithmetic approximates."""
    melspec = copy.deepcopy(extractor.mel_filters).double()
    melspec.spectrogram.window = torch.hann_window(400, dtype=torch.float64)
    mel = melspec(torch.from_numpy(sound).double()).T.clip(min=1e-10).log10()
    mel = torch.maximum(mel, mel.max() - 8.0) / 4 + 1
    return mel[: len(mel) // 2 * 2].reshape(-1, 160).numpy()


def test_log_mel(compared, measure):
    # Given sounds from near silence to clipping
    features = compared.features()
    for i, (name, answer) in enumerate(zip(compared.names, compared.answers, strict=True)):
        # When the reference's formula is computed exactly
        exact = exact_log_mel(compared.oracle.features, compared.sounds[i])
        ours = features[i, : len(exact)]
        # Then ours is within 1e-5 of it, and of the reference wherever float32 serves the reference as well as us
        assert measure("log-mel, ours to exact arithmetic", np.abs(ours - exact).max()) < 1e-5, name
        reference_error = np.abs(answer.features - exact)
        measure("log-mel, reference to exact arithmetic", reference_error.max())
        difference = np.abs(ours - answer.features)
        measure("log-mel, ours to reference", difference.max())
        measure("count of log-mel values beyond 1e-5 of the reference", (difference > 1e-5).sum())
        measure("count of log-mel values", difference.size)
        assert difference[reference_error < 8e-6].max() < 1e-5, name


def test_encoder_layers_and_ctc(compared, measure):
    # Given the oracle's features, garbage after them
    encoded = compared.encode()
    ctc = compared.ctc(encoded.hidden)
    # When encoded in one batch / Then every layer's activations are the oracle's
    for i, (name, answer) in enumerate(zip(compared.names, compared.answers, strict=True)):
        frames = len(answer.hidden)
        for layer, reference in enumerate(answer.layers):
            error = relative_error(encoded.layers[layer, i, :frames], reference)
            assert measure("encoder, any layer", error) < TOLERANCE, (name, layer)
        error = relative_error(encoded.hidden[i, :frames], answer.hidden)
        assert measure("encoder, output", error) < TOLERANCE, name
        assert measure("CTC logits", relative_error(ctc[i, :frames], answer.ctc)) < TOLERANCE, name


def test_projector(compared, measure):
    # Given the oracle's encoder activations, garbage after them
    audio = compared.project()
    # When projected in one batch / Then the audio embeddings are the oracle's
    for i, (name, answer) in enumerate(zip(compared.names, compared.answers, strict=True)):
        error = relative_error(audio[i, : len(answer.audio)], answer.audio)
        assert measure("projector", error) < TOLERANCE, name


def test_language_model(compared, measure):
    # Given the oracle's prompts, audio embeddings and generated tokens
    prompt_logits, cache, logits = compared.language_model()
    # When run in one batch, the tokens in one step / Then keys, values and logits of every position are the oracle's
    for i, (name, answer) in enumerate(zip(compared.names, compared.answers, strict=True)):
        positions, steps = len(answer.prompt), len(answer.tokens)
        for ours, reference in ((cache.k, answer.k), (cache.v, answer.v)):
            for layer in range(len(reference)):
                error = relative_error(ours[layer, i, :, :positions], reference[layer])
                assert measure("keys and values, any layer", error) < TOLERANCE, (name, layer)
        error = relative_error(prompt_logits[i, :positions], answer.prompt_logits)
        assert measure("logits of the prompt", error) < TOLERANCE, name
        possible = np.isfinite(answer.logits)  # the oracle's own bans are -inf
        error = relative_error(logits[i, :steps][possible], answer.logits[possible])
        assert measure("logits of generated tokens", error) < TOLERANCE, name


def test_audio_embeddings_from_samples(compared, measure):
    # Given samples, garbage after them
    audio = compared.audio_from_samples()
    # When features, encoder and projector run as one program / Then the embeddings are the oracle's
    for i, (name, answer) in enumerate(zip(compared.names, compared.answers, strict=True)):
        error = relative_error(audio[i, : len(answer.audio)], answer.audio)
        assert measure("audio embeddings, from samples", error) < TOLERANCE, name


def test_tokens(compared, measure):
    # Given all sounds in one padded batch / When transcribed
    for name, answer, transcript in zip(compared.names, compared.answers, compared.transcripts, strict=True):
        reference, undecided = answer.tokens.tolist(), margins(answer.logits) <= TIE
        ended = reference[-1] == compared.config.decoder.eos_token_id
        ours = [*transcript.tokens, *[reference[-1]] * (transcript.stats["finish"] == "end")]
        # Then the tokens are the oracle's, up to where the oracle itself is undecided
        decided = int(np.argmax(undecided)) if undecided.any() else len(reference)
        measure("count of tokens compared", decided)
        measure("count of ties in the oracle", undecided.sum())
        measure("count of tokens after a tie, not compared", len(reference) - decided)
        measure("count of texts that end by themselves", ended)
        assert ours[:decided] == reference[:decided], name
        assert decided < len(reference) or ours == reference, name


@pytest.mark.parametrize("compared", ["base", "released", "bfloat16"], indirect=True)
def test_bfloat16_is_as_near_to_float32_as_the_references_own(compared, measure):
    # Given the oracle in float32, and itself in bfloat16
    audio = compared.audio_from_samples("bfloat16")
    _, _, logits = compared.language_model("bfloat16", jnp.asarray(audio))
    errors, agreements = [], []
    for i, answer in enumerate(compared.answers):
        their_audio, their_logits = compared.bfloat16_oracle.forced(compared.sounds[i], answer)
        our_logits = np.where(np.isfinite(answer.logits), logits[i, : len(answer.tokens)], -np.inf)
        their_logits = np.where(np.isfinite(answer.logits), their_logits, -np.inf)
        errors.append([rms_error(x, answer.audio) for x in (audio[i, : len(answer.audio)], their_audio)])
        agreements.append([(x.argmax(-1) == answer.tokens).mean() for x in (our_logits, their_logits)])
    # When ours in bfloat16 is compared / Then it is no farther from float32, in its embeddings and in its choices
    (ours, theirs), (our_rate, their_rate) = np.mean(errors, axis=0), np.mean(agreements, axis=0)
    measure("bfloat16 audio embeddings, root mean square, ours", ours)
    measure("bfloat16 audio embeddings, root mean square, reference", theirs)
    measure("bfloat16 choices unlike float32, share, ours", 1 - our_rate)
    measure("bfloat16 choices unlike float32, share, reference", 1 - their_rate)
    assert ours < 1.2 * theirs
    assert our_rate > their_rate - 0.03


@pytest.mark.parametrize("tokenizer_class", ["PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_prompt_tokens_by_the_declared_tokenizer_class(tokenizer_class, tmp_path):
    # Given a file that cuts text by another rule than GPT-2's, and a class that overrules the file or not
    CASES["base"].write(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    words = {"type": "Split", "pattern": {"Regex": r"\s?\w+|[^\w]+"}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    definition["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [words, level]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    declared = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(declared | {"tokenizer_class": tokenizer_class}))
    reference, ours = AutoTokenizer.from_pretrained(tmp_path), open_checkpoint(tmp_path).tokenizer()
    for text in ("a written format?\n ASSISTANT:", "Keywords: Zoë O'Neil, 東京  x1", " \t\n", "can't   stop"):
        # When encoded / Then the ids are the same, and the text comes back the same
        ids = ours.encode(text)
        assert ids == reference(text)["input_ids"]
        assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    "text",
    [
        instruction(),
        instruction("punctuate"),
        instruction(keywords=["Kowalczyk", "Zoë O'Neil", "東京"]),
        instruction("translate", target_language="fr", keywords=["x"]),
        "  odd   spaces , and <|not a token|> ",
    ],
)
def test_prompt_tokens(compared, text):
    # Given an instruction
    processor, audio = compared.oracle.processor, np.zeros(16_000, np.float32)
    # When the reference's processor makes its prompt of one second of audio
    reference = processor(compared.oracle.render(text), torch.from_numpy(audio)[None])["input_ids"][0]
    # Then ours are the same ids
    ours = compared.checkpoint.chat_template().tokens(compared.checkpoint.tokenizer(), text)
    count = compared.config.num_audio_tokens(50)
    assert [*ours.prefix, *[compared.config.audio_token_id] * count, *ours.suffix] == list(reference)
