"""A family of models with nothing except an encoder and its CTC head: all that a new family has to write."""

import dataclasses
import functools

from flax import nnx, traverse_util

from granite_jax.models.family import CTCModel, Family
from granite_jax.models.layers.binding import bind
from granite_jax.models.layers.encoder import Encoder, EncoderConfig
from granite_jax.models.layers.features import num_frames
from granite_jax.models.layers.packed import encoder as packed
from granite_jax.models.layers.packed.features import packed_log_mel
from granite_jax.models.layers.precision import with_matmul_precision
from granite_jax.models.tensor_table import SAME, Rule, TensorTable
from granite_jax.text.tasks import Capabilities


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the encoder."""

    encoder: EncoderConfig
    model_type: str = "tiny_ctc"
    max_seconds: float = 60.0


@functools.cache
def abstract_encoder(config: Config) -> Encoder:
    return nnx.eval_shape(lambda: Encoder(config.encoder, nnx.Rngs(0)), graph=False)


@with_matmul_precision
def encode(config, params, samples, lengths, *, dtype=None, with_audio=False):
    packing = packed.pack_frames(num_frames(lengths), num_frames(samples.shape[1]), gap=7, multiple=1)
    features, encoder = packed_log_mel(samples, lengths, packing), bind(abstract_encoder(config), params["encoder"])
    output = packed.encode(encoder, features.astype(dtype), packing, "before")
    return packed.PackedEncoding(packing, features, output, packed.label(encoder, output.hidden, packing), None)


def abstract_params(config: Config) -> dict:
    return {"encoder": nnx.to_pure_dict(nnx.state(abstract_encoder(config), graph=False))}


TINY = Config(EncoderConfig(160, 2, 16, 2, 2, 8, 348, 20, 40, 15, 2))
PATHS = traverse_util.flatten_dict(abstract_params(TINY), sep=".")
FAMILY = Family(
    read_config=lambda raw, shapes: Config(EncoderConfig(**raw["encoder"])),
    abstract_params=abstract_params,
    tensors=TensorTable(tuple(Rule(path.replace("layers.", "layers.{layer}."), path, SAME) for path in PATHS)),
    recognizers={"ctc": CTCModel(encode, parts=("encoder",), num_labels=lambda config: config.encoder.output_dim)},
    capabilities=Capabilities(tasks=("transcribe",), languages=()),
)
