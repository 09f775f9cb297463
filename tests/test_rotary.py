"""Rotary embeddings and YaRN against what transformers computes, and configurations of them that make no sense."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from goldens.cases import ROTARY_PATH

from granite_jax.errors import CheckpointError
from granite_jax.models.layers.rotary import Rotary

GOLDENS = json.loads(ROTARY_PATH.read_text())
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def rotary_of(options: dict[str, Any], version: tuple[int, int] | None = None) -> Rotary:
    return Rotary.from_dict(options, options["max_position_embeddings"], version)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: str(golden["options"]))
def test_frequencies_are_those_of_transformers(golden: dict[str, Any]) -> None:
    # Given the keys of a text_config, when they are read, then frequencies and factor are the reference's
    options = golden["options"]
    rotary = rotary_of(options)
    expected = np.array(golden["inverse_frequencies"], np.float32)
    np.testing.assert_allclose(rotary.inverse_frequencies(options["head_dim"]), expected, rtol=2e-7, atol=0)
    factor = 1.0 if rotary.yarn is None else rotary.yarn.attention_factor
    assert factor == pytest.approx(golden["attention_factor"], rel=1e-12)


def test_tables_hold_scaled_cosines_and_sines_up_to_the_last_position() -> None:
    # Given the frequencies of granite-speech-5.0-2b, when positions are embedded
    golden = GOLDENS[0]
    positions = np.array([[0, 1, 4095, 16383]])
    cos, sin = rotary_of(golden["options"]).tables(jnp.asarray(positions), 128)

    # Then tables are 1.1386 times the cosines and sines, the second half of the channels like the first
    assert golden["attention_factor"] == pytest.approx(1.1386, abs=1e-4)
    angles = positions[..., None] * np.array(golden["inverse_frequencies"])
    for table, function in ((cos, np.cos), (sin, np.sin)):
        expected = np.tile(golden["attention_factor"] * function(angles), 2)
        np.testing.assert_allclose(table, expected, atol=2e-3)  # float32 angles of 16,000 radians
        np.testing.assert_allclose(table[:, :2], expected[:, :2], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope scaling 'linear' is not supported, only"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "is not supported, only default or yarn"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\], not an object"),
        ({"rope_scaling": YARN | {"factr": 2.0}}, "'yarn' has the unknown key 'factr'"),
        (
            {"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}},
            "rope_scaling contradicts .*rope_parameters",
        ),
        ({"rope_scaling": YARN | {"factor": -4.0}}, "factor is not positive"),
        ({"rope_scaling": YARN | {"factor": "4"}}, "factor is '4', not float"),
        ({"rope_scaling": YARN | {"factor": 1e9}}, r"factor is 1e\+09, at most"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 0}}, "original_max_position_embeddings is 0"),
        ({"rope_scaling": YARN | {"beta_fast": -1}}, "beta_fast is not positive"),
        ({"rope_scaling": YARN | {"truncate": "no"}}, "truncate is 'no', neither true nor false"),
        ({"rope_scaling": YARN | {"attention_factor": float("nan")}}, "attention_factor is nan"),
        ({"rope_scaling": YARN | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is not supported, only 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported, only 1"),
        ({"rope_scaling": YARN, "rope_theta": 1.0}, "rope_theta is 1, not above 1"),
        ({"rope_parameters": YARN | {"rope_theta": 5e5}, "rope_theta": 1e4}, "rope_theta 10000.0 contradicts"),
        ({"rope_scaling": YARN, "original_max_position_embeddings": 32}, "original_max_position_embeddings 32 contra"),
    ],
)
def test_scaling_that_no_model_has_is_refused_by_key(options: dict[str, Any], message: str) -> None:
    # Given a rope section that makes no sense, or that versions of transformers read differently, then its key is named
    with pytest.raises(CheckpointError, match=f"^config: .*{message}"):
        rotary_of({"max_position_embeddings": 256, **options})


def test_what_old_releases_computed_otherwise_is_refused() -> None:
    # Given a factor unlike the ratio of positions, of which transformers before 4.57 took the ratio, then it is refused
    options = {"max_position_embeddings": 256, "rope_scaling": YARN | {"factor": 3.0}}
    assert (
        rotary_of(options).yarn == rotary_of(options, (4, 57)).yarn != rotary_of(options | {"rope_scaling": YARN}).yarn
    )
    with pytest.raises(CheckpointError, match="factor 3 contradicts 256 positions of 64"):
        rotary_of(options, (4, 53))
    assert rotary_of(options | {"rope_scaling": YARN}, (4, 53)).yarn is not None
    # And one without original positions is the factor's in all of them
    plain = options | {"rope_scaling": {"rope_type": "yarn", "factor": 3.0}}
    assert rotary_of(plain, (4, 53)).yarn == rotary_of(plain).yarn
