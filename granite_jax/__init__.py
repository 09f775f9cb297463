"""Granite Speech in JAX: encoder, projector and decoder as pure functions, and the pipeline around them.

In short:

    import granite_jax as gj

    asr = gj.Transcriber.from_pretrained("demo")
    asr.transcribe(["a.wav"])[0].text

    config, params = gj.load("demo")          # research: pure functions of (config, params, inputs)
    features = gj.log_mel(samples, lengths)
    encoded = gj.encode(config, params, features, gj.num_frames(lengths))

Names are imported when they are first used (PEP 562): `import granite_jax` itself loads no JAX.
"""

import importlib
import os

_HOME = os.path.dirname(__file__)
if not os.path.isdir(_HOME):
    raise ImportError(f"{_HOME}: is within an archive, and granite_jax reads files beside its modules: unpack it")

TYPE_CHECKING = False  # but for type checkers; importing it would take most of the time that the package takes
if TYPE_CHECKING:
    from typing import Any

    from granite_jax.errors import (
        AudioError,
        BackendError,
        CheckpointError,
        ContextError,
        GraniteError,
        PromptError,
    )
    from granite_jax.formats import to_srt, to_tsv, to_vtt
    from granite_jax.models.granite_speech.config import Config
    from granite_jax.models.granite_speech.functions import ctc_logits, decode_step, encode, init, prefill, project
    from granite_jax.models.layers.features import log_mel, num_frames
    from granite_jax.pretrained import load
    from granite_jax.results import Transcript
    from granite_jax.transcriber import Transcriber

    __version__: str

__all__ = [
    "AudioError",
    "BackendError",
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
    "to_srt",
    "to_tsv",
    "to_vtt",
]

_MODULES = {
    **dict.fromkeys(
        ("AudioError", "BackendError", "CheckpointError", "ContextError", "GraniteError", "PromptError"), "errors"
    ),
    # Speech to text.
    "Transcriber": "transcriber",
    "Transcript": "results",
    **dict.fromkeys(("to_srt", "to_tsv", "to_vtt"), "formats"),
    # Research.
    "load": "pretrained",
    "Config": "models.granite_speech.config",
    **dict.fromkeys(("log_mel", "num_frames"), "models.layers.features"),
    **dict.fromkeys(("ctc_logits", "decode_step", "encode", "init", "prefill", "project"), "models.granite_speech"),
}


def __getattr__(name: str) -> "Any":
    if name == "__version__":
        value = _version()
    elif name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("granite-jax")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
