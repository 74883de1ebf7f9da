"""What a report must show, as statements with a number, a bound and a verdict; all computed from the results alone.

A statement is {"text", "value", "bound", "passed"}. A row that was not measured gives value or bound None: not passed.
"""

from collections.abc import Mapping
from typing import Any

from dimo_jax.evaluation.columns import COLUMNS
from dimo_jax.evaluation.controls import INDEPENDENT

ONE_STEP = "one step (EMA)"
BEATEN_STEPS = (1, 2)
AIM_STEPS = 16
MAX_HELD_OUT_NLL = 1.36
MAX_PIXEL_FD = 0.14
MAX_CNN_FD_RATIO = 0.17  # of the independent pixels' row: a CNN's own scale means nothing across CNNs
MIN_CNN_ACCURACY = 0.96


def teacher_name(num_steps: int) -> str:
    """The name of the teacher's row with that many steps."""
    return f"teacher, {num_steps} step{'s' * (num_steps > 1)}"


def check_claims(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One step beats the teacher's 1 and 2 steps on both distances, and the teacher and the scoring CNN are sound."""
    rows = _rows(results)
    beaten = [
        _claim(
            f"{COLUMNS[metric].title}: {ONE_STEP} is below {teacher_name(steps)}",
            rows.get(ONE_STEP, {}).get(metric),
            rows.get(teacher_name(steps), {}).get(metric),
            lambda value, bound: value < bound,
        )
        for steps in BEATEN_STEPS
        for metric in ("pixel_fd", "cnn_fd")
    ]
    return beaten + _soundness(results, rows)


def check_aims(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Beyond the claims: on each metric, is one step as good as the teacher's 16? No verdict hangs on it."""
    rows = _rows(results)
    one, many = rows.get(ONE_STEP, {}), rows.get(teacher_name(AIM_STEPS), {})
    return [
        _claim(
            f"{column.title}: {ONE_STEP} is as good as {teacher_name(AIM_STEPS)}",
            one.get(metric),
            many.get(metric),
            _at_most if column.lower_is_better else _at_least,
        )
        for metric, column in COLUMNS.items()
    ]


def _soundness(results, rows):
    sound, noise = rows.get(teacher_name(AIM_STEPS), {}), rows.get(INDEPENDENT, {}).get("cnn_fd")
    bound = None if noise is None else MAX_CNN_FD_RATIO * noise
    where = f"of {teacher_name(AIM_STEPS)} is at most"
    nll, accuracy = results["teacher"]["held_out_nll"], results["cnn"]["held_out_accuracy"]
    return [
        _claim("teacher's held-out masked NLL (nats per token) is at most the bound", nll, MAX_HELD_OUT_NLL, _at_most),
        _claim(f"pixel FD {where} the bound", sound.get("pixel_fd"), MAX_PIXEL_FD, _at_most),
        _claim(f"CNN FD {where} {MAX_CNN_FD_RATIO} of {INDEPENDENT}", sound.get("cnn_fd"), bound, _at_most),
        _claim("scoring CNN's held-out accuracy is at least the bound", accuracy, MIN_CNN_ACCURACY, _at_least),
    ]


def _rows(results):
    return {row["name"]: row["metrics"] for row in results["rows"]}


def _claim(text, value, bound, holds):
    passed = value is not None and bound is not None and holds(value, bound)
    return {"text": text, "value": value, "bound": bound, "passed": passed}


def _at_most(value, bound):
    return value <= bound


def _at_least(value, bound):
    return value >= bound
