"""The stage `evaluate`: draw samples row by row, features once, all metrics, and the report with its pictures."""

import functools
import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics

from dimo_jax import data, mdm
from dimo_jax.checkpoint import load_params
from dimo_jax.corruption import hybrid_init
from dimo_jax.evaluation import controls, digit_cnn, features_of, plots, score
from dimo_jax.evaluation.report import write_report
from dimo_jax.files import atomic_write
from dimo_jax.nets import logits
from dimo_jax.registry import make
from dimo_jax.rng import Draws
from dimo_jax.run_config import Evaluate, RunConfig
from dimo_jax.sample import make_sampling
from dimo_jax.teachers import TEACHERS, load_teacher

SUPPORT_THRESHOLD = 1e-3  # paper, Fig. 9
SHOWN = 50  # pictures of a row in the report


def evaluate(config: RunConfig, workdir: Path, folder: Path) -> None:
    """Score the teacher and the one-step generator against all real digits; `workdir/report/index.html`."""
    start = time.perf_counter()
    stage, teacher = config.evaluate, make(TEACHERS, config.teacher, "teacher")
    params, _ = load_teacher(config.teacher, config.distill.teacher or workdir / "pretrain" / "weights")
    generator, _ = load_params(workdir / "distill" / "weights")
    nets = {"teacher": params["net"], "generator": generator["net"]}
    draws = Draws(jax.random.key(config.seed)).scope("evaluate")
    model = Model(teacher, params, nets, draws, np.asarray(teacher.gallery(stage.num_samples)))
    splits = {
        name: data.load_all(source) for name, source in data.prepare(config.data["name"], workdir / "data").items()
    }
    train, test = ((model.images(splits[name]["ids"]), splits[name]["label"]) for name in ("train", "test"))
    scorer = digit_cnn.train(*train, *test, seed=config.seed, num_steps=stage.cnn_steps)

    rows, samples = sample_rows(stage, model)
    longest = max((row for row in rows if row["kind"] == "teacher"), key=lambda row: row["evaluations"])["name"]
    count = {"num_samples": stage.num_samples}
    for name, *images in controls.rows(*train, *test, samples[longest], model.labels, config.seed, **count):
        samples[name] = images[0]
        rows.append(
            {"name": name, "kind": "control", "evaluations": None, "seconds_per_1000": None, "label": images[1]}
        )
    reference = features_of(*(np.concatenate(parts) for parts in zip(train, test, strict=True)), scorer.features)
    for row in rows:
        images = samples[row["name"]]
        row["num_samples"] = len(images)
        row["metrics"] = score(features_of(images, row.pop("label", model.labels), scorer.features), reference)

    one_step = next(row["sampler"] for row in stage.rows if row["net"] == "generator")
    samplers = {"teacher": stage.inpaint_teacher, "generator": one_step}
    support = {name: support_histogram(model, name, one_step["r_init"]) for name in nets}
    teacher_nll = heldout(model, splits["test"], stage.heldout_passes)
    pictures = comparisons(model, samplers, splits["test"])
    shown = {"real": pictures.pop("real"), **{name: images[:SHOWN] for name, images in samples.items()}}
    curves = {name: read_metrics(workdir / name / "metrics.jsonl") for name in ("pretrain", "distill")}
    results = {
        "config": json.loads((workdir / "config.json").read_text()),
        "seed": config.seed,
        "machine": machine(),
        "stages": {**stage_seconds(workdir), "evaluate": time.perf_counter() - start},
        "cnn": scorer.accuracies,
        "teacher": teacher_nll,
        "rows": rows,
        "support": support,
    }
    write_report(workdir / "report", results, {**shown, **pictures}, curves)
    names = ["real", *(row["name"] for row in stage.rows)]
    panels = {name: shown[name] for name in names[:3] + names[3:][-2:]}
    atomic_write(workdir / "report" / "overview.png", plots.overview(panels))


class Model(NamedTuple):
    """The two nets of a run, the teacher's functions, and what they sample with."""

    teacher: Any
    params: dict
    nets: dict
    draws: Draws
    labels: np.ndarray

    def sample(self, net: str, sampler: Mapping[str, Any], name: str, labels: np.ndarray, given=None, repeats: int = 0):
        """(ids [N, L] for labels [N], median seconds of `repeats` runs after the one that compiles)."""
        sampling, key = make_sampling(self.teacher, sampler), self.draws.named_key(name)
        ids = jax.block_until_ready(sampling(self.params, self.nets[net], labels, key, given))
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(sampling(self.params, self.nets[net], labels, key, given))
            seconds.append(time.perf_counter() - start)
        return np.asarray(ids), float(np.median(seconds)) if repeats else None

    def images(self, ids) -> np.ndarray:
        """Ids [N, L] -> images [N, H, W, C] in [-1, 1]."""
        return np.asarray(self.teacher.decode(self.params, jnp.asarray(ids)))


def sample_rows(stage: Evaluate, model: Model) -> tuple[list[dict], dict[str, np.ndarray]]:
    """The rows of the config, sampled and timed: (rows without metrics, their images by name)."""
    rows, samples = [], {}
    for row in stage.rows:
        ids, seconds = model.sample(row["net"], row["sampler"], "samples", model.labels, repeats=stage.repeats)
        samples[row["name"]] = model.images(ids)
        evaluations, per_1000 = row["sampler"].get("num_steps", 1), seconds * 1000 / len(ids)
        rows.append({"name": row["name"], "kind": row["net"], "evaluations": evaluations, "seconds_per_1000": per_1000})
    return rows, samples


def comparisons(model: Model, samplers: dict, held_out: dict) -> dict[str, np.ndarray]:
    """Pictures for the eye, ten columns, one a class: real; sampled against top-1 (paper, Fig. 12); inpainting.

    Inpainting keeps the upper half of held-out pictures and fills in the lower half.
    """
    tokens, columns = model.teacher.tokens, np.asarray(model.teacher.gallery(SHOWN))
    chosen = [np.flatnonzero(held_out["label"] == label)[n // 10] for n, label in enumerate(columns)]
    pictures, labels, ids = {"real": model.images(held_out["ids"][chosen])}, columns[:20], held_out["ids"][chosen[:20]]
    lower = np.arange(tokens.length) >= tokens.length // 2
    given = jnp.asarray(np.where(lower, tokens.mask_token, ids))
    pictures["inpainting/real"] = model.images(ids)
    pictures["inpainting/given"] = np.where(lower.reshape(pictures["real"].shape[1:]), np.nan, model.images(ids))
    for net, sampler in samplers.items():
        for name, choice in (("sampled", sampler), ("top-1", {**sampler, "temperature": 0.0})):
            pictures[f"{name}/{net}"] = model.images(model.sample(net, choice, "pictures", labels)[0])
        pictures[f"inpainting/{net}"] = model.images(model.sample(net, sampler, "inpainting", labels, given)[0])
    return pictures


def heldout(model: Model, split: dict, num_passes: int) -> dict[str, float]:
    """The teacher's masked cross-entropy on the held-out split, and its bound of -log p.

    -> {held_out_nll: nats a masked token at arccos mask ratios, held_out_bound: nats a sample, 1/t-weighted, linear
    ratios}; independent masking, the means of `num_passes` mask draws a picture.
    """
    ids, labels = jnp.asarray(split["ids"]), jnp.asarray(split["label"])
    specs = {"nll": mdm.PretrainSpec(mask_schedule="arccos"), "bound": mdm.PretrainSpec(mask_schedule="linear")}

    @jax.jit
    def one_pass(params, number):
        cond = model.teacher.encode(params, labels)
        draws = model.draws.scope("heldout", number)
        inputs = (model.teacher.net, params["net"], model.teacher.tokens, ids, cond)
        losses = {name: mdm.masked_losses(*inputs, spec, draws.scope(name))[name] for name, spec in specs.items()}
        return jax.tree.map(metrics.Average.from_model_output, losses)

    passes = [one_pass(model.params, number) for number in range(num_passes)]
    return {f"held_out_{name}": float(functools.reduce(_merge, (p[name] for p in passes)).compute()) for name in specs}


def _merge(average, other):
    return average.merge(other)


def support_histogram(model: Model, net: str, r_init: float) -> list[int]:
    """How many [M] tokens of x_init have k outputs with probability > 0.001, k = 0 .. V (paper, Fig. 9)."""
    tokens, labels = model.teacher.tokens, model.labels
    x_init, is_mask = hybrid_init(model.draws.scope("support"), tokens, len(labels), r_init)
    cond = model.teacher.encode(model.params, labels)
    z = logits(model.teacher.net, model.nets[net], x_init, cond, jnp.full(len(labels), r_init))
    count = np.asarray((jax.nn.softmax(z) > SUPPORT_THRESHOLD).sum(-1))[np.asarray(is_mask)]
    return np.bincount(count, minlength=tokens.num_logits + 1).tolist()


def machine() -> str:
    """The machine, in words."""
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    return f"{platform.machine()}, {os.cpu_count()} cores, {devices}, jax {jax.__version__}"


def read_metrics(path: Path) -> list[dict]:
    """The rows of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def stage_seconds(workdir: Path) -> dict[str, float]:
    """Seconds of the finished stages."""
    return {path.parent.name: json.loads(path.read_text())["seconds"] for path in sorted(workdir.glob("*/done.json"))}
