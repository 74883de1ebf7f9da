"""Every choice of the Di[M]O objective, checked once: the frozen dataclass that Algorithm 1 is read with."""

import dataclasses

from dimo_jax.corruption import FILLS, SCHEDULES
from dimo_jax.divergences import DIVERGENCES
from dimo_jax.errors import UserError
from dimo_jax.registry import lookup, make

SIGMA_SCHEDULES = ("fix", "linear", "cos", "exp")
CHOICES = {
    "sigma_schedule": SIGMA_SCHEDULES,
    "gradient_input": ("x_init", "x_t", "x_r_init"),
    "weight": ("none", "paper"),
    "token_reduction": ("sum", "mean_tokens", "mean_all"),
    "time_input": ("zero", "mask_ratio"),
    "nonfinite": ("stop", "skip"),
    "fill": tuple(FILLS),
    "mask_schedule": tuple(SCHEDULES),
    "auxiliary_mask_schedule": tuple(SCHEDULES),
}


@dataclasses.dataclass(frozen=True)
class DimoSpec:
    """The objective. Defaults are the released program's (configs/common.py states paper against released).

    x_init:      r_init (share of [M], or (a, b): drawn once an iteration from U[a, b]), fill, sigma_init and its
                 warm-up sigma_schedule over sigma_warmup_steps outer steps.
    sampling x:  temperature, top_k, top_p (on the generator's sample alone).
    x_t:         mask_schedule, auxiliary_mask_schedule, mask_ratio_bounds, exact_count, time_input (seen by networks).
    gradient:    divergence, gradient_input (where dz_theta/dtheta is taken), weight (w(t)), token_reduction,
                 loss_weight, teacher_cfg_scale, auxiliary_cfg_scale, adaptive_cfg, teacher_temperature,
                 auxiliary_temperature.
    auxiliary:   resample (fresh samples of the updated generator), soft_targets (share of the soft loss),
                 soft_temperature, label_smoothing, share_x_t (one x_t for both updates).
    rhythm:      num_auxiliary_updates in an outer step; generator_every, auxiliary_every: outer steps between updates.
    networks:    dropout (generator and auxiliary), teacher_dropout, frozen (regexes; frozen leaves are the teacher's),
                 ema_decay, ema_every (in generator updates), num_chunks of the vocabulary head, nonfinite.
    """

    r_init: float | tuple[float, float] = 0.6
    fill: str = "random_ids"
    sigma_init: float = 0.1
    sigma_schedule: str = "fix"
    sigma_warmup_steps: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.0
    mask_schedule: str = "arccos"
    auxiliary_mask_schedule: str = "arccos"
    mask_ratio_bounds: tuple[float, float] = (0.0, 1.0)
    exact_count: bool = True
    time_input: str = "zero"
    divergence: str | dict = "forward_kl"
    gradient_input: str = "x_init"
    weight: str = "none"
    token_reduction: str = "sum"
    loss_weight: float = 1.0
    teacher_cfg_scale: float = 2.0
    auxiliary_cfg_scale: float = 1.0
    adaptive_cfg: bool = False
    teacher_temperature: float = 1.0
    auxiliary_temperature: float = 1.0
    resample: bool = True
    soft_targets: float = 0.0
    soft_temperature: float = 1.0
    label_smoothing: float = 0.1
    share_x_t: bool = False
    num_auxiliary_updates: int = 1
    generator_every: int = 1
    auxiliary_every: int = 1
    dropout: bool = True
    teacher_dropout: bool = True
    frozen: tuple[str, ...] = ()
    ema_decay: float = 0.9999
    ema_every: int = 1
    num_chunks: int = 1
    nonfinite: str = "stop"

    def __post_init__(self):
        for field in ("r_init", "mask_ratio_bounds", "frozen"):
            if isinstance(getattr(self, field), list):
                object.__setattr__(self, field, tuple(getattr(self, field)))
        for field, known in CHOICES.items():
            lookup(dict.fromkeys(known), getattr(self, field), field)
        make(DIVERGENCES, self.divergence, "divergence")
        for field in ("num_auxiliary_updates", "generator_every", "auxiliary_every", "ema_every", "num_chunks"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} counts from 1, given {getattr(self, field)}")
        rhythm = (self.num_auxiliary_updates, self.generator_every, self.auxiliary_every)
        schedules = {self.mask_schedule, self.auxiliary_mask_schedule}
        if self.share_x_t and (
            self.resample or rhythm != (1, 1, 1) or self.auxiliary_cfg_scale != 1 or len(schedules) > 1
        ):
            raise UserError(
                "share_x_t updates generator and auxiliary on one x_t: it takes resample False, one update of each in "
                f"a step, auxiliary_cfg_scale 1 and one mask schedule; given resample {self.resample}, updates "
                f"{rhythm}, auxiliary_cfg_scale {self.auxiliary_cfg_scale}, schedules {', '.join(sorted(schedules))}"
            )
        for field in ("temperature", "teacher_temperature", "auxiliary_temperature", "soft_temperature"):
            if getattr(self, field) <= 0:
                raise UserError(f"{field} divides logits and must be positive, given {getattr(self, field)}")
