"""How much arithmetic the model needs and how many bytes it must read, counted by formula.

Nothing is compiled and nothing is measured: these are pure functions of a `Config` and of how much is computed. They
count frames, windows and positions that the caller names, so the same functions give the work of a padded batch and
that of the audio alone.

FLOPs are two for every multiply-add of a matrix product or a convolution. Elementwise work (norms, activations,
softmax, rotary embeddings) and log-mel features are not counted. Bytes are the least that must cross the memory bus:
each weight and each input once, whatever a program reads again.
"""

import math

from granite_jax.models.granite_speech.config import Config
from granite_jax.models.layers.decoder import DecoderConfig
from granite_jax.models.layers.encoder import EncoderConfig
from granite_jax.models.layers.features import num_frames
from granite_jax.models.layers.projector import ProjectorConfig
from granite_jax.models.work import Work, Workload
from granite_jax.waveform import SAMPLING_RATE

_SAMPLE_BYTES = 4  # audio is float32 for weights of any dtype


def count_work(config: Config, load: Workload, dtype_bytes: int) -> dict[str, dict[str, Work]]:
    """What a batch needs at least, by recognizer and program; see `Family.count_work`."""
    return {
        "speech-lm": {
            "encode": _encode(config, load, dtype_bytes),
            "prefill": _prefill(config, load, dtype_bytes),
            "decode": _decode(config, load, dtype_bytes),
        },
        "ctc": {"encode": _encode(config, load, dtype_bytes, projected=False)},
    }


def encode(config: Config, frames: float, blocks: float) -> float:
    """FLOPs of the encoder and both of its CTC outputs, the middle one with its way back, and the final one.

    The BPE head, which runs only where drafts are made from it, and log-mel features are not counted.

    Args:
      frames: frames of 20 ms that are computed, of all rows together.
      blocks: attention blocks, each of `context_size` queries and as many keys.
    """
    encoder = config.encoder
    width, inner, channels = encoder.hidden_dim, encoder.num_heads * encoder.dim_head, encoder.inner_dim
    feed_forward = 2 * 2 * width * width * encoder.feedforward_mult  # two of them, each up and down
    attention = 4 * width * inner  # q, k, v, out
    convolution = 3 * width * channels + encoder.conv_kernel_size * channels
    layers = encoder.num_layers * (feed_forward + attention + convolution)
    # The final output, and the middle one with the projection of its posteriors back to the frames.
    num_heads = 1 if encoder.self_condition_layer < 0 else 3
    per_frame = encoder.input_dim * width + layers + num_heads * width * encoder.output_dim
    # Queries with keys, queries with relative positions, weights with values.
    per_block = encoder.num_layers * 3 * inner * encoder.context_size**2
    return 2.0 * (frames * per_frame + blocks * per_block)


def project(config: Config, windows: float) -> float:
    """FLOPs of the Q-Former and the projection to the language model's width.

    Args:
      windows: windows of `window_size` frames, of all rows together.
    """
    projector = config.projector
    width, queries, frames = projector.hidden_size, projector.num_queries, projector.window_size
    over_queries = queries * (6 * width**2 + 2 * width * projector.intermediate_size)
    over_frames = frames * 2 * projector.encoder_hidden_size * width  # keys and values of the cross-attention
    attended = 2 * queries * (queries + frames) * width
    layers = projector.num_hidden_layers * (over_queries + over_frames + attended)
    return 2.0 * windows * (layers + queries * width * config.decoder.hidden_size)


def prefill(config: Config, positions: float, pairs: float, logits: float) -> float:
    """FLOPs of one pass of the language model.

    Args:
      positions: positions that run through the layers, of all rows together.
      pairs: pairs of a query and a key that is scored for it, in each layer.
      logits: positions whose logits are computed.
    """
    decoder = config.decoder
    attended = 2 * decoder.num_attention_heads * decoder.head_dim  # queries with keys, weights with values
    layers = decoder.num_hidden_layers * (positions * _decoder_matrices(decoder) + pairs * attended)
    return 2.0 * (layers + logits * decoder.hidden_size * decoder.vocab_size)


def decode_flops(config: Config, positions: float, pairs: float) -> float:
    """FLOPs of one decode step with the logits of every position.

    Args:
      positions: rows times the positions of a step.
      pairs: pairs of a query and a key that is scored for it, cached and of the step itself, in each layer.
    """
    return prefill(config, positions, pairs, positions)


def decode_bytes(config: Config, dtype_bytes: int, slots: float) -> float:
    """Bytes that one decode step must read: the language model's weights and the cache.

    The few rows that a step takes from the embedding are not counted; the embedding counts where it is the head, too.

    Args:
      dtype_bytes: bytes of a weight and of a cached number.
      slots: positions of the cache that are read, of all rows together.
    """
    decoder = config.decoder
    weights = _decoder_layers(decoder) + decoder.hidden_size + decoder.hidden_size * decoder.vocab_size
    return float(dtype_bytes * weights) + slots * cache_bytes(config, dtype_bytes)


def cache_bytes(config: Config, dtype_bytes: int) -> int:
    """Bytes of one position of one row in the cache: keys and values of all layers."""
    decoder = config.decoder
    return dtype_bytes * 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * decoder.head_dim


def encode_bytes(config: Config, dtype_bytes: int, samples: float, windows: float | None) -> float:
    """Bytes that encoder and projector must read and write: their weights, samples and audio embeddings.

    The BPE head is left out, as in `encode`.

    Args:
      samples: samples at 16 kHz, float32, of all rows together.
      windows: windows of the projector, of all rows together; None for the encoder alone.
    """
    numbers: float = _encoder_parameters(config.encoder) - _bpe_head(config.encoder)
    if windows is not None:
        numbers += _projector_parameters(config) + windows * config.projector.num_queries * config.decoder.hidden_size
    return dtype_bytes * numbers + _SAMPLE_BYTES * samples


def prefill_bytes(config: Config, dtype_bytes: int, positions: float) -> float:
    """Bytes that a prefill must read and write: weights, the embedding of every position, and the cache.

    Args:
      positions: positions of prompts, of all rows together.
    """
    embeddings = positions * dtype_bytes * config.decoder.hidden_size
    return decode_bytes(config, dtype_bytes, positions) + embeddings


def parameter_count(config: Config) -> dict[str, int]:
    """Numbers in each part's weights, running statistics of BatchNorm included: "encoder", "projector", "decoder"."""
    return {
        "encoder": _encoder_parameters(config.encoder),
        "projector": _projector_parameters(config),
        "decoder": _decoder_parameters(config.decoder),
    }


def _linear(inputs: int, outputs: int) -> int:
    """Parameters of a linear layer with a bias."""
    return (inputs + 1) * outputs


def _encoder_parameters(encoder: EncoderConfig) -> int:
    width, inner, channels = encoder.hidden_dim, encoder.num_heads * encoder.dim_head, encoder.inner_dim
    norm, wide = 2 * width, width * encoder.feedforward_mult
    feed_forward = norm + _linear(width, wide) + _linear(wide, width)
    relative = (2 * encoder.max_pos_emb + 1) * encoder.dim_head
    attention = norm + 3 * width * inner + _linear(inner, width) + relative
    batch_norm = 4 * channels
    depthwise = encoder.conv_kernel_size * channels
    convolution = norm + _linear(width, 2 * channels) + depthwise + batch_norm + _linear(channels, width)
    layers = encoder.num_layers * (2 * feed_forward + attention + convolution + norm)
    outputs = _linear(width, encoder.output_dim) + _linear(encoder.output_dim, width)
    return _linear(encoder.input_dim, width) + layers + outputs + _bpe_head(encoder)


def _bpe_head(encoder: EncoderConfig) -> int:
    return _linear(encoder.hidden_dim, encoder.bpe_output_dim)


def _projector_parameters(config: Config) -> int:
    projector: ProjectorConfig = config.projector
    width, inner, norm = projector.hidden_size, projector.intermediate_size, 2 * projector.hidden_size
    self_attention = 4 * _linear(width, width) + norm
    cross_attention = 2 * _linear(width, width) + 2 * _linear(projector.encoder_hidden_size, width) + norm
    layer = self_attention + cross_attention + _linear(width, inner) + _linear(inner, width) + norm
    queries = projector.num_queries * width + norm
    return queries + projector.num_hidden_layers * layer + _linear(width, config.decoder.hidden_size)


def _decoder_parameters(decoder: DecoderConfig) -> int:
    embedding = decoder.hidden_size * decoder.vocab_size
    head = 0 if decoder.tie_word_embeddings else embedding
    return embedding + _decoder_layers(decoder) + decoder.hidden_size + head


def _decoder_layers(decoder: DecoderConfig) -> int:
    """Parameters of all layers, norms included."""
    return decoder.num_hidden_layers * (_decoder_matrices(decoder) + 2 * decoder.hidden_size)


def _decoder_matrices(decoder: DecoderConfig) -> int:
    """Parameters of one layer's matrices, none of which has a bias; each takes part once for every position."""
    heads = 2 * (decoder.num_attention_heads + decoder.num_key_value_heads)  # q and out, k and v
    return decoder.hidden_size * (heads * decoder.head_dim + 3 * decoder.intermediate_size)


def _frames(load: Workload) -> int:
    """Encoder frames of a row."""
    return num_frames(round(load.seconds * SAMPLING_RATE))


def _windows(config: Config, load: Workload) -> int:
    """Windows of the projector of a row."""
    return math.ceil(_frames(load) / config.projector.window_size)


def _prompt(config: Config, load: Workload) -> int:
    """Positions of a row's prompt."""
    return _windows(config, load) * config.projector.num_queries + load.prompt_tokens


def _encode(config: Config, load: Workload, dtype_bytes: int, *, projected: bool = True) -> Work:
    frames, windows = _frames(load), load.batch * _windows(config, load)
    full, rest = divmod(frames, config.encoder.context_size)
    # The last frames of a row attend to each other alone, which is a part of a block.
    blocks = full + (rest / config.encoder.context_size) ** 2
    flops, samples = encode(config, load.batch * frames, load.batch * blocks), load.batch * load.seconds
    if projected:
        flops += project(config, windows)
    read = encode_bytes(config, dtype_bytes, samples * SAMPLING_RATE, windows if projected else None)
    return Work(flops, read)


def _prefill(config: Config, load: Workload, dtype_bytes: int) -> Work:
    prompt = _prompt(config, load)
    positions, pairs = load.batch * prompt, load.batch * prompt * (prompt + 1) / 2
    return Work(prefill(config, positions, pairs, load.batch), prefill_bytes(config, dtype_bytes, positions))


def _decode(config: Config, load: Workload, dtype_bytes: int) -> Work:
    """All steps of a batch; the prefill has written the first token of each row."""
    tokens = load.new_tokens - 1
    filled = _prompt(config, load) + load.new_tokens / 2  # on average over the steps
    step_tokens = load.batch * load.tokens_per_step
    flops = decode_flops(config, step_tokens, step_tokens * filled)
    bytes_read = decode_bytes(config, dtype_bytes, load.batch * filled)
    written = step_tokens * cache_bytes(config, dtype_bytes)
    return Work(flops, bytes_read + written) * (tokens / load.tokens_per_step)
