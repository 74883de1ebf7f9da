"""Every random number of a step comes from one `Draws`, by name: reproducible, and replaceable by recorded arrays."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """A key that hands out named draws; each name is used once in a scope.

    `recorded` may hold arrays under the same (nested) names: these are then used in place of fresh draws, which is
    how a recorded run is replayed through the very same step.
    """

    key: jax.Array
    recorded: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def at_step(self, step: jax.Array | int) -> "Draws":
        """The draws of one step: a pure function of (key, step)."""
        return Draws(jax.random.fold_in(self.key, step), self.recorded)

    def scope(self, name: str, index: jax.Array | int | None = None) -> "Draws":
        """The draws of a part of the step; with `index`, of its index-th repetition (it leads recorded arrays)."""
        key, recorded = self.named_key(name), self.recorded.get(name, {})
        if index is not None:
            key, recorded = jax.random.fold_in(key, index), jax.tree.map(lambda a: a[index], recorded)
        return Draws(key, recorded)

    def named_key(self, name: str) -> jax.Array:
        """A key for `name` (dropout, embedding noise of a sampler): crc32 of the name folded in."""
        return jax.random.fold_in(self.key, zlib.crc32(name.encode()) & 0x7FFFFFFF)

    def _recorded_or(self, name, shape, draw):
        if name not in self.recorded:
            return draw(self.named_key(name))
        value = jnp.asarray(self.recorded[name])
        if value.shape != tuple(shape):
            raise ValueError(f"recorded draw {name!r} has the shape {value.shape}, the step draws {tuple(shape)}")
        return value

    def uniform(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        """U[0, 1), float32."""
        return self._recorded_or(name, shape, lambda key: jax.random.uniform(key, shape))

    def normal(self, name: str, shape: tuple[int, ...]) -> jax.Array:
        """N(0, 1), float32."""
        return self._recorded_or(name, shape, lambda key: jax.random.normal(key, shape))

    def randint(self, name: str, shape: tuple[int, ...], low: int, high: int) -> jax.Array:
        """Uniform integers in [low, high), int32."""
        return self._recorded_or(name, shape, lambda key: jax.random.randint(key, shape, low, high))

    def subset(self, name: str, count: jax.Array, maskable: jax.Array) -> jax.Array:
        """A uniformly random subset of `count` [B] of the positions where `maskable` [B, L] -> bool [B, L]."""

        def draw(key):
            u = jnp.where(maskable, jax.random.uniform(key, maskable.shape), jnp.inf)
            rank = jnp.argsort(jnp.argsort(u, axis=-1), axis=-1)
            return (rank < count[:, None]) & maskable

        return self._recorded_or(name, maskable.shape, draw)

    def coins(self, name: str, probability: jax.Array, maskable: jax.Array) -> jax.Array:
        """An independent coin of `probability` [B] for every position where `maskable` [B, L] -> bool [B, L]."""

        def draw(key):
            return (jax.random.uniform(key, maskable.shape) < probability[:, None]) & maskable

        return self._recorded_or(name, maskable.shape, draw)

    def gumbel(self, name: str, batch: int, start: jax.Array | int, length: int, num_logits: int) -> jax.Array:
        """Gumbel noise [batch, length, num_logits] of the positions start .. start + length, float32.

        A position's noise depends on the position alone, so a vocabulary head run in chunks draws what a whole one
        does. The precise mode is taken: coarse Gumbel noise changes what is sampled.
        """
        if name in self.recorded:
            value = jnp.asarray(self.recorded[name])
            if (value.shape[0], value.shape[2]) != (batch, num_logits):
                wanted = (batch, "L", num_logits)
                raise ValueError(f"recorded draw {name!r} has the shape {value.shape}, the step draws {wanted}")
            return jax.lax.dynamic_slice_in_dim(value, start, length, axis=1)
        keys = jax.vmap(lambda i: jax.random.fold_in(self.named_key(name), i))(start + jnp.arange(length))
        return jax.vmap(lambda key: jax.random.gumbel(key, (batch, num_logits), mode="high"), out_axes=1)(keys)
