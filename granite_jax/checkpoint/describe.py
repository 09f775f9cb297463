"""Describes a checkpoint without loading its weights, for `granite-jax inspect`."""

import collections
import dataclasses
import math
from typing import Any

from granite_jax.checkpoint.directory import Checkpoint
from granite_jax.text.tasks import LANGUAGES, Capabilities


def describe(checkpoint: Checkpoint, *, verify: bool = False) -> dict[str, Any]:
    """Describes an opened checkpoint in values that JSON can hold.

    Args:
      verify: read all weights and check their hashes; Hugging Face directories have none, and are only read.

    Returns:
      `directory`, `kind`, `dtype`; `model`, the published model that it is or was tuned from, or None; `parameters` and
      `bytes` by part and in `total`; `tasks`, `languages` (targets of translation) and `speech_languages`; `prompts` by
      task, with hints and keywords where the model takes them, and those recorded in `config.json`; `limits`:
      `positions` of the language model, `vocabulary`, `ctc_labels`, `bpe_labels` and `prompt_keywords`; `adapter`, None
      or rank, alpha and targets; `config`; `verified`.

    Raises:
      CheckpointError: naming what is damaged, missing, unexpected or misshapen.
    """
    stored, config = checkpoint.stored(), checkpoint.config
    parameters, sizes = collections.Counter[str](), collections.Counter[str]()
    for path, (shape, dtype) in stored.items():
        for part in (path.split(".")[0], "total"):
            parameters[part] += math.prod(shape)
            sizes[part] += math.prod(shape) * (4 if dtype == "float32" else 2)
    if verify:
        for _ in checkpoint.leaves():
            pass
    capabilities, adapter, release = checkpoint.capabilities, checkpoint.adapter, checkpoint.release
    return {
        "directory": str(checkpoint.directory),
        "kind": checkpoint.kind,
        "model": None if release is None else release.name,
        "dtype": "+".join(sorted({dtype for _, dtype in stored.values()})),
        "parameters": dict(sorted(parameters.items())),
        "bytes": dict(sorted(sizes.items())),
        "tasks": list(capabilities.tasks),
        "languages": list(capabilities.languages) if "translate" in capabilities.tasks else [],
        "speech_languages": list(capabilities.speech_languages),
        "prompts": _prompts(capabilities),
        "limits": {
            **checkpoint.family.limits(config),
            "prompt_keywords": capabilities.prompts.max_keywords,
        },
        "adapter": None
        if adapter is None
        else {"rank": adapter.rank, "alpha": adapter.alpha, "target_modules": adapter.target_modules},
        "config": dataclasses.asdict(config),
        "verified": verify,
    }


def _prompts(capabilities: Capabilities) -> dict[str, str]:
    """Every prompt by what it is for, with LANGUAGE and KEYWORDS in the places of these."""
    prompts, found = capabilities.prompts, dict[str, str]()
    clause = " Keywords: KEYWORDS"
    wordings = {
        "transcribe": prompts.transcribe,
        **{f"transcribe, {code}": text for code, text in prompts.transcribe_in},
        "transcribe, keywords": prompts.with_keywords + clause if prompts.max_keywords else "",
        "punctuate, keywords": prompts.punctuate + clause if prompts.max_keywords else "",
        "translate, keywords": prompts.translate.format("LANGUAGE") + clause if prompts.max_keywords else "",
        "punctuate": prompts.punctuate,
        "punctuate, language": prompts.punctuate_in.format("LANGUAGE"),
        "translate": prompts.translate.format("LANGUAGE"),
        "translate-punctuated": prompts.translate_punctuated.format("LANGUAGE"),
    }
    for purpose, text in wordings.items():
        if text and purpose.split(",")[0] in capabilities.tasks:
            found[purpose] = text
    if prompts.hint:
        found["before a transcript's, language"] = prompts.hint.format("LANGUAGE").strip()
    return found | {f"recorded {number}": text for number, text in enumerate(capabilities.trained_prompts, 1)}


def to_lines(description: dict[str, Any]) -> list[str]:
    """Formats a description as readable lines.

    Its limits have `seconds` of audio that fit one pass, with a language model those that fit its positions with the
    default number of new tokens, and `seconds_with_one_token`.
    """
    limits, adapter = description["limits"], description["adapter"]
    model = f", {description['model']} or tuned from it" if description["model"] else ""
    lines = [f"{description['directory']}: {description['kind']}, {description['dtype']}{model}"]
    for part, count in description["parameters"].items():
        lines.append(f"  {part:10} {count:>15,} parameters {description['bytes'][part]:>15,} bytes")
    languages = ", ".join(f"{code} ({LANGUAGES[code]})" for code in description["languages"])
    names = {"vocabulary": "tokens", "ctc_labels": "CTC labels", "bpe_labels": "labels of the BPE head"}
    names |= {"prompt_keywords": "keywords in a prompt"}
    counts = {name: count for name, count in limits.items() if count and not name.startswith("seconds")}
    shown = (f"{count:,} {names.get(name, name)}" for name, count in counts.items())
    lines += [
        f"  tasks      {', '.join(description['tasks'])}",
        f"  speech     {', '.join(description['speech_languages'])}",
        f"  languages  {languages or 'no translation'}",
        f"  limits     {', '.join(shown)}",
        f"  audio      {limits['seconds']:.0f} s"
        + (
            f" with the default max_new_tokens, {limits['seconds_with_one_token']:.0f} s with max_new_tokens=1"
            if "seconds_with_one_token" in limits
            else ""
        ),
    ]
    lines += [f"  prompt     {purpose}: {text}" for purpose, text in description["prompts"].items()]
    if adapter is not None:
        targets = adapter["target_modules"]
        shown = targets if isinstance(targets, str) else ", ".join(sorted(targets))
        lines.append(f"  adapter    LoRA, rank {adapter['rank']}, alpha {adapter['alpha']:g}, on {shown}")
    for section, values in description["config"].items():
        shown = ", ".join(f"{k} {v}" for k, v in values.items()) if isinstance(values, dict) else values
        lines.append(f"  {section}: {shown}")
    if description["verified"]:
        lines.append("  all hashes match" if description["kind"] == "orbax" else "  all weights can be read")
    return lines
