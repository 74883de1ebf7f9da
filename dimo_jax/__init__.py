"""Di[M]O in JAX: one-step distillation of masked diffusion models (arXiv 2503.15457)."""

__version__ = "0.1.0"
