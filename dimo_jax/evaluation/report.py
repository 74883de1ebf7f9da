"""The report of a run: `index.html`, one page with everything in it, and `results.json`, the numbers behind it.

The results of a run:

  {"config": {...}, "seed": int, "machine": str, "stages": {name: seconds},
   "cnn": {"held_out_accuracy", "held_out_joint_accuracy"}, "teacher": {"held_out_nll"},
   "rows": [{"name", "kind": "control" | "teacher" | "generator", "evaluations": int or None, "num_samples": int,
             "metrics": {column: value}, "seconds_per_1000": float or None}],
   "support": {"teacher": [counts], "generator": [counts]}}

`support[net][k]` counts the tokens for which k outputs have a probability above 0.001. `write_report` adds "claims" and
"aims" (see claims.py).
"""

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from dimo_jax.errors import UserError
from dimo_jax.evaluation import plots
from dimo_jax.evaluation.claims import check_aims, check_claims
from dimo_jax.evaluation.columns import COLUMNS, number
from dimo_jax.files import atomic_write

_GALLERIES = (  # heading, groups of pictures, caption
    (
        "Samples",
        ("",),
        "Ten columns, one a class (the real controls come as the data lie). Nothing was picked: these are the first "
        "samples of each row of the table.",
    ),
    (
        "Sampled and top-1",
        ("sampled", "top-1"),
        "The same networks drawing from their distributions (sampled) and taking the likeliest token everywhere "
        "(top-1). A generator that had collapsed to one picture a class would show no difference (paper, Fig. 12).",
    ),
    (
        "Inpainting",
        ("inpainting",),
        "Held-out digits with a part masked (orange), and that part filled in by the teacher and by the one-step "
        "generator; the tokens that were given are kept.",
    ),
)
_STYLE = """
body { max-width: 1120px; margin: 2rem auto; padding: 0 1rem; color: #1c2328; background: #fff;
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; margin-bottom: .3rem; } h2 { font-size: 1.25rem; margin: 2.2rem 0 .5rem; }
p, figcaption, summary { color: #48535c; } p { max-width: 80ch; }
table { border-collapse: collapse; width: 100%; font-size: .84rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .5rem; text-align: right; border-bottom: 1px solid #e4e7ea; white-space: nowrap; }
th { vertical-align: bottom; white-space: normal; } th:first-child, td:first-child { text-align: left; }
tr.control { color: #5f6b76; background: #f6f7f8; } tr.generator { font-weight: 600; background: #fdf1e8; }
.tag { font-size: .72rem; border: 1px solid #aab3ba; border-radius: 3px; padding: 0 .3rem; margin-left: .4rem; }
.pass { color: #00603f; font-weight: 600; } .fail { color: #a33000; font-weight: 600; }
.gallery { display: grid; grid-template-columns: repeat(4, 260px); gap: 1.2rem 26px; }
figure { margin: 0; } figure img { display: block; }
.plot img { width: 100%; } .gallery img { image-rendering: pixelated; }
figcaption { font-size: .9rem; } .gallery figcaption { font-weight: 600; }
pre { background: #f6f7f8; padding: .8rem; overflow-x: auto; font-size: .8rem; }
"""


def write_report(
    folder: str | Path,
    results: Mapping[str, Any],
    images: Mapping[str, np.ndarray],
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """Writes `index.html` and `results.json` into the folder, each whole or not at all.

    Args:
      folder: made if it does not exist.
      results: see the top of this file.
      images: name -> [N, H, W, C] float in [-1, 1], image i of class i modulo 10, NaN where masked. A name is that of a
        row ("real", "teacher, 4 steps", ...), or group/name with the groups sampled, top-1 and inpainting.
      curves: stage -> the lines of its metrics.jsonl.

    Returns:
      The results with their claims and aims.

    Raises:
      UserError: a picture of an unknown group.
    """
    known = [group for _, groups, _ in _GALLERIES for group in groups]
    unknown = [name for name in images if name.rpartition("/")[0] not in known]
    if unknown:
        raise UserError(f"pictures {', '.join(unknown)} belong to no group: known are {', '.join(filter(None, known))}")
    results = {**results, "claims": check_claims(results), "aims": check_aims(results)}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    atomic_write(folder / "index.html", _page(results, images, curves))
    return results


def _page(results, images, curves) -> str:
    sections = [
        _header(results),
        _metrics_table(results),
        _statements(results),
        *(_gallery(heading, groups, caption, images) for heading, groups, caption in _GALLERIES),
        _plots(results, curves),
        f"<details><summary>Config</summary><pre>{escape(json.dumps(results['config'], indent=2))}</pre></details>",
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f"<title>dimo_jax report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(sections)
        + "\n</body>\n</html>\n"
    )


def _header(results) -> str:
    total = sum(results["stages"].values())
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in results["stages"].items())
    return (
        "<h1>A masked diffusion teacher and its one-step generator</h1>\n"
        f"<p>Seed {results['seed']}. Machine: {escape(results['machine'])}.<br>"
        f"Stages: {escape(stages)}; together {total:.0f} s.<br>"
        f"Teacher's held-out masked NLL: {number(results['teacher']['held_out_nll'])} nats per token.</p>"
    )


def _metrics_table(results) -> str:
    titles = [column.heading for column in COLUMNS.values()]
    heading = ["row", "evaluations (NFE)", "n", *titles, "seconds per 1,000 samples ↓"]
    body = []
    for row in results["rows"]:
        tag = '<span class="tag">control</span>' if row["kind"] == "control" else ""
        metrics = [number(row["metrics"][metric]) for metric in COLUMNS]
        counts = [number(row["evaluations"]), number(row["num_samples"])]
        cells = [f"{escape(row['name'])}{tag}", *counts, *metrics, number(row["seconds_per_1000"])]
        body.append(_row("td", cells, row["kind"]))
    return (
        "<h2>How good the samples are</h2>\n<p>Every metric is against all real digits. The control rows show what the "
        "metrics say of real digits, of noise with the right pixels, and of copies. FD is the Frechet distance, of "
        "pixels in [0, 1] or of the scoring CNN's features, whose scale is that CNN's own.</p>\n"
        f"<table>\n<thead>{_row('th', heading)}</thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>\n</table>\n"
        f"<p>{_cnn_line(results)}</p>"
    )


def _statements(results) -> str:
    def table(statements, words):
        rows = []
        for item in statements:
            name, word = ("pass", words[0]) if item["passed"] else ("fail", words[1])
            verdict = f'<span class="{name}">{word}</span>'
            rows.append(_row("td", [escape(item["text"]), number(item["value"]), number(item["bound"]), verdict]))
        heading = _row("th", ["statement", "value", "bound", "verdict"])
        return f"<table>\n<thead>{heading}</thead>\n<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>"

    return (
        f"<h2>What the run claims</h2>\n{table(results['claims'], ('✓ holds', '✗ fails'))}\n"
        f"<p>{_cnn_line(results)}</p>\n"
        "<h2>The further aim: the teacher's 16 steps, in one</h2>\n"
        f"{table(results['aims'], ('✓ reached', '✗ not reached'))}\n<p>{_cnn_line(results)}</p>"
    )


def _cnn_line(results) -> str:
    cnn = results["cnn"]
    return (
        f"Scoring CNN, held out: {cnn['held_out_accuracy']:.3f} of the digits right, "
        f"{cnn['held_out_joint_accuracy']:.3f} of the 20 classes {{digit}} × {{real, shuffled}}."
    )


def _gallery(heading, groups, caption, images) -> str:
    figures = []
    for key, batch in images.items():
        group, _, name = key.rpartition("/")
        if group in groups:
            title = f"{name}, {group}" if len(groups) > 1 else name
            figures.append(_figure(plots.sample_grid(batch), title, escape(title)))
    return f'<h2>{heading}</h2>\n<p>{caption}</p>\n<div class="gallery">\n' + "\n".join(figures) + "\n</div>"


def _plots(results, curves) -> str:
    quality = _figure(
        plots.quality_plot(results["rows"]),
        "quality against network evaluations",
        "Frechet distances against the number of network evaluations a sample costs; both axes are logarithmic. "
        "Star: the one-step generator. Grey lines: the control rows, which cost no evaluation.",
    )
    training = _figure(
        plots.curve_plot(curves, results["teacher"]["held_out_nll"]),
        "training curves",
        "What the training stages logged. The divergence is between teacher and auxiliary network, on masked tokens.",
    )
    support = _figure(
        plots.support_plot(results["support"]),
        "number of likely outputs",
        "For how many of its outputs a token's distribution has a probability above 0.001 (paper, Fig. 9).",
    )
    return (
        f'<h2>Quality and cost</h2>\n<div class="plot">{quality}</div>\n'
        f'<h2>Training</h2>\n<div class="plot">{training}</div>\n'
        f'<h2>How sure the networks are</h2>\n<div class="plot">{support}</div>'
    )


def _figure(png: bytes, alt: str, caption: str) -> str:
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<figure><img src="{source}" alt="{escape(alt)}"><figcaption>{caption}</figcaption></figure>'


def _row(tag: str, cells: Sequence[str], kind: str = "") -> str:
    return f'<tr class="{kind}">' + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"
