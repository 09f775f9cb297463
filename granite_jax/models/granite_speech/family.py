"""`granite_speech`: granite-4.0-1b-speech and its relatives."""

from typing import TYPE_CHECKING, Any

from granite_jax.errors import CheckpointError
from granite_jax.models.family import CTCModel, Family, SpeechLMModel
from granite_jax.models.granite_speech import functions
from granite_jax.models.granite_speech.config import Config, read_config
from granite_jax.models.granite_speech.partition import partition_rules
from granite_jax.models.granite_speech.releases import RELEASES, release_of
from granite_jax.models.granite_speech.tensors import TABLE
from granite_jax.models.granite_speech.work import count_work
from granite_jax.models.layers.features import FFT, HOP, NUM_MELS, WINDOW
from granite_jax.text.chat_template import ChatTemplate
from granite_jax.text.tasks import Capabilities
from granite_jax.waveform import SAMPLING_RATE

if TYPE_CHECKING:
    from granite_jax.text.tokenizer import Tokenizer

CTC = CTCModel(functions.encode_samples, parts=("encoder",), num_labels=lambda config: config.encoder.output_dim)
SPEECH_LM = SpeechLMModel(
    CTC,
    functions.bpe_labels,
    functions.prefill_packed,
    functions.decode_step,
    num_bpe_labels=lambda config: config.encoder.bpe_output_dim,
)


def check_tokenizer(config: Config, tokenizer: "Tokenizer") -> None:
    """See `Family.check_tokenizer`."""
    vocab_size, audio_id = config.decoder.vocab_size, config.audio_token_id
    if tokenizer.vocab_size > vocab_size:
        raise CheckpointError(f"has {tokenizer.vocab_size} tokens, the model {vocab_size}")
    token_id = tokenizer.special_id(ChatTemplate.audio_token)
    if token_id != audio_id:
        raise CheckpointError(f"{ChatTemplate.audio_token} is token {token_id}, but {audio_id} in config.json")


def limits(config: Config) -> dict[str, int]:
    """See `Family.limits`."""
    encoder, decoder = config.encoder, config.decoder
    return {
        "positions": decoder.max_position_embeddings,
        "vocabulary": decoder.vocab_size,
        "ctc_labels": encoder.output_dim,
        "bpe_labels": encoder.bpe_output_dim,
    }


def processor_config(config: Config) -> dict[str, Any]:
    """See `Family.processor_config`."""
    projector = config.projector
    return {
        "feature_extractor_type": "GraniteSpeechFeatureExtractor",
        "melspec_kwargs": {
            "hop_length": HOP,
            "n_fft": FFT,
            "n_mels": NUM_MELS,
            "sample_rate": SAMPLING_RATE,
            "win_length": WINDOW,
        },
        "processor_class": "GraniteSpeechProcessor",
        "projector_downsample_rate": projector.window_size // projector.num_queries,
        "projector_window_size": projector.window_size,
        "sampling_rate": SAMPLING_RATE,
    }


FAMILY = Family(
    read_config=read_config,
    abstract_params=functions.abstract_params,
    tensors=TABLE,
    recognizers={"speech-lm": SPEECH_LM, "ctc": CTC},
    capabilities=Capabilities(),
    releases=RELEASES,
    release_of=release_of,
    check_tokenizer=check_tokenizer,
    limits=limits,
    processor_config=processor_config,
    partition_rules=partition_rules,
    count_work=count_work,
)
