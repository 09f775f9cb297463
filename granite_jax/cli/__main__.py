"""`python -m granite_jax.cli`, the same as `granite-jax`."""

from granite_jax.cli import main

main()
