"""The recorded MaskGIT transformer: its arrays, our network of the same shape, and its weights in our tree."""

import json
from pathlib import Path

import jax
import numpy as np

from dimo_jax.models import maskgit

# Options of jit: compile in a third of the time, for programs that run once or twice.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def load() -> dict:
    """All recorded arrays by their keys: state_dict/..., in/..., out/..., meta."""
    with np.load(Path(__file__).parent / "goldens" / "maskgit_transformer.npz") as file:
        return dict(file)


def spec_of(recorded: dict, **changes) -> maskgit.MaskGITSpec:
    """The recorded architecture (256-pixel pictures have a 16x16 grid: 16 pixels a token)."""
    a = json.loads(str(recorded["meta"]))["args"]
    fields = {
        "codebook_size": a["codebook_size"], "grid": (a["img_size"] // 16,) * 2, "num_classes": a["nclass"],
        "width": a["hidden_dim"], "depth": a["depth"], "heads": a["heads"], "mlp_dim": a["mlp_dim"],
        "dropout": a["dropout"], "num_logits": a["codebook_size"] + 1,
    }  # fmt: skip
    return maskgit.MaskGITSpec(**{**fields, **changes})


def to_tree(recorded: dict, prefix: str) -> dict:
    """Arrays under `prefix` + torch key, as the nested dict of models/maskgit.py; every one of them is used."""
    torch = {key.removeprefix(prefix): a for key, a in recorded.items() if key.startswith(prefix)}

    def linear(name, separator="."):
        return {"kernel": torch.pop(f"{name}{separator}weight").T, "bias": torch.pop(f"{name}{separator}bias")}

    def norm(name):
        return {"scale": torch.pop(f"{name}.weight"), "bias": torch.pop(f"{name}.bias")}

    def block(name):
        attention = {"qkv": linear(f"{name}.0.fn.mha.in_proj", "_"), "out": linear(f"{name}.0.fn.mha.out_proj")}
        mlp = {"fc1": linear(f"{name}.1.fn.net.0"), "fc2": linear(f"{name}.1.fn.net.3")}
        return {"norm1": norm(f"{name}.0.norm"), "attention": attention, "norm2": norm(f"{name}.1.norm"), "mlp": mlp}

    first, last = "first_layer", "last_layer"
    blocks = [block(f"transformer.layers.{i}") for i in range(spec_of(recorded).depth)]
    tree = {
        "tok_emb": torch.pop("tok_emb.weight"),
        "pos_emb": torch.pop("pos_emb")[0],
        "bias": torch.pop("bias"),
        "first": {
            "norm1": norm(f"{first}.0"), "fc1": linear(f"{first}.2"),
            "norm2": norm(f"{first}.4"), "fc2": linear(f"{first}.6"),
        },
        "blocks": jax.tree.map(lambda *layers: np.stack(layers), *blocks),
        "last": {"norm1": norm(f"{last}.0"), "fc": linear(f"{last}.2"), "norm2": norm(f"{last}.4")},
    }  # fmt: skip
    assert not torch, f"unused: {sorted(torch)}"
    return tree
