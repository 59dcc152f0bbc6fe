"""The packages of the wheel; all else about it is in pyproject.toml.

The commands and their configs are packed below `vera_jax`: users have folders
of their own that are called experiments and configs.
"""

from setuptools import find_namespace_packages, find_packages, setup

# Folders of data are packages of their own here, without an __init__.py.
COMMANDS = find_namespace_packages(
  include=["experiments*", "configs*"], exclude=["*__pycache__*"]
)

setup(
  packages=find_packages(include=["vera_jax*"])
  + [f"vera_jax._commands.{name}" for name in COMMANDS],
  package_dir={"vera_jax._commands": "."},
)
