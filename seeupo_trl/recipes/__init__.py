"""What the scripts in `examples/` share: their arguments, the report of a training, a model from PyPI, a warm-up."""
