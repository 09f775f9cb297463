"""granite-4.0-1b-speech and its relatives: Conformer CTC encoder, windowed Q-Former, Granite language model.

functions.py    the model as pure functions of (config, params, inputs)
config.py       its configuration, read from a `config.json`; config.json is that of granite-4.0-1b-speech
tensors.py      names of its tensors in released checkpoints
releases.py     the published models, and the prompts of their cards
partition.py    how its weights are split between devices
work.py         its arithmetic and memory traffic
family.py       all that the rest of the program asks of it
"""

from granite_jax.models.granite_speech.functions import (
    Model,
    abstract_params,
    bpe_labels,
    bpe_logits,
    ctc_logits,
    decode_step,
    encode,
    encode_packed,
    encode_samples,
    init,
    pack_frames,
    prefill,
    prefill_packed,
    project,
)

__all__ = [
    "Model",
    "abstract_params",
    "bpe_labels",
    "bpe_logits",
    "ctc_logits",
    "decode_step",
    "encode",
    "encode_packed",
    "encode_samples",
    "init",
    "pack_frames",
    "prefill",
    "prefill_packed",
    "project",
]
