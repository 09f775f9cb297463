"""LoRA adapters against `transformers` with `peft`: random adapters, merged here, applied beside the weights there."""

import json
import shutil
from pathlib import Path
from typing import Any

import hf_fixture
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import LoraConfig
from transformers import GraniteSpeechForConditionalGeneration

from granite_jax.convert import convert
from granite_jax.models import granite_speech
from granite_jax.pretrained import open_checkpoint

# peft, of a model that is not where it was loaded from.
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file")

CASES: dict[str, dict[str, Any]] = {
    "released": {"r": 8, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["q_proj", "k_proj", "o_proj", "down_proj"],
        "rank_pattern": {"layers.1.self_attn.k_proj": 2, ".*down_proj": 3},
        "alpha_pattern": {r".*\.2\..*q_proj": 5},
        "use_rslora": True,
        "exclude_modules": ["layers.0.self_attn.o_proj"],
    },
    "layers": {"r": 4, "lora_alpha": 8, "target_modules": ["gate_proj", "up_proj"], "layers_to_transform": [0, 2]},
    "expression": {"r": 4, "lora_alpha": 8, "target_modules": r"language_model\..*(q|v)_proj"},
    "everywhere": {"r": 2, "lora_alpha": 2, "target_modules": ["to_q", "up_proj", "query", "linear"]},
}
TOKENS = np.arange(3, 43).reshape(2, 20)


def random_adapter(directory: Path, options: dict[str, Any], dtype: torch.dtype) -> Any:
    """Writes a checkpoint with an adapter saved by peft, and returns the reference with both."""
    base = directory / "base"
    hf_fixture.write_random_checkpoint(base, dtype=str(dtype).removeprefix("torch."), has_lora_adapter=True)
    reference = GraniteSpeechForConditionalGeneration.from_pretrained(base, dtype=dtype)
    reference.add_adapter(LoraConfig(lora_dropout=0.1, **options))
    torch.manual_seed(0)
    for name, parameter in reference.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    reference.to(dtype).eval().save_pretrained(str(directory / "saved"))
    shutil.copytree(base, directory / "hf")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(directory / "saved" / file, directory / "hf" / file)
    return reference


def logits(directory: Path, dtype: str, adapter: bool) -> np.ndarray:
    """Ours, of all positions: `[b, p, v]`."""
    opened = open_checkpoint(directory)
    params = opened.load_params(dtype, adapter=adapter)
    count, length = TOKENS.shape
    positions = jnp.broadcast_to(jnp.arange(length), TOKENS.shape)
    found, _ = granite_speech.prefill(
        opened.config, params, jnp.asarray(TOKENS), jnp.full(count, length), logit_positions=positions
    )
    return np.asarray(found)


@torch.no_grad()
def reference_logits(reference: Any) -> np.ndarray:
    return reference(input_ids=torch.from_numpy(TOKENS)).logits.float().numpy()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_computes_what_peft_computes(tmp_path: Path, case: str, dtype: str, measure) -> None:
    # Given an adapter that peft saved
    reference = random_adapter(tmp_path, CASES[case], getattr(torch, dtype))
    convert(tmp_path / "hf", tmp_path / "own")
    for adapter in (True, False):
        # When logits are computed with it and without, from either format
        (reference.enable_adapters if adapter else reference.disable_adapters)()
        expected = reference_logits(reference)
        scale = np.sqrt(np.mean(expected**2))
        for directory in (tmp_path / "hf", tmp_path / "own"):
            error = np.abs(logits(directory, dtype, adapter) - expected).max() / scale
            # Then they are the reference's: in bfloat16 as far as its own rounding goes, of three terms, not one
            name = f"logits {'with' if adapter else 'without'} LoRA, {dtype}"
            assert measure(name, error) < (1e-4 if dtype == "float32" else 0.25), directory


def test_an_export_with_an_adapter_loads_in_transformers(tmp_path: Path) -> None:
    # Given a checkpoint with an adapter, when it goes to Orbax and back
    reference = random_adapter(tmp_path, CASES["patterns"], torch.float32)
    convert(tmp_path / "hf", tmp_path / "own")
    convert(tmp_path / "own", tmp_path / "back")

    # Then transformers loads it from there, adapter included, and computes the same logits
    loaded = GraniteSpeechForConditionalGeneration.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert np.array_equal(reference_logits(loaded), reference_logits(reference))
