"""The stages of a greedy run of this program, each to be timed by itself."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import granite_jax as gj
from benchmarks.speculation import ONE_PASS
from benchmarks.timing import elapsed
from granite_jax.models import granite_speech
from granite_jax.models.layers.packed.features import packed_log_mel

Measures = Mapping[str, Callable[[], float]]


def own_stages(asr: gj.Transcriber, params: Any, audio: list[np.ndarray], max_new_tokens: int, steps: int) -> Measures:
    """The same stages of the model's functions on packed rows, as in the programs; "all" is the Transcriber's."""
    config = asr.config
    lengths = jnp.array([len(samples) for samples in audio])
    samples = np.zeros((len(audio), max(map(len, audio))), np.float32)
    for row, values in zip(samples, audio, strict=True):
        row[: len(values)] = values
    frames = gj.num_frames(lengths)
    prompt = asr.template.tokens(asr.tokenizer, asr.capabilities.prompts.transcribe)
    ids = [
        [*prompt.prefix, *[config.audio_token_id] * int(config.num_audio_tokens(count)), *prompt.suffix]
        for count in frames.tolist()
    ]
    tokens = np.zeros((len(audio), max(map(len, ids))), np.int32)
    for row, values in zip(tokens, ids, strict=True):
        row[: len(values)] = values
    prompts = jnp.asarray(tokens), jnp.array([len(row) for row in ids])

    packing = granite_speech.pack_frames(config, frames, int(gj.num_frames(samples.shape[1])))
    log_mel = jax.jit(lambda samples: packed_log_mel(samples, lengths, packing))
    encode = jax.jit(lambda params, features: granite_speech.encode_packed(config, params, features, packing).audio)
    no_draft = jnp.zeros((len(audio), 1), jnp.int32)

    @jax.jit
    def prefill(params: Any, embeddings: jax.Array) -> tuple[jax.Array, Any]:
        best, cache = granite_speech.prefill_packed(
            config,
            params,
            *prompts,
            embeddings,
            no_draft,
            no_draft[:, 0],
            lambda logits, _: logits.argmax(axis=-1).astype(jnp.int32),
            no_draft.repeat(2, axis=1),
            capacity=tokens.shape[1] + steps,
        )
        return best[:, :1], cache

    @jax.jit
    def decode(params: Any, token: jax.Array, cache: Any) -> Any:
        def step(carry: Any, _: None) -> tuple[Any, None]:
            logits, cache = gj.decode_step(config, params, *carry)
            return (logits.argmax(axis=-1).astype(jnp.int32), cache), None

        return jax.lax.scan(step, (token, cache), length=steps)[0]

    features = log_mel(samples)
    embeddings = encode(params, features)
    token, cache = prefill(params, embeddings)
    transcribe = functools.partial(asr.transcribe, audio, max_new_tokens=max_new_tokens, speculative=False, **ONE_PASS)
    stages: dict[str, Callable[[], Any]] = {
        "log-mel": lambda: log_mel(samples),
        "encoder, projector": lambda: encode(params, features),
        "prefill": lambda: prefill(params, embeddings),
        f"decode, {steps} steps": lambda: decode(params, token, cache),
        "all": transcribe,
    }
    return {name: functools.partial(elapsed, stage) for name, stage in stages.items()}
