"""Granite Speech in JAX: encoder, projector and decoder as pure functions, and the pipeline around them.

In short:

    import granite_jax as gj

    asr = gj.Transcriber.from_pretrained("demo")
    asr.transcribe(["a.wav"])[0].text

    config, params = gj.load("demo")          # research: pure functions of (config, params, inputs)
    features = gj.log_mel(samples, lengths)
    encoded = gj.encode(config, params, features, gj.num_frames(lengths))
"""

import importlib.metadata

from granite_jax.checkpoint.directory import load
from granite_jax.errors import AudioError, CheckpointError, ContextError, GraniteError, PromptError
from granite_jax.inference.transcriber import Transcriber, Transcript
from granite_jax.model.config import Config
from granite_jax.model.features import log_mel, num_frames
from granite_jax.model.granite_speech import ctc_logits, decode_step, encode, init, prefill, project

try:
    __version__ = importlib.metadata.version("granite-jax")
except importlib.metadata.PackageNotFoundError:  # run from a source tree
    __version__ = "0+unknown"

__all__ = [
    "AudioError",
    "CheckpointError",
    "Config",
    "ContextError",
    "GraniteError",
    "PromptError",
    "Transcriber",
    "Transcript",
    "ctc_logits",
    "decode_step",
    "encode",
    "init",
    "load",
    "log_mel",
    "num_frames",
    "prefill",
    "project",
]
