"""LoRA adapters as peft saves them: `adapter_config.json`, `adapter_model.safetensors`.

`checkpoint.lora` says how an adapter is kept in the parameter tree.
Reference: `LoraConfig` and `LoraModel` of peft 0.18 to 0.21.
"""

import dataclasses
import functools
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from granite_jax.array_types import Shape
from granite_jax.checkpoint.lora import Adapter, factor_paths
from granite_jax.checkpoint.tree import expected_shapes, raise_named
from granite_jax.convert import mapping
from granite_jax.errors import CheckpointError
from granite_jax.files import paths
from granite_jax.files.json_fields import read_json
from granite_jax.models.family import ModelConfig
from granite_jax.models.registry import family_of
from granite_jax.models.tensor_table import LINEAR, Rule

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MAX_RANK, _MAX_LAYERS = 1 << 16, 1 << 12

# Keys about training or the adapter's origin, which do not change the computation. Paths in them are not followed.
_IRRELEVANT = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "inference_mode"),
    *("loftq_config", "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size"),
    *("revision", "runtime_config", "task_type"),
}
# Initializations that do not change the base weights; PiSSA, OLoRA and the like do.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclasses.dataclass(frozen=True)
class AdapterConfig:
    """The fields of a peft `LoraConfig` that affect the computation.

    Fields:
      rank, alpha: defaults for modules that no pattern matches (regular expression -> value, the first match counts).
      target_modules, exclude_modules: suffixes of module names, or one regular expression for the whole name.
      layers: numbers of the layers that are adapted; None for all.
    """

    rank: int
    alpha: float
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    use_rslora: bool
    target_modules: tuple[str, ...] | str
    exclude_modules: tuple[str, ...] | str
    layers: tuple[int, ...] | None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "AdapterConfig":
        """Reads the dictionary of an `adapter_config.json`. Raises CheckpointError naming what is not supported."""
        remaining = {key: value for key, value in raw.items() if key not in _IRRELEVANT}
        if (peft_type := remaining.pop("peft_type", None)) != "LORA":
            raise CheckpointError(f"peft_type {peft_type!a:.40} is not supported, only 'LORA'")
        if (init := remaining.pop("init_lora_weights", True)) not in _INITS:
            raise CheckpointError(f"init_lora_weights {init!a:.40} is not supported: it changes the base weights, too")
        if (bias := remaining.pop("bias", "none")) != "none":
            raise CheckpointError(f"bias {bias!a:.40} is not supported, only 'none'")
        rank = _positive("r", remaining.pop("r", 8), integer=True)
        alpha = _positive("lora_alpha", remaining.pop("lora_alpha", 8))
        rank_pattern = _pattern("rank_pattern", remaining.pop("rank_pattern", None), integer=True)
        alpha_pattern = _pattern("alpha_pattern", remaining.pop("alpha_pattern", None))
        use_rslora = remaining.pop("use_rslora", False)
        if not isinstance(use_rslora, bool):
            raise CheckpointError(f"use_rslora is {use_rslora!a:.40}, neither true nor false")
        targets = _modules("target_modules", remaining.pop("target_modules", None))
        if not targets:
            raise CheckpointError("target_modules is empty")
        excluded = _modules("exclude_modules", remaining.pop("exclude_modules", None))
        layers = _layers(remaining.pop("layers_to_transform", None))
        # Any other key that is set changes the computation in an unknown way, and is refused by name.
        raise_named(
            "not supported:", [f"{key!a:.40}" for key, value in remaining.items() if value not in (None, False, [], {})]
        )
        return cls(int(rank), alpha, rank_pattern, alpha_pattern, use_rslora, targets, excluded, layers)

    def rank_of(self, module: str) -> int:
        """The rank of a module's adapter; 0 for none."""
        return int(_first_match(self.rank_pattern, module, self.rank)) if self._targets(module) else 0

    def scale_of(self, module: str) -> float:
        """The scale of the product of the two factors."""
        rank, alpha = self.rank_of(module), _first_match(self.alpha_pattern, module, self.alpha)
        return 0.0 if not rank else alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _targets(self, module: str) -> bool:
        if _is_named(self.exclude_modules, module) or not _is_named(self.target_modules, module):
            return False
        if self.layers is None:
            return True
        layer = re.match(r".*?\.[^.]*\.(\d+)\.", module)
        return layer is not None and int(layer[1]) in self.layers


@dataclasses.dataclass(frozen=True)
class Factor:
    """One leaf of the subtree: `a` or `b` of the adapters of equal modules.

    Fields:
      path, shape: the leaf's path and shape in the parameter tree.
      names: names of its tensors in the adapter's file; layers without an adapter have none.
      layers, ranks: layer and rank of each tensor.
      is_a: which of the two factors it is.
    """

    path: str
    shape: Shape
    names: tuple[str, ...]
    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    is_a: bool

    @property
    def tensor_shapes(self) -> list[Shape]:
        """The shape of each tensor in the adapter's file: `[r, in]` or `[out, r]`."""
        width = self.shape[-2] if self.is_a else self.shape[-1]
        return [(rank, width) if self.is_a else (width, rank) for rank in self.ranks]

    def fill(self, leaf: np.ndarray, number: int, tensor: np.ndarray) -> None:
        """Copies the tensor with this number into its part of the leaf."""
        mapping.copy(self._part(leaf, number), tensor.T)

    def tensor(self, number: int, leaf: np.ndarray) -> np.ndarray:
        """The tensor with this number: the inverse of `fill`."""
        return self._part(leaf, number).T

    def _part(self, leaf: np.ndarray, number: int) -> np.ndarray:
        matrix, rank = leaf[self.layers[number]] if leaf.ndim == 3 else leaf, self.ranks[number]
        return matrix[:, :rank] if self.is_a else matrix[:rank]


def read_config(directory: Path) -> AdapterConfig | None:
    """The configuration of a directory's adapter, or None if it has none. Raises CheckpointError naming the file."""
    path = paths.find(directory, CONFIG)
    if path is None:
        for name in (WEIGHTS, "adapter_model.bin"):
            if (directory / name).exists():
                raise CheckpointError(f"{directory / name}: a LoRA adapter without {CONFIG}")
        return None
    try:
        return AdapterConfig.from_dict(read_json(path))
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None


def factors(lora: AdapterConfig, config: ModelConfig) -> list[Factor]:
    """The leaves of the subtree that `lora` asks for. Raises CheckpointError naming modules it cannot be applied to."""
    leaves = [factor for rule, shape in _rules(config) for factor in _factors(rule, lora, shape)]
    if not leaves:
        raise CheckpointError("target_modules matches no module of the model")
    return leaves


def read(directory: Path, config: ModelConfig) -> Adapter | None:
    """The adapter of a directory as leaves of the parameter tree, or None if it has none.

    Raises:
      CheckpointError: naming `adapter_config.json`, which is not supported or cannot be applied to the model.
    """
    lora = read_config(directory)
    if lora is None:
        return None
    try:
        shapes = {factor.path: factor.shape for factor in factors(lora, config)}
    except CheckpointError as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from None
    return Adapter(lora.rank, lora.alpha, lora.target_modules, shapes, _scales(lora, config))


def match(names: Iterable[str], lora: AdapterConfig, config: ModelConfig) -> list[Factor]:
    """As `factors`, with the file's own spelling of names.

    Raises:
      CheckpointError: naming tensors of modules that `lora` does not target, or missing tensors of those it does.
    """
    spelled = {_released(name): name for name in names}
    targets = factors(lora, config)
    expected = {name for factor in targets for name in factor.names}
    raise_named("not a module that adapter_config.json targets:", [n for r, n in spelled.items() if r not in expected])
    raise_named("missing:", sorted(expected - set(spelled)))
    return [dataclasses.replace(factor, names=tuple(spelled[name] for name in factor.names)) for factor in targets]


def hf_tensors(
    lora: AdapterConfig, config: ModelConfig, names: mapping.Spelling = "released"
) -> Iterator[mapping.HFTensor]:
    """For every tensor: its name, its shape, the path of its leaf, and the function that extracts it from the leaf."""
    for factor in factors(lora, config):
        for number, (name, shape) in enumerate(zip(factor.names, factor.tensor_shapes, strict=True)):
            spelled = _PREFIX + mapping.spelled(name.removeprefix(_PREFIX), names)
            yield spelled, shape, factor.path, functools.partial(factor.tensor, number)


def _factors(rule: Rule, lora: AdapterConfig, shape: Shape) -> list[Factor]:
    if not rule.hf.endswith(".weight"):
        return []
    modules = _module_names(rule, shape)
    ranks = [lora.rank_of(module) for module in modules]
    if not any(ranks):
        return []
    if rule.transform is not LINEAR:
        raise CheckpointError(f"LoRA on {next(m for m, r in zip(modules, ranks, strict=True) if r)} is not supported")
    *layers, width_in, width_out = shape
    rank = max(ranks)
    if rank > min(width_in, width_out):
        raise CheckpointError(f"rank {rank} exceeds the size of {modules[ranks.index(rank)]}, {width_in} x {width_out}")
    adapted = tuple(layer for layer, layer_rank in enumerate(ranks) if layer_rank)
    adapted_ranks = tuple(ranks[layer] for layer in adapted)
    a, b = factor_paths(rule.path)
    names = [tuple(f"{_PREFIX}{modules[layer]}.lora_{side}.weight" for layer in adapted) for side in "AB"]
    return [
        Factor(a, (*layers, width_in, rank), names[0], adapted, adapted_ranks, True),
        Factor(b, (*layers, rank, width_out), names[1], adapted, adapted_ranks, False),
    ]


def _scales(lora: AdapterConfig, config: ModelConfig) -> dict[str, np.ndarray]:
    scales_by_path = {}
    for rule, shape in _rules(config):
        if rule.transform is LINEAR:
            scales = [lora.scale_of(module) for module in _module_names(rule, shape)]
            if any(scales):
                scales_by_path[rule.path] = np.array(scales if rule.stacked else scales[0], np.float32)
    return scales_by_path


def _rules(config: ModelConfig) -> list[tuple[Rule, Shape]]:
    """The rules of the leaves that the model has, and the leaves' shapes."""
    rules, shapes = family_of(config.model_type).tensors.rules, expected_shapes(config)
    return [(rule, shapes[rule.path]) for rule in rules if rule.path in shapes]


def _module_names(rule: Rule, shape: Shape) -> list[str]:
    module = rule.hf.removesuffix(".weight")
    if rule.stacked and shape[0] > _MAX_LAYERS:  # checked before a name is made for each
        raise CheckpointError(f"{shape[0]} layers are too many for an adapter")
    return [module.format(layer=layer) for layer in range(shape[0])] if rule.stacked else [module]


def _released(name: str) -> str:
    return _PREFIX + mapping.released_name(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else name


def _is_named(modules: tuple[str, ...] | str, name: str) -> bool:
    # An expression may have been written for names in any spelling.
    if isinstance(modules, str):
        names = [mapping.spelled(f"{name}.", spelling)[:-1] for spelling in mapping.SPELLINGS]
        return bool(modules) and any(re.fullmatch(modules, spelled) for spelled in names)
    return any(name == module or name.endswith(f".{module}") for module in modules)


def _first_match(pattern: tuple[tuple[str, Any], ...], module: str, default: Any) -> Any:
    return next((value for key, value in pattern if re.match(rf"(.*\.)?({key})$", module)), default)


def _positive(key: str, value: Any, integer: bool = False) -> float:
    types = int if integer else (int, float)
    if isinstance(value, bool) or not isinstance(value, types) or not 0 < value < _MAX_RANK:
        raise CheckpointError(f"{key} is {value!a:.40}, not a positive number below {_MAX_RANK}")
    return value


def _pattern(key: str, raw: Any, integer: bool = False) -> tuple[tuple[str, Any], ...]:
    if not isinstance(raw or {}, dict):
        raise CheckpointError(f"{key} is no object")
    return tuple((_expression(key, name), _positive(key, value, integer)) for name, value in (raw or {}).items())


def _modules(key: str, raw: Any) -> tuple[str, ...] | str:
    if isinstance(raw, str):
        return _expression(key, raw)
    if raw is not None and (not isinstance(raw, list) or not all(_is_name(name) for name in raw)):
        raise CheckpointError(f"{key} is neither a list of names nor a regular expression")
    return tuple(raw or ())


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and name != ""


def _layers(raw: Any) -> tuple[int, ...] | None:
    layers = [raw] if isinstance(raw, int) else raw
    if layers is not None and (not isinstance(layers, list) or not all(type(layer) is int for layer in layers)):
        raise CheckpointError("layers_to_transform is neither a number nor a list of numbers")
    return tuple(layers) if layers else None


def _expression(key: str, pattern: str) -> str:
    """Returns `pattern` if it compiles and cannot take forever to match, as `(a+)+` and long rows of `.*` can."""
    repeats, groups = len(re.findall(r"[*+?{]", pattern)), pattern.count("(")
    # A back-reference can repeat without a repetition sign.
    if (
        not pattern.isprintable()
        or len(pattern) > 512
        or repeats > 2
        or groups > 2
        or re.search(r"\)[*+?{]|\\[0-9]|\(\?", pattern)
    ):
        raise CheckpointError(f"{key}: the regular expression {pattern!a:.80} is too complex")
    try:
        with warnings.catch_warnings(
            action="error"
        ):  # about syntax that later versions of Python will read differently
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError, Warning) as error:
        raise CheckpointError(f"{key}: {pattern!a:.80} is no regular expression ({error})") from None
    return pattern
