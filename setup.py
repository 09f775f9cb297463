"""Lists the packages; all else is in pyproject.toml.

The directories `convert` and `checkpoints` are `granite_jax.convert` and `granite_jax.checkpoints`. The links of these
names in `granite_jax/` are for imports from a checkout; installing does not need them: archives and some clones have
none. `convert` by itself never becomes a package: it would shadow, or be shadowed by, any convert.py of the user's.
"""

from setuptools import find_namespace_packages, setup

DIRECTORIES = {"granite_jax.convert": "convert", "granite_jax.checkpoints": "checkpoints"}

packages = {"granite_jax", *find_namespace_packages(include=["granite_jax.*"])}
for package, directory in DIRECTORIES.items():
    packages |= {package, *(f"{package}.{name}" for name in find_namespace_packages(directory))}

setup(packages=sorted(packages), package_dir=DIRECTORIES)
