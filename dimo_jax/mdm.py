"""Masked cross-entropy (Eq. 3), and the step that pre-trains a teacher with it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from dimo_jax.corruption import SCHEDULES, bound_weight, corrupt, mask_ratio
from dimo_jax.errors import UserError
from dimo_jax.nets import logits
from dimo_jax.registry import lookup
from dimo_jax.rng import Draws
from dimo_jax.state import NetState, Optimizer, apply_gradients, ema_rate, ema_update, guarded, init_net

METRICS = ("loss", "nll", "bound", "accuracy", "grad_norm")


def token_nll(z: jax.Array, targets: jax.Array, label_smoothing: float = 0.0) -> jax.Array:
    """Cross-entropy [...] of logits z [..., V] and ids [...], smoothed uniformly over all V columns; >= float32."""
    log_p = jax.nn.log_softmax(z.astype(jnp.promote_types(z.dtype, jnp.float32)))
    hard = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return (1 - label_smoothing) * hard - label_smoothing * jnp.mean(log_p, -1) if label_smoothing else hard


def masked_mean(values: jax.Array, masked: jax.Array) -> jax.Array:
    """Mean of `values` over ALL masked positions of the batch; 0 when nothing is masked."""
    return jnp.sum(values * masked) / jnp.maximum(jnp.sum(masked), 1)


@dataclasses.dataclass(frozen=True)
class PretrainSpec:
    """How a teacher is pre-trained. The released MaskGIT: coin flips, loss on all tokens, label smoothing 0.1.

    loss_on: masked or all. weighting: none (mean over tokens), or bound: the 1/t-weighted sum whose expectation bounds
    -log p(x_0) per sample (masked tokens, independent masking, no smoothing). The bound is a metric in any case.
    """

    mask_schedule: str = "arccos"
    exact_count: bool = False
    loss_on: str = "masked"
    weighting: str = "none"
    label_smoothing: float = 0.0
    condition_dropout: float = 0.1
    dropout: bool = True
    ema_decay: float = 0.999
    nonfinite: str = "stop"

    def __post_init__(self):
        for value, kind, known in (
            (self.loss_on, "loss_on", ("masked", "all")),
            (self.weighting, "weighting", ("none", "bound")),
            (self.nonfinite, "nonfinite", ("stop", "skip")),
            (self.mask_schedule, "mask_schedule", SCHEDULES),
        ):
            lookup(dict.fromkeys(known), value, kind)
        if self.weighting == "bound" and (self.exact_count or self.loss_on == "all" or self.label_smoothing):
            raise UserError("weighting 'bound' takes exact_count False, loss_on 'masked' and label_smoothing 0")


class PretrainState(NamedTuple):
    """net: trainable state; ema: average of its parameters; metrics: of the latest update; counters of outer steps and
    skipped updates; finite: False from the first non-finite update on, unless such updates are skipped."""

    net: NetState
    ema: Any
    metrics: dict
    outer_step: jax.Array
    skipped: jax.Array
    finite: jax.Array


def init_pretrain(params: dict, optimizer: Optimizer) -> PretrainState:
    """The state before the first step, from a network's parameters."""
    zero = jnp.zeros((), jnp.int32)
    ema = jax.tree.map(jnp.copy, params)
    metrics = {name: jnp.zeros(()) for name in METRICS}
    return PretrainState(init_net(optimizer, params), ema, metrics, zero, jnp.copy(zero), jnp.ones((), bool))


def masked_losses(net, params, tokens, x, cond, spec: PretrainSpec, draws: Draws, *, conditions=None, dropout_rng=None):
    """Cross-entropies of one corrupted batch -> dict of scalars: loss (of `spec`), nll, accuracy, bound.

    nll: mean over masked tokens, nats a token; bound: weighted sum, nats a sample; an upper bound of -log p(x_0) in
    expectation (independent masking).
    """
    ratio = mask_ratio(draws, len(x), spec.mask_schedule)
    maskable = None if conditions is None else conditions.maskable
    x_t, masked = corrupt(draws, x, ratio, tokens.mask_token, exact_count=spec.exact_count, maskable=maskable)
    attn_mask = None if conditions is None else conditions.attn_mask
    z = logits(net, params, x_t, cond, ratio, dropout_rng=dropout_rng, attn_mask=attn_mask)
    nll = token_nll(z, x)
    smooth = token_nll(z, x, spec.label_smoothing) if spec.label_smoothing else nll
    weight = bound_weight(draws.uniform("ratio", (len(x),)), spec.mask_schedule)
    bound = jnp.mean(weight * jnp.sum(nll * masked, -1))
    if spec.weighting == "bound":
        loss = bound / tokens.length
    else:
        everywhere = jnp.ones_like(masked) if maskable is None else maskable
        loss = masked_mean(smooth, masked if spec.loss_on == "masked" else everywhere)
    accuracy = masked_mean(jnp.argmax(z, -1) == x, masked)
    return {"loss": loss, "nll": masked_mean(nll, masked), "bound": bound, "accuracy": accuracy}


def pretrain_step(state: PretrainState, params: dict, batch: dict, draws: Draws, *, teacher, spec, optimizer):
    """One step of masked cross-entropy on batch {ids [B, L], conditions}. -> (state, metrics).

    The condition is replaced by the null condition with probability spec.condition_dropout.
    """
    draws = draws.at_step(state.outer_step)
    x, conditions = batch["ids"], batch["conditions"]
    cond = teacher.encode(params, conditions.raw)
    drop = draws.uniform("condition_dropout", (len(x),)) < spec.condition_dropout
    null = teacher.null(params, cond, "auxiliary")
    cond = jax.tree.map(lambda c, u: jnp.where(drop.reshape(-1, *[1] * (c.ndim - 1)), u, c), cond, null)
    dropout_rng = draws.named_key("dropout") if spec.dropout else None

    def loss_fn(net_params):
        metrics = masked_losses(
            teacher.net,
            net_params,
            teacher.tokens,
            x,
            cond,
            spec,
            draws,
            conditions=conditions,
            dropout_rng=dropout_rng,
        )
        return metrics["loss"], metrics

    (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.net.params)
    metrics["grad_norm"] = optax.global_norm(grads)
    net = apply_gradients(optimizer, state.net, grads, state.outer_step)
    ok = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
    skipped = state.skipped
    if spec.nonfinite == "skip":
        net, metrics = guarded(ok, (net, metrics), (state.net, state.metrics))
        skipped, ok = skipped + ~ok, jnp.ones((), bool)
    ema = ema_update(state.ema, net.params, ema_rate(spec.ema_decay, state.outer_step))
    state = PretrainState(net, ema, metrics, state.outer_step + 1, skipped, state.finite & ok)
    return state, {**metrics, "skipped": skipped}
