"""What the experiments share: paper against released code, decided once.

The numbers in brackets count the differences between the paper (arXiv 2503.15457) and the program its authors released
(yuanzhi-zhu/DiMO at 2461374, train_DIMO_MaskGit.py); the README's table translates that program's options. Each
difference is a key: `released` reproduces the program, `paper` the text.
"""

from ml_collections import ConfigDict


def released_spec() -> dict:
    """The objective of the released MaskGIT program as shipped: forward KL, CFG 2, r_init .6, sigma .1."""
    return {
        "r_init": 0.6,
        "fill": "random_ids",
        "sigma_init": 0.1,
        "sigma_schedule": "fix",
        "sigma_warmup_steps": 0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 0.0,
        "mask_schedule": "arccos",
        "auxiliary_mask_schedule": "arccos",
        "mask_ratio_bounds": (0.0, 1.0),
        "exact_count": True,  # [2] round(L r) tokens, half to even, at least one
        "time_input": "zero",  # [7] what Meissonic sees; MaskGIT has no time input
        "divergence": {"name": "jeffreys", "beta": 0.0},  # shipped as `Jeffreys_0.`, which is forward KL
        "gradient_input": "x_init",
        "weight": "none",  # [4] w(t) = 1
        "token_reduction": "sum",  # [3, 16] sum over masked tokens / B
        "loss_weight": 1.0,  # [14] scales what is differentiated
        "teacher_cfg_scale": 2.0,
        "auxiliary_cfg_scale": 1.0,
        "adaptive_cfg": False,
        "teacher_temperature": 1.0,  # [15] divides the logits before g, and g carries no 1/T
        "auxiliary_temperature": 1.0,
        "resample": True,  # [1] fresh x_init, conditions and samples of the updated generator
        "soft_targets": 0.0,
        "soft_temperature": 1.0,
        "label_smoothing": 0.1,  # [5] over all V columns
        "share_x_t": False,
        "num_auxiliary_updates": 1,
        "generator_every": 1,
        "auxiliary_every": 1,
        "dropout": True,
        "teacher_dropout": True,  # [6] the teacher's .eval() is commented out
        "frozen": ("^tok_emb$", "^pos_emb$", "^bias$"),
        "ema_decay": 0.9999,
        "ema_every": 1,
        "num_chunks": 1,
        "nonfinite": "stop",  # [11] the program zeroes non-finite values in four places; never here
    }


def paper_spec() -> dict:
    """The objective as the paper writes it, with its best divergence: Jeffreys beta -0.2 (ablation, 30k iterations)."""
    return {
        **released_spec(),
        "exact_count": False,  # [2] independent masking, Eq. 1
        "time_input": "mask_ratio",  # [7]
        "divergence": {"name": "jeffreys", "beta": -0.2},
        "weight": "paper",  # [4] 1 / mean absolute difference
        "token_reduction": "mean_tokens",  # [3] 1 / L_M
        "resample": False,  # [1] the same x_theta
        "label_smoothing": 0.0,  # [5]
        "teacher_dropout": False,  # [6]
        "dropout": False,
    }


def released_optimizer(*, clip: float) -> dict:
    """Adam as released: (0.9, 0.999), warm-up over 100 steps from exactly 0; eps 1e-6 in 16-bit [10].

    clip: 1 for the generator, 0 (off) for the auxiliary [9].
    """
    return {
        "name": "adam",
        "learning_rate": 1e-5,
        "schedule": "constant_with_warmup",
        "warmup_steps": 100,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-6,
        "weight_decay": 0.0,
        "clip": clip,
    }


def paper_optimizer() -> dict:
    """Adam clipped at norm 1 for both networks [9], epsilon 1e-8 [10]."""
    return {**released_optimizer(clip=1.0), "eps": 1e-8}


def base_config() -> ConfigDict:
    """Keys that every experiment has with the same value unless it says otherwise."""
    config = ConfigDict()
    config.seed = 1
    config.mesh = ConfigDict({"data": -1})
    config.sharding = ConfigDict({"embed": "fsdp", "hidden": "tensor", "vocab": "tensor"})
    config.logging = ConfigDict({"log_every": 50, "sample_every": 0, "profile_start": -1, "profile_steps": 5})
    return config
