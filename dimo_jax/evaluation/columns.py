"""The columns of every table: metric -> its title and which way is better. And how their numbers are written."""

from typing import NamedTuple


class Column(NamedTuple):
    title: str
    lower_is_better: bool = False

    @property
    def heading(self) -> str:
        return f"{self.title}\N{NO-BREAK SPACE}{'↓' if self.lower_is_better else '↑'}"


COLUMNS = {
    "pixel_fd": Column("pixel FD", lower_is_better=True),
    "cnn_fd": Column("CNN FD", lower_is_better=True),
    "called_real": Column("called real"),
    "label_accuracy": Column("label accuracy"),
    "precision": Column("precision"),
    "recall": Column("recall"),
    "density": Column("density"),
    "coverage": Column("coverage"),
}


def number(value: float | int | None) -> str:
    """A value for a table, with a dash for one that was not measured."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.1f}"
