"""LoRA adapters: kept beside the weights, merged in float32 when they are loaded for audio."""

import json
import math
from pathlib import Path
from typing import Any

import hf_fixture
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from granite_jax.checkpoint.tree import flatten
from granite_jax.convert import adapter, convert
from granite_jax.errors import CheckpointError
from granite_jax.pretrained import load, open_checkpoint, save

TINY: dict[str, Any] = {
    "has_lora_adapter": True,
    "encoder_config": {"num_layers": 2, "hidden_dim": 8, "dim_head": 4, "max_pos_emb": 40, "output_dim": 256},
    "projector_config": {"encoder_hidden_size": 8, "num_hidden_layers": 1},
    "text_config": {"num_hidden_layers": 3},
}
LAYER = "language_model.model.layers.{}.self_attn.{}_proj"
PEFT: dict[str, Any] = {
    "peft_type": "LORA",
    "base_model_name_or_path": "/etc",  # where nothing may look
    "target_modules": ["q_proj", "v_proj"],
    "r": 4,
    "lora_alpha": 8,
    "bias": "none",
    "lora_dropout": 0.1,
    "task_type": None,
    "use_dora": False,
}
WIDTH, GROUPS, HEADS = 48, 32, 64  # of the fixture's language model: hidden, keys and values, queries
Q, Q_FACTOR = LAYER.format(1, "q"), "lora.decoder.layers.attention.q"


def write_adapter(
    directory: Path, ranks: dict[str, int], dtype: Any = np.float32, prefix="base_model.model.", **config
) -> None:
    """Writes an adapter with factors of these ranks for modules of the language model."""
    rng = np.random.default_rng(7)
    tensors = {}
    for module, rank in ranks.items():
        out = HEADS if "q_proj" in module else GROUPS
        for side, shape in (("A", (rank, WIDTH)), ("B", (out, rank))):
            tensors[f"{prefix}{module}.lora_{side}.weight"] = rng.standard_normal(shape).astype(dtype)
    save_file(tensors, directory / adapter.WEIGHTS)
    (directory / adapter.CONFIG).write_text(json.dumps({**PEFT, **config}))


def all_ranks(rank: int = 4) -> dict[str, int]:
    return {LAYER.format(layer, module): rank for layer in range(3) for module in "qv"}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    hf_fixture.write_random_checkpoint(tmp_path / "hf", tied=True, **TINY)
    write_adapter(tmp_path / "hf", all_ranks())
    return tmp_path / "hf"


def change(directory: Path, **values: Any) -> None:
    path = directory / adapter.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def merged(directory: Path, scales: dict[str, float]) -> dict[str, np.ndarray]:
    """What peft's formula makes of the released weights, in float64."""
    weights, factors = load_file(directory / "model.safetensors"), load_file(directory / adapter.WEIGHTS)
    result = {}
    for module, scale in scales.items():
        a, b = (factors[f"base_model.model.{module}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        result[module] = weights[f"{module}.weight"].astype(np.float64) + scale * (b @ a)
    return result


@pytest.mark.parametrize("kind", ["hf", "orbax"])
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_is_merged_for_audio_and_left_out_for_text(
    hf: Path, tmp_path: Path, kind: str, devices: int, dtype: str
) -> None:
    # Given a checkpoint with an adapter of unequal ranks and alphas, some layers without, scaled as by rslora
    ranks = {Q: 3, LAYER.format(2, "q"): 4, LAYER.format(2, "v"): 4, LAYER.format(1, "v"): 2}
    patterns = {"rank_pattern": {r"1\.self_attn\.q_proj": 3, "1.*v_proj": 2}, "alpha_pattern": {r"layers\.2\..*": 5}}
    write_adapter(hf, ranks, use_rslora=True, layers_to_transform=[1, 2], **patterns)
    if kind == "orbax":
        convert(hf, tmp_path / "own")
    opened = open_checkpoint(hf if kind == "hf" else tmp_path / "own")
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    # When it is loaded with and without
    params = flatten(opened.load_params(dtype, replicated))
    bare = flatten(opened.load_params(dtype, replicated, adapter=False))

    # Then the merged kernels are the exact ones rounded once, all others are as they were, and the adapter is gone
    assert params.keys() == bare.keys()
    scales = {m: (5 if ".2." in m else 8) / math.sqrt(rank) for m, rank in ranks.items()}
    exact, epsilon = merged(hf, scales), jnp.finfo(dtype).eps
    for name in "qv":
        path = f"decoder.layers.attention.{name}.kernel"
        assert params[path].sharding == replicated
        kernels, before = np.asarray(params[path], np.float32), np.asarray(bare[path], np.float32)
        np.testing.assert_array_equal(kernels[0], before[0])
        for layer in (1, 2):
            wanted = exact[LAYER.format(layer, name)].T
            np.testing.assert_allclose(kernels[layer], wanted, rtol=0.51 * epsilon, atol=4e-6)
            assert np.abs(kernels[layer] - before[layer]).max() > 1
    others = [path for path in params if not path.startswith("decoder.layers.attention.")]
    assert all(np.array_equal(params[path], bare[path]) for path in others)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("names", ["released", "new"])
def test_an_adapter_stays_a_subtree_and_goes_back_bit_for_bit(hf: Path, tmp_path: Path, dtype, names) -> None:
    # Given an adapter in either spelling, of unequal ranks; in another dtype than the weights
    write_adapter(hf, {**all_ranks(), Q: 2}, dtype, rank_pattern={"1.self_attn.q_proj": 2})
    before = load_file(hf / adapter.WEIGHTS)

    # When the checkpoint is converted, then its subtree holds the factors, padded
    report = convert(hf, tmp_path / "own", verify=True)
    tree = flatten(open_checkpoint(tmp_path / "own").read())
    assert tree[f"{Q_FACTOR}.a"].shape == (3, WIDTH, 4)
    np.testing.assert_array_equal(tree[f"{Q_FACTOR}.a"][1, :, :2], before[f"base_model.model.{Q}.lora_A.weight"].T)
    assert not tree[f"{Q_FACTOR}.a"][1, :, 2:].any()
    assert report.parameters["lora"] == sum(x.size for path, x in tree.items() if path.startswith("lora."))
    assert report.tensors == len(load_file(hf / "model.safetensors")) - 2 + len(before)

    # And back in Hugging Face format, in either spelling, it is what it was; transformers will look for it where it is
    convert(tmp_path / "own", tmp_path / "back", names=names)
    after = load_file(tmp_path / "back" / adapter.WEIGHTS)
    prefix = "base_model.model.model.language_model." if names == "new" else "base_model.model.language_model.model."
    spelled = {name.replace("base_model.model.language_model.model.", prefix): x for name, x in before.items()}
    assert after.keys() == spelled.keys()
    assert all(after[n].dtype == x.dtype and after[n].tobytes() == x.tobytes() for n, x in spelled.items())
    config = json.loads((tmp_path / "back" / adapter.CONFIG).read_text())
    assert config == {
        **json.loads((hf / adapter.CONFIG).read_text()),
        "base_model_name_or_path": str(tmp_path / "back"),
    }
    again = flatten(open_checkpoint(tmp_path / "back").read())
    assert all(np.array_equal(x, again[path]) for path, x in tree.items())


def test_a_damaged_adapter_is_named(hf: Path, tmp_path: Path) -> None:
    # Given a hash of a factor that differs, when the checkpoint is loaded, then the factor is named; text needs it not
    convert(hf, tmp_path / "own")
    path = tmp_path / "own" / "tensors.json"
    records = json.loads(path.read_text())
    records[f"{Q_FACTOR}.b"]["sha256"] = "0" * 64
    path.write_text(json.dumps(records))
    with pytest.raises(CheckpointError, match=rf"damaged .*: {Q_FACTOR}\.b$"):
        load(tmp_path / "own")
    load(tmp_path / "own", adapter=False)


def test_an_announced_adapter_must_be_there(hf: Path, tmp_path: Path) -> None:
    # Given a config.json that announces an adapter, when there is none, then only loading for text alone works
    (hf / adapter.CONFIG).unlink()
    with pytest.raises(
        CheckpointError, match=r"adapter_model\.safetensors: a LoRA adapter without adapter_config\.json"
    ):
        load(hf)
    (hf / adapter.WEIGHTS).unlink()
    for action in (lambda: load(hf), lambda: convert(hf, tmp_path / "own")):
        with pytest.raises(CheckpointError, match=r"announces a LoRA adapter, but adapter_config\.json is missing"):
            action()
    load(hf, adapter=False)


@pytest.mark.parametrize("names", [["model.safetensors"], ["model.safetensors", "config.json"]])
def test_an_adapter_alone_is_no_checkpoint(hf: Path, names: list[str]) -> None:
    # Given a directory as peft saves one, when it is loaded, then the error says what it is, and what to do
    for name in names:
        (hf / name).unlink()
    with pytest.raises(CheckpointError, match="hf: is a LoRA adapter without its base model: put its files into"):
        load(hf)


def test_a_tree_with_an_adapter_can_be_saved(hf: Path, tmp_path: Path) -> None:
    # Given parameters with an adapter, when they are saved with its configuration, then they load; without, they do not
    opened = open_checkpoint(hf)
    save(tmp_path / "own", opened.raw_config, opened.read(), extra_files=[hf / adapter.CONFIG])
    assert Q_FACTOR + ".a" in open_checkpoint(tmp_path / "own").stored()
    with pytest.raises(CheckpointError, match="no place in the model for lora.decoder"):
        save(tmp_path / "other", opened.raw_config, opened.read())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type 'IA3' is not supported"),
        ({"peft_type": None}, "peft_type None is not supported"),
        ({"use_dora": True}, "not supported: 'use_dora'"),
        ({"bias": "all"}, "bias 'all' is not supported"),
        ({"lora_bias": True}, "not supported: 'lora_bias'"),
        ({"modules_to_save": ["lm_head"]}, "not supported: 'modules_to_save'"),
        ({"fan_in_fan_out": True}, "not supported: 'fan_in_fan_out'"),
        ({"layer_replication": [[0, 2]]}, "not supported: 'layer_replication'"),
        ({"target_parameters": ["x"]}, "not supported: 'target_parameters'"),
        ({"trainable_token_indices": [3]}, "not supported: 'trainable_token_indices'"),
        ({"use_qalora": True}, "not supported: 'use_qalora'"),
        ({"from_the_future": {"x": 1}}, "not supported: 'from_the_future'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' is not supported: it changes the base weights"),
        ({"r": 0}, "r is 0, not a positive number"),
        ({"r": 4.5}, r"r is 4\.5, not"),
        ({"r": 60000}, "rank 60000 exceeds the size of language_model.model.layers.0.self_attn.q_proj, 48 x 64"),
        ({"r": 5}, r"wrong shape: .*q_proj\.lora_A\.weight \[4, 48\], not \[5, 48\]"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan, not"),
        ({"lora_alpha": True}, "lora_alpha is True, not"),
        ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
        ({"rank_pattern": [1]}, "rank_pattern is no object"),
        ({"rank_pattern": {"(": 1}}, r"rank_pattern: '\(' is no regular expression"),
        ({"rank_pattern": {"(a+)+$": 1}}, r"regular expression '\(a\+\)\+\$' is too complex"),
        ({"target_modules": ".*.*.*x"}, "target_modules: the regular expression .* is too complex"),
        ({"target_modules": None}, "target_modules is empty"),
        ({"target_modules": ["q_proj", "\x1b[2J"]}, "target_modules is neither a list of names nor"),
        ({"rank_pattern": {"q\n": 1}}, r"the regular expression 'q\\n' is too complex"),
        ({"target_modules": [3]}, "target_modules is neither a list of names nor"),
        ({"target_modules": ["nothing"]}, "target_modules matches no module of the model"),
        ({"target_modules": ["to_kv"]}, r"LoRA on encoder\.layers\.0\.attn\.to_kv is not supported"),
        ({"target_modules": ["embed_tokens"]}, r"LoRA on language_model\.model\.embed_tokens is not supported"),
        ({"target_modules": ["q_proj"]}, r"not a module that adapter_config.json targets: .*v_proj\.lora_A\.weight"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, r"missing: .*k_proj\.lora_A\.weight"),
        ({"exclude_modules": ["v_proj"]}, "not a module that adapter_config.json targets"),
        ({"layers_to_transform": [0, 1]}, r"not a module that adapter_config.json targets: .*layers\.2\."),
        ({"layers_to_transform": "all"}, "layers_to_transform is neither a number nor"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(hf: Path, values: dict, message: str) -> None:
    # Given an adapter that asks for something else than is computed, when it is loaded, then the error names that
    change(hf, **values)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(hf)
    assert str(hf / "adapter_") in str(caught.value)


@pytest.mark.parametrize(
    "targets", [r".*\.(q|v)_proj", r"language_model\..*(q_proj|v_proj)", r"model\.language_model\..*(q|v)_proj"]
)
def test_targets_may_be_an_expression_in_either_spelling(hf: Path, targets: str) -> None:
    # Given targets as a regular expression, when the adapter is read, then it is that of the list of names
    before = flatten(open_checkpoint(hf).read())
    change(hf, target_modules=targets)
    after = flatten(open_checkpoint(hf).read())
    assert before.keys() == after.keys()


TEMPLATE = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = 'Today is ' ~ strftime_now('%B') ~ '. You are a model.' %}{% set turns = messages %}"
    "{% endif %}<|start_of_role|>system<|end_of_role|>{{ system }}<|end_of_text|>\n"
    "{% for turn in turns %}<|start_of_role|>{{ turn.role }}<|end_of_role|>{{ turn.content }}<|end_of_text|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)


def test_a_template_with_a_system_turn(tmp_path: Path) -> None:
    # Given a checkpoint with a chat template of the kind of Granite 3.3, which opens with a system turn of its own
    tokenizer = hf_fixture.make_tokenizer()
    tokenizer.add_special_tokens(["<|start_of_role|>", "<|end_of_role|>"])
    text = {**TINY["text_config"], "vocab_size": tokenizer.get_vocab_size()}
    hf_fixture.write_random_checkpoint(tmp_path, tied=True, **{**TINY, "text_config": text})
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    opened = open_checkpoint(tmp_path)

    # When an instruction is made a prompt, then its ids are those of system turn, user turn and the assistant's opening
    tokens = opened.chat_template().tokens(opened.tokenizer(), "transcribe the speech <|end_of_role|>")
    role, of, end = (tokenizer.token_to_id(t) for t in ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"))
    assert tokens.prefix[0] == role
    assert [x for x in tokens.prefix if x in (role, of, end)] == [role, of, end, role, of]
    assert "You are a model." in tokenizer.decode(list(tokens.prefix))
    assert [x for x in tokens.suffix if x in (role, of, end)] == [end, role, of]
    assert tokenizer.decode(list(tokens.suffix)).startswith("transcribe the speech <|end_of_role|>")
