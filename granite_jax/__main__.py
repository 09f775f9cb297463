"""`python -m granite_jax`, the same as `granite-jax`."""

from granite_jax.cli import main

main()
