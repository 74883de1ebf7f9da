"""python -m dimo_jax.evaluation.summary FOLDER: several seeds of a run in one table.

Reads FOLDER/seed*/report/results.json, prints the summary and leaves it in FOLDER as `summary.md` and `summary.json`.
Exits with 0 if every claim holds in every seed, with 1 if not, with 2 if there is nothing to read.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dimo_jax.errors import UserError
from dimo_jax.evaluation.columns import COLUMNS, number


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dimo_jax.evaluation.summary", description=__doc__.split("\n\n")[1])
    parser.add_argument("folder", type=Path, help="holds one folder a seed: seed1, seed2, ...")
    folder = parser.parse_args(arguments).folder
    try:
        summary = summarise(read_results(folder))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = markdown(summary)
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    (folder / "summary.md").write_text(text, encoding="utf-8")
    print(text, end="")
    return 0 if summary["passed"] else 1


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """The results of every seed by the name of its folder.

    Raises:
      UserError: there are none, or a file is no JSON.
    """
    paths = sorted(folder.glob("seed*/report/results.json"))
    if not paths:
        raise UserError(f"no seed*/report/results.json in {folder}: run the seeds first, e.g. `make digits-seeds`")
    try:
        return {path.parent.parent.name: json.loads(path.read_text()) for path in paths}
    except json.JSONDecodeError as error:
        raise UserError(
            f"results of a seed in {folder} are damaged ({error}): run that seed's evaluation again"
        ) from error


def summarise(seeds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, min and max over the seeds of everything measured, and every claim by seed. See report.py for a seed."""
    runs = list(seeds.values())
    return {
        "seeds": list(seeds),
        "rows": _spread_rows(runs),
        "claims": _verdicts(seeds, "claims"),
        "aims": _verdicts(seeds, "aims"),
        "cnn": {key: _spread([run["cnn"][key] for run in runs]) for key in runs[0]["cnn"]},
        "teacher": {key: _spread([run["teacher"][key] for run in runs]) for key in runs[0]["teacher"]},
        "stages": {key: _spread([run["stages"][key] for run in runs]) for key in runs[0]["stages"]},
        "passed": all(claim["passed"] for run in runs for claim in run["claims"]),
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary as aligned Markdown tables; a cell is the mean (min..max) over the seeds."""
    seeds = summary["seeds"]
    metrics = [["row", "n", *(column.heading for column in COLUMNS.values()), "seconds per 1,000 ↓"]]
    for row in summary["rows"]:
        name = row["name"] + (" (control)" if row["kind"] == "control" else "")
        spreads = [*(row["metrics"][metric] for metric in COLUMNS), row["seconds_per_1000"]]
        metrics.append([name, number(row["num_samples"]), *map(_cell, spreads)])
    parts = [
        f"# {len(seeds)} seeds: {', '.join(seeds)}\n\nMean (min..max) over the seeds.",
        _table(metrics),
        f"Scoring CNN, held out: digit {_cell(summary['cnn']['held_out_accuracy'])}, "
        f"all 20 classes {_cell(summary['cnn']['held_out_joint_accuracy'])}. "
        f"Teacher's held-out masked NLL {_cell(summary['teacher']['held_out_nll'])} nats per token.",
        _verdict_table("claim", summary["claims"], seeds, ("holds", "FAILS")),
        f"**{'Every claim holds in every seed.' if summary['passed'] else 'Not every claim holds.'}**",
        _verdict_table("further aim", summary["aims"], seeds, ("reached", "not reached")),
        _table([["stage", "seconds"], *([name, _cell(spread)] for name, spread in summary["stages"].items())]),
    ]
    return "\n\n".join(parts) + "\n"


def _verdict_table(title, statements, seeds, words) -> str:
    rows = [[title, "value", "bound", *seeds, "all seeds"]]
    for item in statements:
        verdicts = [*(item["passed"][seed] for seed in seeds), all(item["passed"].values())]
        rows.append([item["text"], _cell(item["value"]), _cell(item["bound"]), *(words[not good] for good in verdicts)])
    return _table(rows)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the heading; the first column is set to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in [rows[0], rule, *rows[1:]]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return number(None)
    return f"{number(spread['mean'])} ({number(spread['min'])}..{number(spread['max'])})"


def _spread_rows(runs) -> list[dict[str, Any]]:
    rows = []
    for first in runs[0]["rows"]:
        same = [row for run in runs for row in run["rows"] if row["name"] == first["name"]]
        spread = {key: _spread([row["metrics"][key] for row in same]) for key in first["metrics"]}
        seconds = _spread([row["seconds_per_1000"] for row in same])
        rows.append({**first, "metrics": spread, "seconds_per_1000": seconds})
    return rows


def _verdicts(seeds, kind) -> list[dict[str, Any]]:
    """A claim or an aim over the seeds: spreads of its value and bound, and who passed."""
    verdicts = []
    for items in zip(*(run[kind] for run in seeds.values()), strict=True):
        passed = {seed: item["passed"] for seed, item in zip(seeds, items, strict=True)}
        spreads = {key: _spread([item[key] for item in items]) for key in ("value", "bound")}
        verdicts.append({"text": items[0]["text"], **spreads, "passed": passed})
    return verdicts


def _spread(values: Sequence[float | None]) -> dict[str, float] | None:
    """Mean, min and max; None where a seed has not measured it."""
    if None in values:
        return None
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    sys.exit(main())
