"""What comes with a text: how far the model's two parts agree."""

import random

import kaldialign
import pytest

from granite_jax.results import disagreement


@pytest.mark.parametrize(
    ("text", "other", "share"),
    [
        ("", "", 0.0),
        ("a", "", 1.0),
        ("", "a b", 1.0),
        ("a b c", "a c", 1 / 3),
        ("a b", "c d", 1.0),
        ("a b", "a b", 0.0),
    ],
)
def test_disagreement_is_a_share_of_the_longer_text(text: str, other: str, share: float) -> None:
    assert disagreement(text, other) == pytest.approx(share)


def test_disagreement_is_the_edit_distance_of_words() -> None:
    # Given random texts of few words, when compared, then the distance is that of a well-known library
    rng = random.Random(0)
    for _ in range(300):
        a, b = ([rng.choice("abc") for _ in range(rng.randrange(8))] for _ in range(2))
        distance = kaldialign.edit_distance(a, b)["total"]
        assert disagreement(" ".join(a), " ".join(b)) == pytest.approx(distance / max(len(a), len(b), 1))
