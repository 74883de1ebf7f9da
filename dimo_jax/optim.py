"""Optimisers and learning-rate schedules by name."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from dimo_jax.errors import UserError

OPTIMIZERS = ("adam", "adamw")
# Factor of the learning rate at outer step s of a run of n steps with w warm-up steps. `constant_with_warmup` starts at
# exactly 0, as in the released program: the first update moves nothing.
LR_SCHEDULES: dict[str, Callable] = {
    "constant": lambda s, w, n: jnp.ones(()),
    "constant_with_warmup": lambda s, w, n: jnp.minimum(1.0, s / max(w, 1)),
    "cosine_with_warmup": lambda s, w, n: (
        jnp.minimum(1.0, s / max(w, 1)) * (0.5 + 0.5 * jnp.cos(jnp.pi * jnp.clip((s - w) / max(n - w, 1), 0, 1)))
    ),
}


@dataclasses.dataclass(frozen=True)
class OptimSpec:
    """Adam, or AdamW with decoupled weight decay; clip 0 is off; learning_rate is the peak of the schedule.

    The learning rate is a function of the outer step, so two networks updated at different rhythms keep one clock.
    """

    name: str = "adam"
    learning_rate: float = 1e-5
    schedule: str = "constant_with_warmup"
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 0.0

    def __post_init__(self):
        for field, known in (("name", OPTIMIZERS), ("schedule", tuple(LR_SCHEDULES))):
            if getattr(self, field) not in known:
                raise UserError(f"unknown optimiser {field} {getattr(self, field)!r}: known are {', '.join(known)}")
        if self.name == "adam" and self.weight_decay:
            raise UserError(f"adam takes no weight decay, given {self.weight_decay}: use adamw")


def make_transform(spec: OptimSpec) -> optax.GradientTransformation:
    """Gradients -> directions, to be multiplied by minus the learning rate: clip by global norm, Adam, decay."""
    clip = optax.clip_by_global_norm(spec.clip) if spec.clip else optax.identity()
    decay = optax.add_decayed_weights(spec.weight_decay) if spec.weight_decay else optax.identity()
    return optax.chain(clip, optax.scale_by_adam(spec.beta1, spec.beta2, spec.eps), decay)


def make_learning_rate(spec: OptimSpec, num_steps: int) -> Callable[[jax.Array], jax.Array]:
    """Outer step -> learning rate."""
    factor = LR_SCHEDULES[spec.schedule]
    return lambda step: spec.learning_rate * factor(step, spec.warmup_steps, num_steps)
