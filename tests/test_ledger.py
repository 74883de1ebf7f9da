"""The ledger of choices: every config key, flipped alone, changes the updated weights; stating a default changes none.

The steps run op by op, so that what one spec has compiled serves the next.
"""

import dataclasses
import functools
import json

import jax
import pytest
from steps import ACTS, OPTIM, changed, distilled, pretrained, weights

from configs import common
from dimo_jax.corruption import FILLS, SCHEDULES
from dimo_jax.divergences import DIVERGENCES
from dimo_jax.errors import UserError
from dimo_jax.mdm import PretrainSpec
from dimo_jax.optim import LR_SCHEDULES, OptimSpec
from dimo_jax.registry import build
from dimo_jax.spec import CHOICES, SIGMA_SCHEDULES, DimoSpec

pytestmark = pytest.mark.usefixtures("little_optimization")
ALL, GENERATOR = {"generator", "auxiliary", "ema"}, {"generator", "ema"}
AUXILIARY, EMA, NOTHING = {"auxiliary"}, {"ema"}, set()


def run(spec: DimoSpec, **kwargs) -> list[dict]:
    return [weights(state) for state in distilled(spec, **kwargs)]


@functools.cache
def base(**fields) -> list[dict]:
    """The weights after each step of a spec of hashable fields: what a flip is compared with."""
    return run(DimoSpec(**fields))


@dataclasses.dataclass(frozen=True)
class Flip:
    """A field's value, the networks that change in the `first` step and at least by the `last`, and the fields that it
    needs `on` to act. What changes the generator reaches the auxiliary model through its samples, soon or late."""

    value: object
    first: set
    last: set
    on: dict


def flips(*values, first=ALL, last=ALL, **on) -> list[Flip]:
    return [Flip(value, first, last, on) for value in values]


def others(known, default) -> list:
    return [value for value in known if value != default]


DIVERGENCE_ARGUMENTS = {"jeffreys": {"beta": -0.2}, "alpha": {"alpha": 0.5}}
# What acts through the generator's loss alone; with fresh samples it would reach the auxiliary model at once.
ITS_LOSS = {"first": GENERATOR, "last": GENERATOR, "resample": False}
DIMO_FLIPS = {
    "r_init": flips(0.3, (0.2, 0.9)),
    "fill": flips(*others(FILLS, "random_ids")),
    "sigma_init": flips(0.5),
    "sigma_schedule": flips(*others(SIGMA_SCHEDULES, "fix")),
    "sigma_warmup_steps": [
        flip for name in others(SIGMA_SCHEDULES, "fix") for flip in flips(4, first=NOTHING, sigma_schedule=name)
    ],
    "temperature": flips(3.0),
    "top_k": flips(1),
    "top_p": flips(0.5),
    "mask_schedule": flips(*others(SCHEDULES, "arccos"), **ITS_LOSS),
    "auxiliary_mask_schedule": flips(*others(SCHEDULES, "arccos"), first=AUXILIARY),
    "mask_ratio_bounds": flips((0.0, 0.4), (0.6, 1.0)),
    "exact_count": flips(False),
    "time_input": flips("mask_ratio"),
    "divergence": flips(
        *({"name": name, **DIVERGENCE_ARGUMENTS.get(name, {})} for name in others(DIVERGENCES, "forward_kl")),
        **ITS_LOSS,
    ),
    "gradient_input": flips("x_t", "x_r_init", **ITS_LOSS),
    "weight": flips("paper", **ITS_LOSS),
    "token_reduction": flips("mean_tokens", "mean_all", **ITS_LOSS),
    "loss_weight": flips(2.0, **ITS_LOSS),
    "teacher_cfg_scale": flips(1.0, 3.0, **ITS_LOSS),
    "auxiliary_cfg_scale": flips(2.0, **ITS_LOSS),
    "adaptive_cfg": flips(True, **ITS_LOSS),
    "teacher_temperature": flips(2.0, **ITS_LOSS),
    "auxiliary_temperature": flips(2.0, **ITS_LOSS),
    "teacher_dropout": flips(False, **ITS_LOSS),
    "resample": flips(False, first=AUXILIARY),
    "soft_targets": flips(0.5, first=AUXILIARY),
    "soft_temperature": flips(2.0, first=AUXILIARY, soft_targets=0.5),
    "label_smoothing": flips(0.0, first=AUXILIARY),
    "share_x_t": flips(True, first=AUXILIARY, resample=False),
    "num_auxiliary_updates": flips(2, first=AUXILIARY),
    "generator_every": flips(2, first=NOTHING),
    "auxiliary_every": flips(2, first=NOTHING, last=AUXILIARY),
    "dropout": flips(False),
    "frozen": flips(("^cond$",)),
    "ema_decay": flips(0.05, first=EMA, last=EMA),
    "ema_every": flips(2, first=NOTHING, last=EMA),
    "num_chunks": [],  # changes nothing: test_chunks_change_nothing
    "nonfinite": [],  # changes nothing while all is finite: test_skip_leaves_a_network_as_it_was_and_counts
}
CASES = [pytest.param(name, flip, id=f"{name}={flip.value}") for name, row in DIMO_FLIPS.items() for flip in row]


def test_every_field_and_choice_is_in_the_table():
    assert set(DIMO_FLIPS) == {field.name for field in dataclasses.fields(DimoSpec)}
    assert set(OPTIM_FLIPS) == {field.name for field in dataclasses.fields(OptimSpec)}
    assert set(PRETRAIN_FLIPS) == {field.name for field in dataclasses.fields(PretrainSpec)}
    for field, known in CHOICES.items():
        if field != "nonfinite":
            assert {flip.value for flip in DIMO_FLIPS[field]} == set(known) - {getattr(DimoSpec(), field)}


@pytest.mark.parametrize("field, flip", CASES)
def test_a_flip_changes_what_it_should_and_no_more(field, flip):
    found, default = run(DimoSpec(**{field: flip.value}, **flip.on)), base(**flip.on)
    assert changed(found[0], default[0], by=ACTS) == flip.first
    last = changed(found[-1], default[-1], by=ACTS)
    assert flip.last <= last and ("generator" in flip.last or last == flip.last)


def test_stating_the_defaults_changes_no_bit():
    stated = json.loads(json.dumps(dataclasses.asdict(DimoSpec())))
    spec = build(DimoSpec, stated, "spec")
    assert spec == DimoSpec()
    assert changed(run(spec)[-1], base()[-1]) == NOTHING
    released = DimoSpec(**{**common.released_spec(), "frozen": ()})  # jeffreys with beta 0 for forward_kl
    assert changed(run(released)[-1], base()[-1]) == NOTHING


@pytest.mark.parametrize(
    "fields",
    [{"divergence": {"name": "jeffreys", "beta": 0.0}}, {"r_init": (0.6, 0.6)}, {"top_k": 3}, {"nonfinite": "skip"}],
    ids=str,
)
def test_another_way_of_saying_the_default(fields):
    assert changed(run(DimoSpec(**fields))[-1], base()[-1]) == NOTHING


def test_chunks_change_nothing():
    assert changed(run(DimoSpec(num_chunks=3, weight="paper"))[-1], base(weight="paper")[-1], by=ACTS) == NOTHING


def test_a_logit_column_for_the_mask_token_acts():
    assert changed(run(DimoSpec(), num_logits=4)[0], base()[0], by=ACTS) == ALL


# Optimisers.

OPTIM_FLIPS = {
    "name": [],  # adamw is adam until it decays: test_only_adamw_decays
    "learning_rate": flips(0.2),
    "schedule": flips(*others(LR_SCHEDULES, OPTIM.schedule)),
    "warmup_steps": flips(3, schedule="constant_with_warmup"),
    "beta1": flips(0.5),
    "beta2": flips(0.9),
    "eps": flips(1e-1),
    "weight_decay": flips(0.1, name="adamw"),
    "clip": flips(1e-3),
}


@pytest.mark.parametrize("network", ["generator", "auxiliary"])
@pytest.mark.parametrize(
    "field, flip",
    [pytest.param(name, flip, id=f"{name}={flip.value}") for name in OPTIM_FLIPS for flip in OPTIM_FLIPS[name]],
)
def test_a_flip_of_an_optimizer_changes_its_network(network, field, flip):
    on = dataclasses.replace(OPTIM, **flip.on)
    default = run(DimoSpec(), **{network: on}) if flip.on else base()
    found = run(DimoSpec(), **{network: dataclasses.replace(on, **{field: flip.value})})
    assert network in changed(found[-1], default[-1], by=ACTS)
    assert changed(found[0], default[0]) <= (AUXILIARY if network == "auxiliary" else ALL)


def test_only_adamw_decays():
    adamw = dataclasses.replace(OPTIM, name="adamw")
    assert changed(run(DimoSpec(), generator=adamw, auxiliary=adamw)[-1], base()[-1]) == NOTHING
    with pytest.raises(UserError, match="adam takes no weight decay, given 0.1: use adamw"):
        dataclasses.replace(OPTIM, weight_decay=0.1)


# Pre-training.

BOTH = {"net", "ema"}
PRETRAIN_FLIPS = {
    "mask_schedule": flips(*others(SCHEDULES, "arccos"), first=BOTH, last=BOTH),
    "exact_count": flips(True, first=BOTH, last=BOTH),
    "loss_on": flips("all", first=BOTH, last=BOTH),
    "weighting": flips("bound", first=BOTH, last=BOTH),
    "label_smoothing": flips(0.1, first=BOTH, last=BOTH),
    "condition_dropout": flips(0.9, first=BOTH, last=BOTH),
    "dropout": flips(False, first=BOTH, last=BOTH),
    "ema_decay": flips(0.05, first=EMA, last=EMA),
    "nonfinite": flips("skip", first=NOTHING, last=NOTHING),  # all is finite: test_pretraining_skips_...
}


def pretrained_weights(spec: PretrainSpec) -> list[dict]:
    return [{"net": jax.device_get(s.net.params), "ema": jax.device_get(s.ema)} for s, _ in pretrained(spec)]


@pytest.mark.parametrize(
    "field, flip", [pytest.param(f, flip, id=f"{f}={flip.value}") for f in PRETRAIN_FLIPS for flip in PRETRAIN_FLIPS[f]]
)
def test_a_flip_of_pretraining_changes_what_it_should(field, flip):
    found, default = pretrained_weights(PretrainSpec(**{field: flip.value})), pretrained_weights(PretrainSpec())
    assert changed(found[0], default[0], by=ACTS) == flip.first
    assert changed(found[-1], default[-1], by=ACTS) == flip.last
