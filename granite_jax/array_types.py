"""The axis legend and the named array types of the model's signatures.

Axis names, the same everywhere:

    b  batch rows                    l  layers
    n  audio samples (16 kHz)        w  windows of the projector, or of the BPE head
    f  log-mel features (160)        a  audio embeddings (audio tokens)
    t  encoder frames (20 ms)        p  positions of a prompt or of one decode step
    c  CTC labels                    s  positions of the KV cache
    d  encoder dimension             e  language model dimension
    k  key/value heads               h  dimension of one head
    v  vocabulary                    m  positions whose logits are wanted
    y  CTC labels of a text

The tests check these annotations at run time; the library itself does not.
"""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Bool, Float, Int

Params = Mapping[str, Any]  # nested dictionaries of arrays
Shape = tuple[int, ...]

Samples = Float[Array, "b n"]
Features = Float[Array, "b t f"]
Activations = Float[Array, "b t d"]
CTCLogits = Float[Array, "b t c"]
AudioEmbeddings = Float[Array, "b a e"]
Tokens = Int[Array, "b p"]
Hidden = Float[Array, "b p e"]
Logits = Float[Array, "b p v"]
Lengths = Int[Array, "b"]
Mask = Bool[Array, "b t"]
Cache = Float[Array, "l b k s h"]
