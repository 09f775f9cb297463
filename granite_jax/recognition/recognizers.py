"""The recognizers of one checkpoint, which share its weights."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from granite_jax.engine.compilation import Compiler
from granite_jax.engine.sharding import DeviceMesh
from granite_jax.models.granite_speech.config import Config
from granite_jax.options import RecognizerName
from granite_jax.recognition.buckets import Bucket, encoder_buckets
from granite_jax.recognition.ctc import CTC
from granite_jax.recognition.ctc_programs import CTCPrograms
from granite_jax.recognition.partition import abstract_params, param_shardings
from granite_jax.recognition.recognizer import Recognizer
from granite_jax.recognition.speech_lm import SpeechLM
from granite_jax.recognition.speech_lm_programs import Speculation, SpeechLMPrograms
from granite_jax.text.tokenizer import Tokenizer


def make_recognizers(
    config: Config,
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
    """The parameters on their devices, and the recognizers by name.

    Args:
      params: the model's parameters, or a function that returns them.
      buckets: of the language model; the encoder alone takes the same audio.
      compile_ahead: whose programs are compiled while that function runs.
    """
    abstract = abstract_params(config, dtype, devices)
    programs = SpeechLMPrograms(config, dtype, speculation, devices), CTCPrograms(config, dtype, devices)
    lm_compiler, ctc_compiler = (Compiler(functools.partial(each.lowerables, abstract), devices) for each in programs)
    short = encoder_buckets(buckets)
    if callable(params):
        compiler = ctc_compiler if compile_ahead == "ctc" else lm_compiler
        ahead = {"speech-lm": buckets, "ctc": short}.get(compile_ahead or "", ())
        params = compiler.start_while(params, ahead)
    params = devices.put(params, param_shardings(config, devices))
    return params, {
        "speech-lm": SpeechLM(config, params, programs[0], tokenizer, lm_compiler, buckets, word_offsets),
        "ctc": CTC(params, programs[1], tokenizer, ctc_compiler, short, word_offsets),
    }
