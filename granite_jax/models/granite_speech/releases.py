"""The published `granite_speech` models: their configurations, and the prompts of their cards.

Sources: IBM's model cards and `config.json` files. The sizes of granite-speech-5.0-2b's decoder that its positions do
not change, and the wording of translations by granite-speech-3.3, are taken from their nearest relatives.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from granite_jax.models.family import Release
from granite_jax.models.granite_speech.config import Config
from granite_jax.models.layers.rotary import Rotary
from granite_jax.text.tasks import LANGUAGES, SPEECH_LANGUAGES, Capabilities, Prompts

_EUROPEAN = ("en", "fr", "de", "es", "pt")
_RAW = Prompts().transcribe


def _releases() -> list[Release]:
    one_b = Config.granite_4_0_1b()
    two_b = _replaced(one_b, encoder={"bpe_output_dim": 100353})
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    rotary = Rotary.from_dict({"rope_theta": 10000.0, "rope_scaling": yarn}, 16384, None)
    extended = {"max_position_embeddings": 16384, "rotary": rotary}
    older = {
        **{"vocab_size": 49160, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 40},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131072},
        **{"rotary": Rotary(1e7), "attention_multiplier": 0.015625, "logits_scaling": 8.0, "tie_word_embeddings": True},
        **{"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
    }
    wider = {"hidden_size": 4096, "intermediate_size": 12800, "head_dim": 128}
    wider |= {"attention_multiplier": 0.0078125, "logits_scaling": 16.0}
    older_encoder: dict[str, Any] = {"encoder": {"output_dim": 256}, "audio_token_id": 49159}
    older_card = Capabilities(
        ("transcribe", "translate"),
        ("en", "fr", "de", "es", "pt", "ja", "it", "zh"),
        _EUROPEAN,
        Prompts(with_keywords=_RAW, max_keywords=0),
    )
    hinted = "transcribe the {} speech with proper punctuation and capitalization."
    french = (("fr", "Pouvez\u2011vous reconnaître le contenu de la parole ?"),)
    return [
        Release("granite-speech-3.3-2b", _replaced(one_b, **older_encoder, decoder=older), older_card),
        Release("granite-speech-3.3-8b", _replaced(one_b, **older_encoder, decoder=older | wider), older_card),
        Release(
            "granite-4.0-1b-speech",
            one_b,
            Capabilities(("transcribe", "translate"), prompts=Prompts(with_keywords=_RAW)),
        ),
        Release(
            "granite-speech-4.1-2b",
            two_b,
            Capabilities(prompts=Prompts(transcribe_in=french, punctuate_in=hinted)),
        ),
        Release(
            "granite-speech-5.0-2b",
            _replaced(two_b, decoder=extended),
            Capabilities(
                speech_languages=(*SPEECH_LANGUAGES, "it", "zh"),
                languages=tuple(LANGUAGES),
                prompts=Prompts(
                    translate="Translate the speech to {}.",
                    translate_punctuated="Translate the speech to {} with proper punctuation and capitalization.",
                    hint="The speech is in {}. Transcribe it exactly; do not translate. ",
                    max_keywords=2000,
                ),
            ),
        ),
    ]


def _replaced(config: Config, **changes: Any) -> Config:
    """A configuration with other fields, nested ones as dictionaries."""
    parts = {
        name: dataclasses.replace(getattr(config, name), **change) if isinstance(change, dict) else change
        for name, change in changes.items()
    }
    return dataclasses.replace(config, **parts)


RELEASES: Mapping[str, Release] = {release.name: release for release in _releases()}


def release_of(config: Config, raw: Mapping[str, Any], directory: Path) -> Release | None:
    """The published model that a checkpoint is, or was tuned from; None if that is unknown.

    By name: `granite_jax.model` in `config.json`, where conversions record it, `_name_or_path`, the directory's name,
    or the repository's in the directories of a hub's cache. Otherwise by what only one of them has: YaRN, or the BPE
    head.
    """
    section = raw.get("granite_jax")
    stated = [section.get("model") if isinstance(section, Mapping) else None, raw.get("_name_or_path")]
    names = [re.split(r"[/\\]", str(name).rstrip("/\\"))[-1] for name in stated]
    names += [directory.name, *(part.split("--")[-1] for part in directory.parts if "--" in part)]
    has_yarn = config.decoder.rotary.yarn is not None
    for name in names:
        named = RELEASES.get(name.lower())
        if named is not None and (named.config.decoder.rotary.yarn is not None) == has_yarn:
            return named
    if has_yarn:
        return RELEASES["granite-speech-5.0-2b"]
    return RELEASES["granite-speech-4.1-2b"] if config.encoder.bpe_output_dim else None
