"""The recognizers of one checkpoint, which share its weights."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from granite_jax.engine.compilation import Compiler
from granite_jax.engine.programs import Programs
from granite_jax.engine.sharding import DeviceMesh
from granite_jax.models.family import SpeechLMModel
from granite_jax.models.registry import family_of, model_of
from granite_jax.options import RecognizerName
from granite_jax.recognition.buckets import Bucket, encoder_buckets
from granite_jax.recognition.ctc import CTC
from granite_jax.recognition.ctc_programs import CTCPrograms
from granite_jax.recognition.partition import abstract_params, param_shardings
from granite_jax.recognition.recognizer import Recognizer
from granite_jax.recognition.speech_lm import SpeechLM
from granite_jax.recognition.speech_lm_programs import Speculation, SpeechLMPrograms
from granite_jax.text.tokenizer import Tokenizer


def make_programs(
    config: Any, recognizer: str, dtype: Any, devices: DeviceMesh, speculation: Speculation | None = None
) -> Programs:
    """The programs of a recognizer. Raises GraniteError if it cannot run the model."""
    if isinstance(model_of(config, recognizer), SpeechLMModel):
        return SpeechLMPrograms(config, dtype, speculation, devices)
    return CTCPrograms(config, dtype, devices)


def make_recognizers(
    config: Any,
    params: Any | Callable[[], Any],
    tokenizer: Tokenizer,
    devices: DeviceMesh,
    *,
    dtype: Any,
    buckets: Sequence[Bucket],
    speculation: Speculation | None = None,
    word_offsets: tuple[float, float] = (0.0, 0.0),
    compile_ahead: RecognizerName | None = None,
) -> tuple[Any, dict[str, Recognizer]]:
    """The parameters on their devices, and the recognizers that the model's family names; the default is the first.

    Args:
      params: the model's parameters, or a function that returns them.
      buckets: of the default recognizer; an encoder alone takes the same audio.
      compile_ahead: whose programs are compiled while that function runs.
    """
    abstract = abstract_params(config, dtype, devices)
    parts = {}
    for name in family_of(config.model_type).recognizers:
        programs = make_programs(config, name, dtype, devices, speculation)
        own = buckets if isinstance(programs, SpeechLMPrograms) else encoder_buckets(buckets)
        parts[name] = programs, Compiler(functools.partial(programs.lowerables, abstract), devices), own
    if callable(params):
        if compile_ahead is None:
            params = params()
        else:
            _, compiler, ahead = parts[compile_ahead]
            params = compiler.start_while(params, ahead)
    params = devices.put(params, param_shardings(config, devices))
    recognizers: dict[str, Recognizer] = {}
    for name, (programs, compiler, own) in parts.items():
        if isinstance(programs, SpeechLMPrograms):
            recognizers[name] = SpeechLM(config, params, programs, tokenizer, compiler, own, word_offsets)
        else:
            recognizers[name] = CTC(params, programs, tokenizer, compiler, own, word_offsets)
    return params, recognizers
