"""The terms of Algorithm 1: the generator's sample, its corruption, and the two losses."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dimo_jax.categorical import sample_ids
from dimo_jax.corruption import corrupt, hybrid_init, mask_ratio
from dimo_jax.divergences import DIVERGENCES, token_divergence
from dimo_jax.guidance import guidance_scale, guided_head
from dimo_jax.mdm import masked_mean, token_nll
from dimo_jax.nets import Conditions, over_positions
from dimo_jax.registry import make
from dimo_jax.rng import Draws
from dimo_jax.spec import DimoSpec
from dimo_jax.state import merge

GENERATOR_METRICS = ("divergence", "generator_surrogate", "mask_ratio")
AUXILIARY_METRICS = ("loss", "hard_nll", "accuracy")


class Step(NamedTuple):
    """What all parts of one step share: the static teacher, spec and optimizers, and the step's own arrays."""

    teacher: Any
    spec: DimoSpec
    optimizers: dict
    params: dict
    r_init: jax.Array
    sigma: jax.Array

    def full(self, trainable: dict) -> dict:
        """A network's parameters: the trainable leaves over the teacher's (frozen) ones."""
        return merge(self.params["net"], trainable)

    def time(self, ratio: jax.Array) -> jax.Array:
        """The mask ratio as the networks see it; always 0 in the released Meissonic (DEVIATION 7)."""
        return ratio if self.spec.time_input == "mask_ratio" else jnp.zeros_like(ratio)

    def encode(self, conditions: Conditions):
        """-> the conditions as the trunk takes them."""
        return self.teacher.encode(self.params, conditions.raw)

    def head(
        self, params, x, ratio, conditions: Conditions, draws: Draws, *, role: str, scale, dropout: bool
    ) -> Callable:
        """(start, length) -> logits of `params` at x, guided by `scale` against the null condition of `role`."""
        cond = self.encode(conditions)
        return guided_head(
            self.teacher.net, params, x, cond, self.teacher.null(self.params, cond, role), self.time(ratio), scale,
            attn_mask=conditions.attn_mask, dropout_rng=draws.named_key("dropout") if dropout else None,
        )  # fmt: skip


class Sample(NamedTuple):
    """x_init [B, L] and where it holds [M], the generator's hidden states h at x_init, its tokens x [B, L]."""

    x_init: jax.Array
    is_mask: jax.Array
    h: jax.Array
    x: jax.Array


class Corrupted(NamedTuple):
    """x_t [B, L], where it was masked [B, L], and the mask ratio r_t [B]."""

    ids: jax.Array
    masked: jax.Array
    ratio: jax.Array


def begin_step(teacher, spec: DimoSpec, optimizers, params, outer_step, draws: Draws) -> Step:
    """Draw r_init where it is drawn (once an iteration, for both updates) and set sigma for this outer step."""
    r_init = jnp.asarray(spec.r_init, jnp.float32)
    if r_init.ndim:
        low, high = spec.r_init
        r_init = low + (high - low) * draws.uniform("r_init", ())
    progress = outer_step / max(spec.sigma_warmup_steps, 1)
    warmup = {
        "fix": 1.0,
        "linear": jnp.minimum(1.0, progress),
        "cos": 0.5 - 0.5 * jnp.cos(jnp.pi * jnp.minimum(1.0, progress)),
        "exp": 1 - jnp.exp(-progress),
    }[spec.sigma_schedule]
    return Step(teacher, spec, optimizers, params, r_init, jnp.asarray(spec.sigma_init * warmup, jnp.float32))


def generate(step: Step, theta, conditions: Conditions, draws: Draws) -> Sample:
    """Lines 4-6: x_init ~ p_init, h = trunk(theta, x_init), x ~ softmax(head(theta, h) / temperature)."""
    spec, tokens = step.spec, step.teacher.tokens
    batch = jax.tree.leaves(conditions.raw)[0].shape[0]
    x_init, is_mask = hybrid_init(
        draws.scope("x_init"), tokens, batch, step.r_init, fill=spec.fill,
        maskable=conditions.maskable, given=conditions.given,
    )  # fmt: skip
    h = perturbed_trunk(step, theta, x_init, jnp.full(batch, step.r_init), conditions, draws)

    def sample(start, length):
        gumbel = draws.gumbel("tokens", batch, start, length, tokens.num_logits)
        z = jax.lax.stop_gradient(step.teacher.net.head(step.full(theta), h, start, length))
        return sample_ids(z, gumbel, temperature=spec.temperature, top_k=spec.top_k, top_p=spec.top_p)

    x = over_positions(sample, tokens.length, spec.num_chunks)
    if conditions.maskable is not None:
        x = jnp.where(conditions.maskable, x, conditions.given)
    return Sample(x_init, is_mask, h, x)


def perturbed_trunk(step: Step, theta, x, ratio, conditions: Conditions, draws: Draws):
    """theta's hidden states at x with embeddings perturbed by sigma (Sec. 4.3): only the generator's are."""
    net = step.teacher.net
    return net.trunk(
        step.full(theta), x, step.encode(conditions), step.time(ratio),
        sigma=step.sigma, noise=draws.normal("noise", net.noise_shape(len(x))), attn_mask=conditions.attn_mask,
        dropout_rng=draws.named_key("dropout") if step.spec.dropout else None,
    )  # fmt: skip


def corrupt_sample(step: Step, schedule: str, sample: Sample, conditions: Conditions, draws: Draws) -> Corrupted:
    """Lines 8 and 12: x_t ~ q(x_t | x) with the mask ratio of `schedule` (a field of the spec)."""
    spec, tokens = step.spec, step.teacher.tokens
    ratio = mask_ratio(draws, len(sample.x), getattr(spec, schedule), spec.mask_ratio_bounds)
    ids, masked = corrupt(
        draws, sample.x, ratio, tokens.mask_token, exact_count=spec.exact_count, maskable=conditions.maskable
    )
    return Corrupted(ids, masked, ratio)


def generator_loss(step: Step, theta, psi, sample: Sample, x_t: Corrupted, conditions: Conditions, draws: Draws):
    """Lines 9-10: a scalar whose value is the divergence and whose gradient in theta is Eq. 7.

    -> (loss, metrics, z_psi), the last the function (start, length) -> psi's logits at x_t.
    """
    spec, tokens = step.spec, step.teacher.tokens
    arguments = {"x": x_t.ids, "ratio": x_t.ratio, "conditions": conditions}
    scale = guidance_scale(spec.teacher_cfg_scale, x_t.ratio, adaptive=spec.adaptive_cfg)
    z_phi = step.head(
        step.params["net"], **arguments, draws=draws.scope("teacher"), role="teacher", scale=scale,
        dropout=spec.teacher_dropout,
    )  # fmt: skip
    scale = guidance_scale(spec.auxiliary_cfg_scale, x_t.ratio, adaptive=spec.adaptive_cfg)
    z_psi = step.head(
        step.full(psi), **arguments, draws=draws.scope("auxiliary"), role="auxiliary", scale=scale, dropout=spec.dropout
    )  # fmt: skip
    h = gradient_states(step, theta, sample, x_t, conditions, draws.scope("gradient"))
    objective = token_divergence(make(DIVERGENCES, spec.divergence, "divergence"))

    def token_terms(start, length):
        z_theta = step.teacher.net.head(step.full(theta), h, start, length)
        zs = z_phi(start, length) / spec.teacher_temperature, z_psi(start, length) / spec.auxiliary_temperature
        return objective(z_theta, *map(jax.lax.stop_gradient, zs))

    divergence, surrogate = over_positions(token_terms, tokens.length, spec.num_chunks)
    weight = paper_weight(step, theta, sample, z_phi) if spec.weight == "paper" else jnp.ones_like(x_t.ratio)
    loss = reduce_tokens(spec, weight[:, None] * divergence, x_t.masked, tokens.num_logits)
    surrogate = reduce_tokens(spec, weight[:, None] ** 2 * surrogate, x_t.masked, tokens.num_logits)
    metrics = {"divergence": loss, "generator_surrogate": surrogate, "mask_ratio": jnp.mean(x_t.ratio)}
    return spec.loss_weight * loss, metrics, z_psi


def gradient_states(step: Step, theta, sample: Sample, x_t: Corrupted, conditions: Conditions, draws: Draws):
    """Hidden states at the input where dz_theta/dtheta is taken: x_init (the default), x_t, or x with [M] put back."""
    if step.spec.gradient_input == "x_init":
        return sample.h
    if step.spec.gradient_input == "x_t":
        return perturbed_trunk(step, theta, x_t.ids, x_t.ratio, conditions, draws)
    x = jnp.where(sample.is_mask, step.teacher.tokens.mask_token, sample.x)
    return perturbed_trunk(step, theta, x, jnp.full(len(x), step.r_init), conditions, draws)


def paper_weight(step: Step, theta, sample: Sample, z_phi: Callable) -> jax.Array:
    """w(t) [B] of the paper's appendix: 1 / mean |p_theta(x_0 | x_init) - p_phi(x_0 | x_t)|, over L and V."""
    spec = step.spec

    def difference(start, length):
        z_theta = jax.lax.stop_gradient(step.teacher.net.head(step.full(theta), sample.h, start, length))
        p_theta = jax.nn.softmax(z_theta.astype(jnp.float32) / spec.temperature)
        p_phi = jax.nn.softmax(z_phi(start, length).astype(jnp.float32) / spec.teacher_temperature)
        return jnp.mean(jnp.abs(p_theta - p_phi), -1)

    mean = jnp.mean(over_positions(difference, step.teacher.tokens.length, spec.num_chunks), -1)
    return 1 / jnp.maximum(mean, 1e-5)


def reduce_tokens(spec: DimoSpec, values: jax.Array, masked: jax.Array, num_logits: int) -> jax.Array:
    """[B, L] -> scalar over masked positions: sum / B, mean_tokens (the paper's 1 / L_M), mean_all / (B L V)."""
    total = jnp.sum(values * masked, -1)
    if spec.token_reduction == "mean_tokens":
        return jnp.mean(total / jnp.maximum(jnp.sum(masked, -1), 1))
    return jnp.mean(total) / (masked.shape[1] * num_logits if spec.token_reduction == "mean_all" else 1)


def auxiliary_loss(
    step: Step,
    theta,
    psi,
    sample: Sample,
    x_t: Corrupted,
    conditions: Conditions,
    draws: Draws,
    z_psi: Callable | None = None,
):
    """Line 13: masked cross-entropy of psi on theta's tokens -> (loss, metrics).

    (1 - a) hard + a soft, a = soft_targets: hard is smoothed cross-entropy on x; soft is T^2 times the mean over the V
    columns of p (log p - log q), p = theta's distribution at x_init, both at temperature T. Means are over ALL masked
    tokens of the batch. z_psi: psi's logits at x_t where they are known already.
    """
    spec, tokens = step.spec, step.teacher.tokens
    if z_psi is None:
        z_psi = step.head(
            step.full(psi), x_t.ids, x_t.ratio, conditions, draws.scope("update"), role="auxiliary", scale=1,
            dropout=spec.dropout,
        )  # fmt: skip

    def token_terms(start, length):
        z, x = z_psi(start, length), jax.lax.dynamic_slice_in_dim(sample.x, start, length, axis=1)
        hard = token_nll(z, x, spec.label_smoothing)
        right = jnp.argmax(z, -1) == x
        if not spec.soft_targets:
            return hard, right, jnp.zeros_like(hard)
        z_theta = jax.lax.stop_gradient(step.teacher.net.head(step.full(theta), sample.h, start, length))
        log_p, log_q = (jax.nn.log_softmax(a.astype(jnp.float32) / spec.soft_temperature) for a in (z_theta, z))
        return hard, right, spec.soft_temperature**2 * jnp.mean(jnp.exp(log_p) * (log_p - log_q), -1)

    hard, right, soft = (
        masked_mean(a, x_t.masked) for a in over_positions(token_terms, tokens.length, spec.num_chunks)
    )
    loss = (1 - spec.soft_targets) * hard + spec.soft_targets * soft
    return loss, {"loss": loss, "hard_nll": hard, "accuracy": right}
