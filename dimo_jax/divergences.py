"""Token-level divergences D(p_phi || p_psi) and their gradient in logit space (paper, Eq. 7 and Eq. 16-18).

A divergence is written once, in log space, as (log p, log q) -> (D, q dD/dq), p the teacher, q the auxiliary model.
Everything else, the projection onto logits and the VJP that hands the gradient to the generator, is generic.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from dimo_jax.errors import UserError

Divergence = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def forward_kl(log_p, log_q):
    """KL(p || q); f(u) = u log u. Logit gradient q - p (Eq. 17)."""
    p = jnp.exp(log_p)
    return jnp.sum(p * (log_p - log_q), -1), -p


def reverse_kl(log_p, log_q):
    """KL(q || p); f(u) = -log u. Logit gradient q (log q - log p - KL) (Eq. 18)."""
    weighted = jnp.exp(log_q) * (log_q - log_p)
    return jnp.sum(weighted, -1), weighted


def jeffreys(beta: float) -> Divergence:
    """(1 - beta) KL(p || q) + beta KL(q || p). A negative beta is no f-divergence, yet the paper's best is -0.2."""

    def divergence(log_p, log_q):
        (forward, r_forward), (reverse, r_reverse) = forward_kl(log_p, log_q), reverse_kl(log_p, log_q)
        return (1 - beta) * forward + beta * reverse, (1 - beta) * r_forward + beta * r_reverse

    return divergence


def jensen_shannon(log_p, log_q):
    """KL(p || m) + KL(q || m), m = (p + q) / 2; f(u) = -(u + 1) log((1 + u) / 2) + u log u."""
    log_m = jnp.logaddexp(log_p, log_q) - jnp.log(2.0)
    weighted = jnp.exp(log_q) * (log_q - log_m)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_m) + weighted, -1), weighted


def squared_hellinger(log_p, log_q):
    """sum (sqrt p - sqrt q)^2; f(u) = (sqrt u - 1)^2."""
    root_p, root_q = jnp.exp(log_p / 2), jnp.exp(log_q / 2)
    return jnp.sum((root_p - root_q) ** 2, -1), -root_p * root_q


def alpha_divergence(alpha: float) -> Divergence:
    """(sum p^(1-a) q^a - 1) / (a (a - 1)) for 0 < a < 1: forward KL as a -> 0, reverse KL as a -> 1.

    Raises:
      UserError: alpha outside (0, 1), where p^(1-a) q^a is unbounded and float32 overflows at ordinary logits.
    """
    if not 0 < alpha < 1:
        raise UserError(f"alpha divergence takes 0 < alpha < 1, given {alpha}: use forward_kl for 0, reverse_kl for 1")

    def divergence(log_p, log_q):
        power = jnp.exp((1 - alpha) * log_p + alpha * log_q)
        return (jnp.sum(power, -1) - 1) / (alpha * (alpha - 1)), power / (alpha - 1)

    return divergence


def f_divergence(f: Callable[[jax.Array], jax.Array]) -> Divergence:
    """sum q f(p / q) for any scalar f; dD/dq = h(u) = f(u) - u f'(u), with f' by automatic differentiation.

    u = p / q overflows where the logits are far apart. There (beyond |log u| = c, c = 0.45 log of the largest float:
    40 in float32, 319 in float64) f is continued as A + B log u towards 0 and u (A + B log u) towards infinity.
    That is exact up to rounding for KL, Jeffreys, Jensen-Shannon and Hellinger; slow power tails (alpha near 0 or 1)
    are off by up to 0.9 of the token's size at logits of +-60 in float32: use `alpha_divergence` for those.
    """

    def divergence(log_p, log_q):
        p, q, s = jnp.exp(log_p), jnp.exp(log_q), log_p - log_q
        cut = 0.45 * math.log(jnp.finfo(s.dtype).max)
        inner = jnp.clip(s, -cut, cut)
        value, slope = jax.jvp(lambda s: f(jnp.exp(s)), (inner,), (jnp.ones_like(s),))  # F(s) = f(e^s) and F'(s)
        up, up_slope = jnp.exp(-inner) * value, jnp.exp(-inner) * (slope - value)  # G = F / u and G', for large u
        large = s > cut
        terms = jnp.where(large, p * (up + up_slope * (s - inner)), q * (value + slope * (s - inner)))
        weighted = jnp.where(large, -p * up_slope, q * (value + slope * (s - inner) - slope))
        return jnp.sum(terms, -1), weighted

    return divergence


DIVERGENCES: dict[str, Callable[..., Divergence]] = {
    "forward_kl": lambda: forward_kl,
    "reverse_kl": lambda: reverse_kl,
    "jeffreys": jeffreys,
    "jensen_shannon": lambda: jensen_shannon,
    "squared_hellinger": lambda: squared_hellinger,
    "alpha": alpha_divergence,
}


def logit_gradient(divergence: Divergence, z_phi: jax.Array, z_psi: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Value [...] and gradient dD/dz_psi [..., V] of D(softmax z_phi || softmax z_psi).

    Eq. 18: with r = q dD/dq, the softmax projects it to g_j = r_j - q_j sum_k r_k. At least float32.
    """
    log_p, log_q = (jax.nn.log_softmax(z.astype(jnp.promote_types(z.dtype, jnp.float32))) for z in (z_phi, z_psi))
    value, r = divergence(log_p, log_q)
    return value, r - jnp.exp(log_q) * jnp.sum(r, -1, keepdims=True)


def token_divergence(divergence: Divergence) -> Callable:
    """The objective of Eq. 7: (z_theta, z_phi, z_psi), each [..., V] -> (D, surrogate), each [...].

    D is the VALUE of D(p_phi || p_psi); its GRADIENT dD/dz_psi is handed to z_theta, and none to z_phi and z_psi.
    z_theta's values are not read, and the gradient g, in z_theta's dtype, is the only residual. surrogate = |g|^2 / 2
    is the number the released program logs as its loss; it is not differentiable.
    """

    def value_and_gradient(z_phi, z_psi):
        value, g = logit_gradient(divergence, z_phi, z_psi)
        return (value, 0.5 * jnp.sum(g * g, -1)), g

    @jax.custom_vjp
    def objective(z_theta, z_phi, z_psi):
        return value_and_gradient(z_phi, z_psi)[0]

    def forward(z_theta, z_phi, z_psi):
        out, g = value_and_gradient(z_phi, z_psi)
        return out, g.astype(z_theta.dtype)

    def backward(g, cotangents):
        return (cotangents[0][..., None] * g).astype(g.dtype), None, None

    objective.defvjp(forward, backward)
    return objective
