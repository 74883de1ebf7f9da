"""Fixtures that several test files share."""

import jax
import pytest


@pytest.fixture(scope="module")
def little_optimization():
    """Programs that run for milliseconds compile in half the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
