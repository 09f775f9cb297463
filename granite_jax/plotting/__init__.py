"""Pictures of what the model hears and writes, drawn with matplotlib (`pip install 'granite-jax[plots]'`).

Functions take arrays and results, and return a Figure; with `ax=` they draw into the caller's axes. Colors are from
Okabe and Ito's palette, which color-blind readers can tell apart, and never the only distinction.

In short:

    from granite_jax import plotting

    (transcript,) = asr.transcribe("a.wav")
    plotting.overview(asr.ctc_emissions("a.wav"), transcript, asr.tokenizer).savefig("a.png")
"""

from granite_jax.plotting.figures import (
    BLUE,
    GREEN,
    ORANGE,
    Passage,
    alignment,
    check_path,
    compare,
    ctc_posteriors,
    draft,
    log_mel,
    mel_map,
    overview,
    throughput,
)

__all__ = [
    "BLUE",
    "GREEN",
    "ORANGE",
    "Passage",
    "alignment",
    "check_path",
    "compare",
    "ctc_posteriors",
    "draft",
    "log_mel",
    "mel_map",
    "overview",
    "throughput",
]
