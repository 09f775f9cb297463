"""Makes the goldens: what transformers computes for a few random checkpoints, thinned out, and for YaRN's options.

Run `python -m goldens.make` in `tests/`, with the requirements of `tests/parity`.
"""

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from goldens.cases import (
    CASES,
    GOLDEN_CASES,
    GOLDEN_SOUNDS,
    PROMPT,
    ROTARY_CASES,
    ROTARY_PATH,
    STRIDE,
    fingerprint,
    golden_path,
    sounds,
)
from parity.oracle import Answer, Oracle
from transformers import GraniteConfig
from transformers.models.granite.modeling_granite import GraniteRotaryEmbedding

NEW_TOKENS = 24


def thinned(answer: Answer) -> dict[str, np.ndarray]:
    """Every STRIDE-th frame, position or step of an answer; prompt and tokens in full."""
    best = np.sort(answer.logits, axis=-1)
    return {
        "features": answer.features[::STRIDE],
        "layers": answer.layers[:, ::STRIDE],
        "hidden": answer.hidden[::STRIDE],
        "audio": answer.audio,
        "k": answer.k[:, :, ::STRIDE],
        "v": answer.v[:, :, ::STRIDE],
        "prompt": answer.prompt,
        "tokens": answer.tokens,
        "margins": best[:, -1] - best[:, -2],
        "logits": answer.logits[::STRIDE],
    }


def rotary_frequencies() -> list[dict[str, Any]]:
    """The inverse frequencies and the factor of cosines and sines for all ROTARY_CASES."""
    found = []
    for options in ROTARY_CASES:
        config = GraniteConfig(hidden_size=options["head_dim"], num_attention_heads=1, **copy.deepcopy(options))
        rotary = GraniteRotaryEmbedding(config)
        result = {"inverse_frequencies": rotary.inv_freq.tolist(), "attention_factor": rotary.attention_scaling}
        found.append({"options": options, **result})
    return found


def main() -> None:
    ROTARY_PATH.write_text(json.dumps(rotary_frequencies(), indent=1) + "\n")
    for name in GOLDEN_CASES:
        with tempfile.TemporaryDirectory() as directory:
            oracle = Oracle(CASES[name].write(Path(directory)))
            arrays = {"fingerprint": np.array(fingerprint(Path(directory)))}
        for sound in GOLDEN_SOUNDS:
            answer = oracle.answer(sounds()[sound], PROMPT, NEW_TOKENS)
            arrays |= {f"{sound}/{field}": array for field, array in thinned(answer).items()}
        np.savez_compressed(golden_path(name), **arrays)
        print(golden_path(name), golden_path(name).stat().st_size)


if __name__ == "__main__":
    main()
