"""How the weights are split between the devices that share a copy of them.

Megatron layout (arXiv 1909.08053): projections into heads or channels are split by their outputs, projections out of
them by their inputs; one all-reduce for each sublayer.
"""

from granite_jax.errors import GraniteError
from granite_jax.models.family import PartitionRules
from granite_jax.models.granite_speech.config import Config
from granite_jax.models.layers.linear import INPUTS, OUTPUTS


def partition_rules(config: Config, parts: int) -> PartitionRules:
    """See `Family.partition_rules`.

    Raises:
      GraniteError: attention heads cannot be split between so many devices.
    """
    encoder, decoder = config.encoder, config.decoder
    for name, heads in (("encoder", encoder.num_heads), ("decoder", decoder.num_attention_heads)):
        if heads % parts:
            raise GraniteError(f"model_parallel={parts} does not divide the {name}'s {heads} attention heads")
    # Heads are never split: keys and values are replicated if their heads do not divide evenly.
    heads_only = "q" if decoder.num_key_value_heads % parts else "[qkv]"
    return {
        r"encoder\.layers\.ff[12]\.up": OUTPUTS,
        r"encoder\.layers\.ff[12]\.down": INPUTS,
        r"encoder\.layers\.attention\.(q|kv)": OUTPUTS,
        r"encoder\.layers\.attention\.out": INPUTS,
        r"encoder\.layers\.convolution\.up": OUTPUTS,
        r"encoder\.layers\.convolution": {"depthwise": -1},
        r"encoder\.layers\.convolution\.batch_norm": dict.fromkeys(("scale", "bias", "mean", "var"), -1),
        r"encoder\.layers\.convolution\.down": INPUTS,
        r"encoder\.out_bpe": OUTPUTS,
        rf"decoder\.layers\.attention\.{heads_only}": OUTPUTS,
        r"decoder\.layers\.attention\.out": INPUTS,
        r"decoder\.layers\.(gate|up)": OUTPUTS,
        r"decoder\.layers\.down": INPUTS,
        r"decoder\.head": OUTPUTS,
        r"decoder\.embedding": {"embedding": -2},
    }
