"""Log-mel features of packed rows: the numbers of `layers.features`."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from granite_jax.array_types import Lengths, Samples
from granite_jax.models.layers.features import HOP, NUM_MELS, log_mel_energies, normalize, split_hops, split_windows
from granite_jax.models.layers.packed.packing import Packing, put


def packed_log_mel(samples: Samples, lengths: Lengths, packing: Packing) -> Float[Array, "p f"]:
    """`log_mel` of packed rows: zeros between them.

    Args:
      samples: as in `log_mel`.
      lengths: valid samples of each row, or 0 for a padding row.
      packing: of `num_frames(lengths)`, with gaps of at least 2.
    """
    samples, lengths = jnp.asarray(samples, jnp.float32), jnp.asarray(lengths, jnp.int32)
    hops = split_hops(samples, lengths)
    flat = hops.reshape(-1, HOP)

    def energies(start, carry):
        log, peaks = carry
        # Two mel frames to a frame, and two hops more, which a row's gap has room for.
        position = 2 * start + jnp.arange(2 * packing.chunk + 2, dtype=jnp.int32)
        rows, _, _ = packing.rows_of(position // 2)
        local = position - 2 * packing.starts[rows]
        windows = split_windows(flat[rows * hops.shape[1] + jnp.minimum(local, hops.shape[1] - 1)][None])
        mel = log_mel_energies(windows)[0]
        # The maximum includes an odd last frame, which stacking then drops.
        valid = local[:-2] < lengths[rows[:-2]] // HOP + 1
        own = valid[:, None] & (rows[:-2, None] == jnp.arange(len(lengths), dtype=jnp.int32)[None, :])
        loudest = jnp.max(jnp.where(own, jnp.max(mel, axis=1)[:, None], -jnp.inf), axis=0)
        return put(log, mel.reshape(packing.chunk, -1), start), jnp.maximum(peaks, loudest)

    def normalize_chunk(start, log):
        rows, _, valid = packing.rows_of(packing.positions(start))
        normalized = normalize(packing.take(log, start), peaks[rows, None])
        return put(log, jnp.where(valid[:, None], normalized, 0.0), start)

    peaks = jnp.where(lengths > 0, -jnp.inf, 0.0)
    log, peaks = packing.for_chunks(energies, (packing.zeros(0, 2 * NUM_MELS), peaks))
    return packing.for_chunks(normalize_chunk, log)
