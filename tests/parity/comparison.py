"""Both sides of a comparison: the oracle's answers one by one, ours in one padded batch."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from goldens.cases import PROMPT, Case, sounds
from parity.oracle import Answer, Oracle

from granite_jax.convert import convert
from granite_jax.models import granite_speech
from granite_jax.models.layers.features import log_mel, num_frames
from granite_jax.pretrained import open_checkpoint
from granite_jax.recognition.buckets import make_bucket
from granite_jax.transcriber import Transcriber, Transcript

NEW_TOKENS = 24
ORACLE = {"guards": False, "segment_seconds": None}
TIE = 1e-3  # a smaller margin between the two best logits is a tie
GARBAGE = 1e4


class Comparison:
    """One checkpoint, read by transformers from its Hugging Face directory and by us after conversion."""

    def __init__(self, case: Case, directory: Path):
        self.case = case
        self.reference = case.write(directory / "reference")
        convert(case.write(directory / "hf", case.loads), directory / "own")
        self.checkpoint = open_checkpoint(directory / "own")
        self.config = self.checkpoint.config
        self.names, self.sounds = list(sounds()), list(sounds().values())

    @functools.cached_property
    def oracle(self) -> Oracle:
        return Oracle(self.reference)

    @functools.cached_property
    def bfloat16_oracle(self) -> Oracle:
        return Oracle(self.reference, torch.bfloat16)

    @functools.cached_property
    def answers(self) -> list[Answer]:
        """The oracle's, in float32, one utterance at a time."""
        return [self.oracle.answer(sound, PROMPT, NEW_TOKENS) for sound in self.sounds]

    @functools.cached_property
    def frames(self) -> np.ndarray:
        return np.array([len(answer.features) for answer in self.answers])

    @functools.cached_property
    def prompts(self) -> np.ndarray:
        return np.array([len(answer.prompt) for answer in self.answers])

    @functools.cache  # noqa: B019 (as long as the session)
    def params(self, dtype: str = "float32"):
        return self.checkpoint.load_params(dtype)

    @functools.cached_property
    def transcripts(self) -> list[Transcript]:
        """From samples and the prompt's text to tokens, by the pipeline: all sounds in one batch of one bucket."""
        bucket = make_bucket(self.config, len(self.sounds), 31.0)
        options = {"batch_size": bucket.batch, "buckets": [bucket], "compilation_cache": False}
        asr = Transcriber.from_pretrained(self.checkpoint.directory, dtype="float32", **options)
        return asr.transcribe(self.sounds, prompt=PROMPT, max_new_tokens=NEW_TOKENS, **ORACLE)

    def audio_from_samples(self, dtype: str = "float32") -> np.ndarray:
        """Audio embeddings of all samples, padded with garbage."""

        def run(params, samples, lengths):
            frames = num_frames(lengths)
            encoded = granite_speech.encode(self.config, params, log_mel(samples, lengths), frames, dtype=dtype)
            return granite_speech.project(self.config, params, encoded.hidden, frames, dtype=dtype)

        samples, lengths = padded(self.sounds, max(map(len, self.sounds)) + 1_000, GARBAGE)
        return np.asarray(jax.jit(run)(self.params(dtype), samples, lengths), np.float32)

    def features(self) -> np.ndarray:
        """Our log-mel features of all sounds, padded with garbage."""
        samples, lengths = padded(self.sounds, max(map(len, self.sounds)) + 1_000, GARBAGE)
        return np.asarray(jax.jit(log_mel)(samples, lengths))

    def encode(self, dtype: str = "float32"):
        """Our encoder on the oracle's features, padded with garbage."""
        features, lengths = padded([answer.features for answer in self.answers], self.frames.max() + 7, GARBAGE)
        encode = jax.jit(functools.partial(granite_speech.encode, self.config, capture_layers=True, dtype=dtype))
        return encode(self.params(dtype), features, lengths)

    def ctc(self, hidden: jax.Array) -> np.ndarray:
        """Our CTC logits of activations."""
        return np.asarray(granite_speech.ctc_logits(self.config, self.params(), hidden))

    def project(self, dtype: str = "float32") -> np.ndarray:
        """Our projector on the oracle's encoder activations, padded with garbage."""
        hidden, lengths = padded([answer.hidden for answer in self.answers], self.frames.max() + 7, GARBAGE)
        project = jax.jit(functools.partial(granite_speech.project, self.config, dtype=dtype))
        return np.asarray(project(self.params(dtype), hidden, lengths), np.float32)

    def language_model(self, dtype: str = "float32", audio: np.ndarray | None = None):
        """Our language model on the oracle's prompts and audio embeddings (or `audio`), then on its tokens in one step.

        Returns logits of all prompt positions, the cache after the prompt, and logits that chose each token.
        """
        params = self.params(dtype)
        tokens, lengths = padded([answer.prompt for answer in self.answers], self.prompts.max() + 5, 7)
        if audio is None:
            audio, _ = padded([answer.audio for answer in self.answers], self.prompts.max(), GARBAGE)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        prefill = jax.jit(
            functools.partial(granite_speech.prefill, self.config, capacity=tokens.shape[1] + NEW_TOKENS, dtype=dtype)
        )
        prompt_logits, cache = prefill(params, tokens, lengths, audio, logit_positions=positions)
        answers, _ = padded([answer.tokens for answer in self.answers], NEW_TOKENS, 7)
        step = jax.jit(functools.partial(granite_speech.decode_step, self.config, dtype=dtype))
        later, _ = step(params, answers[:, :-1], cache)
        first = jnp.take_along_axis(prompt_logits, lengths[:, None, None] - 1, axis=1)
        return np.asarray(prompt_logits), cache, np.asarray(jnp.concatenate([first, later], axis=1))


def padded(rows: list[np.ndarray], length: int, filling: float) -> tuple[jax.Array, jax.Array]:
    """Rows along the first axis, padded to `length`, and their own lengths."""
    batch = np.full((len(rows), length, *rows[0].shape[1:]), filling, rows[0].dtype)
    for i, row in enumerate(rows):
        batch[i, : len(row)] = row
    return jnp.asarray(batch), jnp.array([len(row) for row in rows])


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference, relative to the root mean square of the reference."""
    assert ours.shape == reference.shape
    return float(np.max(np.abs(np.float64(ours) - reference)) / np.sqrt(np.mean(np.float64(reference) ** 2)))


def rms_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """The root mean square of the difference, relative to that of the reference."""
    return float(np.sqrt(np.mean((ours - reference) ** 2) / np.mean(reference**2)))


def margins(logits: np.ndarray) -> np.ndarray:
    """How far the best logit is above the second, for every position."""
    best = np.sort(logits, axis=-1)
    return best[..., -1] - best[..., -2]
