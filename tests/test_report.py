"""A report of made-up results: a page that parses, pictures that open, claims that follow; and the summary of seeds."""

import base64
import copy
import io
import json
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from dimo_jax.errors import UserError
from dimo_jax.evaluation import plots, summary
from dimo_jax.evaluation.claims import ONE_STEP, check_aims, check_claims, teacher_name
from dimo_jax.evaluation.columns import COLUMNS, number
from dimo_jax.evaluation.controls import COPIES, HELD_OUT, INDEPENDENT, RESAMPLED
from dimo_jax.evaluation.report import write_report

STEPS = (1, 2, 4, 8, 16)


def row(name, kind, evaluations, pixel_fd, cnn_fd, share, num_samples=1000):
    metrics = {"pixel_fd": pixel_fd, "cnn_fd": cnn_fd, **dict.fromkeys(list(COLUMNS)[2:], share)}
    seconds = None if kind == "control" else 0.2 * evaluations
    return {
        "name": name, "kind": kind, "evaluations": evaluations, "num_samples": num_samples, "metrics": metrics,
        "seconds_per_1000": seconds,
    }  # fmt: skip


def made_up_results(seed: int = 1) -> dict:
    """A sound teacher, and one step between its 8 and its 16 steps; the claims' own file knows the bounds."""
    pixel, cnn = (0.54, 0.26, 0.17, 0.125, 0.13), (53.0, 23.0, 13.6, 9.2, 8.4)
    teacher = [
        row(teacher_name(k), "teacher", k, fd, cnn_fd, 0.7 + 0.01 * k)
        for k, fd, cnn_fd in zip(STEPS, pixel, cnn, strict=True)
    ]
    controls = [
        row(HELD_OUT, "control", None, 0.058, 0.4, 0.99, 359),
        row(RESAMPLED, "control", None, 0.03, 0.3, 0.99),
        row(INDEPENDENT, "control", None, 0.53, 53.5, 0.03),
        row(COPIES, "control", None, 0.23, 2.0, 0.98),
    ]
    return {
        "config": {"seed": seed, "note": "a <b> & a 'quote'"},
        "seed": seed,
        "machine": "x86_64 <2 cores>",
        "stages": {"pretrain": 300.0 + seed, "distill": 120.5},
        "cnn": {"held_out_accuracy": 0.9861, "held_out_joint_accuracy": 0.9694},
        "teacher": {"held_out_nll": 1.34},
        "rows": [*teacher, row(ONE_STEP, "generator", 1, 0.128, 9.2, 0.9), *controls],
        "support": {"teacher": [0, 5, 9, 30, 10, 0], "generator": [0, 60, 20, 9, 1, 0]},
    }


def made_up_images() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = ["real", *map(teacher_name, STEPS), ONE_STEP, "sampled/teacher", "top-1/teacher", "sampled/generator"]
    names += ["top-1/generator", "inpainting/original", "inpainting/masked", "inpainting/generator"]
    images = {name: rng.uniform(-1, 1, size=(40, 8, 8, 1)).astype(np.float32) for name in names}
    images["inpainting/masked"][:, 4:] = np.nan
    return images


def made_up_curves() -> dict[str, list[dict]]:
    steps = range(50, 2501, 50)
    pretrain = [{"step": n, "nll": 1.3 + 60 / n, "time/steps_per_s": 5.0} for n in steps]
    distill = [
        {"step": n, "generator/divergence": 9 * np.exp(-n / 300), "auxiliary/loss": 1.4} for n in range(10, 601, 10)
    ]
    return {"pretrain": pretrain, "distill": distill}


class Page(HTMLParser):
    """Tags must close in order; keeps the pictures, the text, and every address."""

    VOID = {"meta", "img", "br"}

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.pictures, self.addresses, self.texts = [], [], [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attrs = dict(attrs)
        self.addresses += [attrs[key] for key in ("src", "href") if key in attrs]
        if tag == "img":
            self.pictures.append(attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def picture(address: str) -> Image.Image:
    head, _, data = address.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_report_is_one_whole_page(tmp_path):
    results, images = made_up_results(), made_up_images()
    returned = write_report(tmp_path / "new" / "report", results, images, made_up_curves())
    assert sorted(path.name for path in (tmp_path / "new" / "report").iterdir()) == ["index.html", "results.json"]
    assert json.loads((tmp_path / "new" / "report" / "results.json").read_text()) == returned
    assert returned == {**results, "claims": check_claims(results), "aims": check_aims(results)}

    page = Page((tmp_path / "new" / "report" / "index.html").read_text(encoding="utf-8"))
    assert page.open == [] and page.tags.count("table") == 3
    assert len(page.pictures) == len(images) + 3 and all(attrs["alt"] for attrs in page.pictures)
    assert all(address.startswith("data:") for address in page.addresses)  # nothing is fetched from elsewhere
    sizes = [picture(attrs["src"]).size for attrs in page.pictures]
    assert sizes[: len(images)] == [(260, 104)] * len(images)
    assert all(width >= 1120 for width, _ in sizes[len(images) :])

    text = "".join(page.texts)
    assert text.count("Scoring CNN, held out: 0.986 of the digits right, 0.969") == 3  # under every table
    assert text.count("control") >= 4 and "x86_64 <2 cores>" in text and "a <b> & a 'quote'" in text
    for expected in (
        "0.128",
        "53.5",
        "359",
        "pretrain 301.0 s",
        "together 422 s",
        "1.340 nats",
        "✓ holds",
        "✗ not reached",
    ):
        assert expected in text, expected
    assert "✗ fails" not in text


def test_report_replaces_the_one_before_and_refuses_what_it_would_drop(tmp_path):
    results, images = made_up_results(), made_up_images()
    write_report(tmp_path, results, images, made_up_curves())
    results["rows"][5]["metrics"]["pixel_fd"] = 0.9
    write_report(tmp_path, results, {"real": images["real"]}, {})  # no curves: a teacher from elsewhere
    assert "✗ fails" in (tmp_path / "index.html").read_text(encoding="utf-8")
    with pytest.raises(UserError, match="inpaint/masked belong to no group: known are sampled, top-1, inpainting"):
        write_report(tmp_path, results, {"inpaint/masked": images["real"]}, {})


def test_sample_grid_places_images_and_marks_masked_pixels():
    images = np.full((12, 2, 2, 1), -1, np.float32)
    images[11, 0, 1] = 1
    images[3, 1, 0] = np.nan
    sheet = np.asarray(Image.open(io.BytesIO(plots.sample_grid(images))))
    assert sheet.shape == (16, 80, 3)  # 3x3 a pixel, a gap of 2
    assert (sheet[2, 2] == 0).all() and (sheet[2, 6] == 255).all()  # an image, the gap after it
    assert (sheet[8:11, 11:14] == 255).all() and (sheet[8:11, 8:11] == 0).all()  # image 11: second row, second column
    assert (sheet[3:6, 24:27] == plots.MASKED).all()
    assert (sheet[8:, 16:] == 255).all()  # no image 12


CHANGES = [  # row or part, key, value that breaks the claim, place among the claims
    (ONE_STEP, "pixel_fd", 0.54, 0),
    (ONE_STEP, "cnn_fd", 53.0, 1),
    (teacher_name(2), "pixel_fd", 0.128, 2),
    (teacher_name(2), "cnn_fd", 9.1, 3),
    ("teacher", "held_out_nll", 1.361, 4),
    (teacher_name(16), "pixel_fd", 0.141, 5),
    (teacher_name(16), "cnn_fd", 9.1, 6),
    ("cnn", "held_out_accuracy", 0.959, 7),
]


@pytest.mark.parametrize("where, key, value, place", CHANGES)
def test_each_claim_flips_with_its_number(where, key, value, place):
    results = made_up_results()
    assert [claim["passed"] for claim in check_claims(results)] == [True] * 8
    part = results[where] if where in results else next(r for r in results["rows"] if r["name"] == where)["metrics"]
    part[key] = value
    assert not check_claims(results)[place]["passed"]


def test_a_claim_without_its_row_does_not_pass():
    results = made_up_results()
    results["rows"] = [row for row in results["rows"] if row["name"] != teacher_name(16)]
    claims = check_claims(results)
    assert [claim["passed"] for claim in claims] == [True] * 5 + [False, False, True]
    assert claims[5]["value"] is None and claims[6]["bound"] == pytest.approx(0.17 * 53.5)
    assert not any(aim["passed"] for aim in check_aims(results))


def test_aims_know_which_way_is_better():
    aims = {aim["text"].partition(":")[0]: aim["passed"] for aim in check_aims(made_up_results())}
    assert aims == {column.title: column.title != "CNN FD" for column in COLUMNS.values()}


def test_numbers_for_tables():
    values = (None, 1000, 0.0126, 0.1234, 9.21, 53.5, 1234.56)
    assert [number(v) for v in values] == ["–", "1,000", "0.013", "0.123", "9.210", "53.5", "1,234.6"]


def write_seeds(folder, *runs):
    """What write_report leaves of each run, without the page."""
    for run in runs:
        path = folder / f"seed{run['seed']}" / "report" / "results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({**run, "claims": check_claims(run), "aims": check_aims(run)}))


def test_summary_of_two_seeds(tmp_path, capsys):
    first, second = made_up_results(1), made_up_results(2)
    second["rows"][5]["metrics"]["pixel_fd"] = 0.148
    write_seeds(tmp_path, first, second)
    assert summary.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "summary.md").read_text(encoding="utf-8")
    one_step = next(line for line in printed.splitlines() if line.startswith("| one step"))
    assert " 0.138 (0.128..0.148) |" in one_step and "held-out real (control)" in printed
    for table in printed.split("\n\n"):
        assert len({len(line) for line in table.splitlines() if line.startswith("|")}) <= 1  # aligned
    assert "Every claim holds in every seed" in printed and "digit 0.986 (0.986..0.986)" in printed
    assert "301.5 (301.0..302.0)" in printed

    written = json.loads((tmp_path / "summary.json").read_text())
    assert written["passed"] and written["seeds"] == ["seed1", "seed2"]
    spread = {"mean": pytest.approx(0.138), "min": 0.128, "max": 0.148}
    assert written["rows"][5]["metrics"]["pixel_fd"] == spread
    assert written["aims"][0]["passed"] == {"seed1": True, "seed2": False}


def test_summary_fails_with_one_claim_of_one_seed(tmp_path, capsys):
    bad = copy.deepcopy(made_up_results(2))
    bad["teacher"]["held_out_nll"] = 1.4
    write_seeds(tmp_path, made_up_results(1), bad)
    assert summary.main([str(tmp_path)]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "masked NLL (nats" in line)
    assert [cell.strip() for cell in line.split("|")[-4:-1]] == ["holds", "FAILS", "FAILS"]


def test_summary_says_when_there_is_nothing_to_read(tmp_path, capsys):
    assert summary.main([str(tmp_path)]) == 2
    assert "no seed*/report/results.json in" in capsys.readouterr().err
    write_seeds(tmp_path, made_up_results(1))
    (tmp_path / "seed1" / "report" / "results.json").write_text("{")
    assert summary.main([str(tmp_path)]) == 2
    assert "damaged" in capsys.readouterr().err
