"""`granite_speech`: granite-4.0-1b-speech and its relatives."""

from granite_jax.models.family import Family
from granite_jax.models.granite_speech import functions
from granite_jax.models.granite_speech.config import read_config
from granite_jax.models.granite_speech.releases import RELEASES, release_of
from granite_jax.models.granite_speech.tensors import TABLE
from granite_jax.text.tasks import Capabilities

FAMILY = Family(
    read_config=read_config,
    abstract_params=functions.abstract_params,
    tensors=TABLE,
    capabilities=Capabilities(),
    releases=RELEASES,
    release_of=release_of,
)
