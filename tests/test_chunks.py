"""The vocabulary head in chunks is the whole head: the same tokens, the same updates, one block of logits at a time."""

import dataclasses
import functools

import goldens_maskgit
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import toy_teacher

from dimo_jax.dimo import train_step
from dimo_jax.dimo_state import init_dimo
from dimo_jax.models import maskgit
from dimo_jax.nets import Conditions, over_positions
from dimo_jax.objective import begin_step, generate
from dimo_jax.rng import Draws
from dimo_jax.spec import DimoSpec
from dimo_jax.state import Optimizer

LABELS, DRAWS = jnp.asarray([3, 1, 4]), Draws(jax.random.key(1))
# Plain descent with rate 1: weights differ after the step by exactly what the gradients differ by.
OPTIMIZERS = dict.fromkeys(("generator", "auxiliary"), Optimizer(optax.identity(), lambda step: jnp.ones(())))
VARIANTS = {
    "released": DimoSpec(dropout=False, teacher_dropout=False),
    "all terms": DimoSpec(
        weight="paper", soft_targets=0.4, soft_temperature=2.0, divergence={"name": "jeffreys", "beta": -0.2},
        share_x_t=True, resample=False, teacher_temperature=1.5, dropout=False, teacher_dropout=False,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    """(teacher, its parameters): the recorded 4x4 MaskGIT."""
    recorded = goldens_maskgit.load()
    spec = goldens_maskgit.spec_of(recorded)
    params = {"net": jax.tree.map(jnp.asarray, goldens_maskgit.to_tree(recorded, "state_dict/"))}
    teacher = toy_teacher(maskgit.as_net(spec), spec.tokens, lambda rng: params)
    return teacher._replace(null=lambda params, labels, role: jnp.full_like(labels, spec.num_classes)), params


def one_step(model, spec):
    """-> (state, metrics) after one train_step."""
    teacher, params = model
    lead = {"generator": (1,), "auxiliary": (1, 1)}
    batch = {name: Conditions(jnp.broadcast_to(LABELS, (*a, *LABELS.shape))) for name, a in lead.items()}
    step = functools.partial(train_step, teacher=teacher, spec=spec, optimizers=OPTIMIZERS)
    return jax.jit(step, compiler_options=goldens_maskgit.QUICK)(
        init_dimo(params["net"], spec, OPTIMIZERS), params, batch, DRAWS
    )


def test_chunks_draw_the_same_tokens(model):
    teacher, params = model

    @functools.partial(jax.jit, compiler_options=goldens_maskgit.QUICK)
    def tokens(params):
        specs = [DimoSpec(dropout=False, top_k=9, num_chunks=n) for n in (1, 2, 4, 16)]
        steps = [begin_step(teacher, spec, OPTIMIZERS, params, 0, DRAWS) for spec in specs]
        return [generate(step, params["net"], Conditions(LABELS), DRAWS).x for step in steps]

    whole, *chunked = tokens(params)
    assert len(np.unique(whole)) > 5
    for x in chunked:
        np.testing.assert_array_equal(x, whole)


@pytest.mark.parametrize(("variant", "num_chunks"), [("released", 4), ("all terms", 2)])
def test_chunks_make_the_same_update(model, variant, num_chunks):
    """Weights after a step to 1e-6 of the largest of their array (w(t) makes some gradients large)."""
    whole, whole_metrics = one_step(model, VARIANTS[variant])
    for net in ("generator", "auxiliary"):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), getattr(whole, net).params, model[1]["net"])
        assert max(jax.tree.leaves(moved)) > 1e-2, net
    state, metrics = one_step(model, dataclasses.replace(VARIANTS[variant], num_chunks=num_chunks))
    for a, b in zip(jax.tree.leaves(state[:3]), jax.tree.leaves(whole[:3]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1, np.abs(b).max()))
    for name, value in metrics.items():
        np.testing.assert_allclose(value, whole_metrics[name], rtol=1e-6, atol=1e-6, err_msg=name)


def test_chunks_hold_one_block_of_logits():
    """No [B, L, V] is kept for the backward pass: the largest array of the whole program is one chunk's logits."""
    h, table = jnp.ones((2, 8, 3)), jnp.ones((3, 100))

    def loss(h, num_chunks):
        def normaliser(start, length):
            return jax.nn.logsumexp(jax.lax.dynamic_slice_in_dim(h, start, length, 1) @ table, -1)

        return jnp.sum(over_positions(normaliser, 8, num_chunks))

    for num_chunks, expected in ((1, 2 * 8 * 100), (4, 2 * 2 * 100)):
        program = jax.make_jaxpr(jax.grad(loss), static_argnums=1)(h, num_chunks)
        assert largest(program.jaxpr) == expected


def largest(jaxpr):
    """Size of the largest array that the program or any program inside it makes."""
    sizes = [v.aval.size for equation in jaxpr.eqns for v in equation.outvars]
    inner = [getattr(p, "jaxpr", p) for equation in jaxpr.eqns for p in equation.params.values()]
    return max(sizes + [largest(p) for p in inner if hasattr(p, "eqns")])
