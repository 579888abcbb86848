"""Train large language models in JAX from a configuration file."""

__version__ = "0.1.0"
