"""Losses and optimizer steps of the two training stages (arXiv 2505.08699, section 2; arXiv 2603.11243).

1. The encoder by CTC: 0.2 times the loss of the middle head plus 0.8 times that of the final one.
2. Projector and decoder by next-token cross-entropy on the frozen encoder, plus 0.3 times a CTC loss that reads the
   answer's tokens off the audio embeddings by a separate linear head. Without it, a decoder this small takes very
   long to discover that the audio says what to write.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from granite_jax.array_types import Features, Lengths, Logits, Samples, Tokens
from granite_jax.models import granite_speech
from granite_jax.models.granite_speech.config import Config
from granite_jax.models.layers import bpe_head
from granite_jax.models.layers.encoder import BatchStatistics, EncoderOutput
from granite_jax.models.layers.features import log_mel, num_frames

MIDDLE_WEIGHT = 0.2
ALIGNMENT_WEIGHT = 0.3
_STATISTICS_MOMENTUM = 0.99
_MASKED_MELS, _MASKED_FRAMES, _MASKS = 16, 8, 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Trained parameters (float32) and the optimizer's state."""

    params: Any
    optimizer: Any


def make_optimizer(peak: float, steps: int, warmup: int) -> optax.GradientTransformation:
    """AdamW with clipped gradients; the learning rate warms up linearly to `peak` and falls to zero by a cosine."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=1e-2))


def spec_augment(key: jax.Array, features: Features) -> Features:
    """Masks two bands of mels and two spans of frames (at most 160 ms each) a row with zeros (Park et al. 2019)."""
    batch, frames, width = features.shape
    keys = jax.random.split(key, 4)

    def spans(start_key, size_key, length, max_size):  # [b, length], True where masked
        size = jax.random.randint(size_key, (batch, _MASKS, 1), 0, max_size + 1)
        start = jax.random.randint(start_key, (batch, _MASKS, 1), 0, length)
        index = jnp.arange(length)[None, None, :]
        return jnp.any((index >= start) & (index < start + size), axis=1)

    mels = spans(keys[0], keys[1], width // 2, _MASKED_MELS)
    masked = jnp.tile(mels, (1, 2))[:, None] | spans(keys[2], keys[3], frames, _MASKED_FRAMES)[..., None]
    return jnp.where(masked, 0.0, features)


def ctc_loss(
    config: Config,
    params: Any,
    features: Features,
    lengths: Lengths,
    labels: Tokens,
    label_lengths: Lengths,
) -> tuple[Float[Array, ""], BatchStatistics]:
    """Middle and final CTC loss in nats a label, and the batch's BatchNorm statistics."""
    encoded = granite_speech.encode(config, params, features, lengths, capture_layers=True, train=True)
    frame_padding = (jnp.arange(features.shape[1])[None, :] >= lengths[:, None]).astype(jnp.float32)
    label_padding = (jnp.arange(labels.shape[1])[None, :] >= label_lengths[:, None]).astype(jnp.float32)

    def loss(hidden):
        logits = granite_speech.ctc_logits(config, params, hidden)
        losses = optax.ctc_loss(logits, frame_padding, labels, label_padding)
        return losses.sum() / jnp.maximum(label_lengths.sum(), 1).astype(jnp.float32)

    assert encoded.layers is not None
    middle = encoded.layers[config.encoder.self_condition_layer]
    total = MIDDLE_WEIGHT * loss(middle) + (1.0 - MIDDLE_WEIGHT) * loss(encoded.hidden)
    return total, encoded.batch_statistics


def ctc_step(config: Config, optimizer: optax.GradientTransformation, *, augment: bool = True) -> Callable:
    """The jitted step of stage 1: (state, key, samples, lengths, labels, label lengths) -> (state, loss).

    `augment` masks features (`spec_augment`).
    `state.params` is `{"encoder": ...}`. BatchNorm's running statistics follow the batches' and receive no gradient.
    """

    @jax.jit
    def step(state: TrainState, key, samples: Samples, lengths: Lengths, labels: Tokens, label_lengths: Lengths):
        features = log_mel(samples, lengths)
        if augment:
            features = spec_augment(key, features)
        inputs = (features, num_frames(lengths), labels, label_lengths)
        loss_of = lambda params: ctc_loss(config, params, *inputs)  # noqa: E731
        (loss, statistics), gradients = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(_follow_statistics(state.params, params, statistics), moments), loss

    return step


def _follow_statistics(old: Any, new: Any, statistics: BatchStatistics) -> Any:
    """`new` with the running statistics of `old` moved towards those of the batch."""
    running = old["encoder"]["layers"]["convolution"]["batch_norm"]
    follow = lambda past, now: _STATISTICS_MOMENTUM * past + (1 - _STATISTICS_MOMENTUM) * now  # noqa: E731
    moved = {"mean": follow(running["mean"], statistics.mean), "var": follow(running["var"], statistics.var)}
    norm = new["encoder"]["layers"]["convolution"]["batch_norm"]
    norm.update(moved)
    return new


def bpe_loss(
    config: Config,
    params: Any,
    encoded: EncoderOutput,
    frames: Lengths,
    labels: Tokens,
    label_lengths: Lengths,
) -> Float[Array, ""]:
    """CTC loss of the BPE head in nats a label, over windows of four frames; `params` are those of the encoder.

    Texts of more labels than windows, which have no alignment, are left out.
    """
    logits = granite_speech.bpe_logits(config, params, encoded, frames)
    windows = -(-frames // bpe_head.WINDOW)
    padding = (jnp.arange(logits.shape[1])[None, :] >= windows[:, None]).astype(jnp.float32)
    label_padding = (jnp.arange(labels.shape[1])[None, :] >= label_lengths[:, None]).astype(jnp.float32)
    losses = optax.ctc_loss(logits, padding, labels, label_padding)
    aligned = (losses < 1e4).astype(jnp.float32)  # optax gives the others a huge loss
    return jnp.sum(losses * aligned) / jnp.maximum(jnp.sum(label_lengths.astype(jnp.float32) * aligned), 1.0)


def bpe_step(config: Config, optimizer: optax.GradientTransformation, encoder: Any) -> Callable:
    """The jitted step of a BPE head on a frozen `encoder`: (state, samples, lengths, labels, label lengths) -> ...

    `state.params` is `{"out_bpe": ...}`. Returns (state, loss).
    """

    @jax.jit
    def step(state: TrainState, samples: Samples, lengths: Lengths, labels: Tokens, label_lengths: Lengths):
        frames = num_frames(lengths)

        def loss_of(head: Any) -> jax.Array:
            params = {"encoder": {**encoder, **head}}
            return bpe_loss(config, params, encoded, frames, labels, label_lengths)

        encoded = granite_speech.encode(
            config, {"encoder": {**encoder, **state.params}}, log_mel(samples, lengths), frames
        )
        encoded = jax.tree.map(jax.lax.stop_gradient, encoded)
        loss, gradients = jax.value_and_grad(loss_of)(state.params)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        return TrainState(optax.apply_updates(state.params, updates), moments), loss

    return step


def lm_loss(
    config: Config,
    params: Any,
    hidden: Float[Array, "b t d"],
    frames: Lengths,
    history: Tokens,
    tokens: Tokens,
    prompt_lengths: Lengths,
    lengths: Lengths,
) -> Float[Array, ""]:
    """Cross-entropy in nats a token of what follows the prompt, end-of-text included, plus the weighted alignment loss.

    Args:
      params: those of projector and decoder, and optionally `alignment`: the kernel `[d, v]` of the alignment head.
      hidden: activations of the frozen encoder with `frames` valid frames a row.
      history: what the decoder reads, `[b, p]`: `tokens`, or `tokens` with mistakes in the answer.
      tokens: prompt and answer, `[b, p]`; the prompt has `prompt_lengths` tokens, both together `lengths`.
    """
    audio = granite_speech.project(config, params, hidden, frames)
    width = tokens.shape[1] - 1
    positions = jnp.broadcast_to(jnp.arange(width), (len(tokens), width))
    logits, _ = granite_speech.prefill(config, params, history[:, :-1], lengths - 1, audio, logit_positions=positions)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    target = (positions + 1 >= prompt_lengths[:, None]) & (positions + 1 < lengths[:, None])
    loss = jnp.sum(losses * target.astype(jnp.float32)) / jnp.sum(target).astype(jnp.float32)
    if "alignment" in params:
        answer = jnp.take_along_axis(tokens, jnp.minimum(positions + prompt_lengths[:, None], width), axis=1)
        loss += ALIGNMENT_WEIGHT * _alignment_loss(
            audio @ params["alignment"], config.num_audio_tokens(frames), answer, lengths - 1 - prompt_lengths
        )
    return loss


def _alignment_loss(logits: Logits, audio_lengths: Lengths, answer: Tokens, answer_lengths: Lengths) -> jax.Array:
    """CTC loss in nats a token of the answer read off the audio embeddings; token 0 (padding) is the blank."""
    audio_padding = (jnp.arange(logits.shape[1])[None, :] >= audio_lengths[:, None]).astype(jnp.float32)
    answer_padding = (jnp.arange(answer.shape[1])[None, :] >= answer_lengths[:, None]).astype(jnp.float32)
    losses = optax.ctc_loss(logits, audio_padding, answer, answer_padding)
    # An answer of more tokens than audio embeddings has no alignment; optax gives it a huge loss.
    aligned = (losses < 1e4).astype(jnp.float32)
    return jnp.sum(losses * aligned) / jnp.maximum(jnp.sum(answer_lengths), 1).astype(jnp.float32)


def lm_step(config: Config, optimizer: optax.GradientTransformation) -> Callable:
    """The jitted step of stage 2: (state, encoder activations, frames, history, tokens, ...) -> (state, loss)."""

    @jax.jit
    def step(state: TrainState, *inputs):
        loss, gradients = jax.value_and_grad(lambda params: lm_loss(config, params, *inputs))(state.params)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        return TrainState(optax.apply_updates(state.params, updates), moments), loss

    return step
