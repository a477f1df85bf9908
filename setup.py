"""All is in `pyproject.toml`, but this: an installed package carries `examples/`, whose scripts `seeupo-trl` runs."""

from setuptools import find_namespace_packages, find_packages, setup


examples = find_namespace_packages(include=["examples", "examples.*"])

setup(
    packages=[*find_packages(include=["seeupo_trl*"]), *(f"seeupo_trl.{name}" for name in examples)],
    package_dir={f"seeupo_trl.{name}": name.replace(".", "/") for name in examples},
)
