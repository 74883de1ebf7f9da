"""Random order: every step reveals a uniformly random subset. The released teacher's reported samples use it."""

from dimo_jax.samplers.loop import reveal_sampler


def random_order(*, num_steps=16, **options):
    """`num_steps` evaluations; the options are those of `reveal_sampler`."""
    return reveal_sampler(
        lambda draws, log_p, progress: draws.uniform("order", log_p.shape), num_steps=num_steps, **options
    )
