"""Pictures of a study: a measure against a setting or against another measure, a line for each combination."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib.figure
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from compress_uq.study.file import Plot, Study
from compress_uq.study.runs import Run
from compress_uq.study.statistics import Group, Summary, grouped, summarised
from compress_uq.study.values import plain_text

__all__ = ["draw"]

_TITLES = {
    "accuracy_at_50": "accuracy of the more certain half",
    "accuracy_drop": "drop of accuracy from the dense model",
    "macs_share": "MACs of a prediction, share of the dense model's",
    "parameters_share": "parameters, share of the dense model's",
    "pass_macs_share": "MACs of one pass, share of the dense model's",
}
_CAPITALS = ("ece", "ause", "nll", "aurc", "auroc", "ood", "macs", "f1")
_DENSE = {"dense_": "dense", "dense_calibrated_": "dense, calibrated"}
_PREFIXES = (
    ("dense_calibrated_", "dense, calibrated: "),
    ("dense_", "dense: "),
    ("control_", "control: "),
    ("held_out_", "held out: "),
)
_MARKERS = "osD^vPX*<>"
_GREY = "#667085"


@dataclass(frozen=True)
class _Point:
    x: float
    x_sd: float | None
    y: Summary


def draw(plot: Plot, study: Study, runs: Sequence[Run]) -> bytes | None:
    """A PNG with means, bars of one standard deviation and the dense model's value; None where nothing can be shown."""
    counted = [run for run in runs if run.meets(plot.where) and run.done]
    positions = _positions(plot, study, counted)
    lines = [
        (group, points) for group in grouped(counted, plot.lines) if (points := _points(group, plot, study, positions))
    ]
    if not lines:
        return None
    figure = matplotlib.figure.Figure(figsize=(6.4, 4.2))
    axis = figure.subplots()
    for number, (group, points) in enumerate(lines):
        axis.errorbar(
            [p.x for p in points],
            [p.y.mean for p in points],
            xerr=_bars(p.x_sd for p in points),
            yerr=_bars(p.y.sd for p in points),
            color=f"C{number % 10}",
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            linewidth=1.6,
            linestyle="-" if positions is None else "none",
            capsize=3,
            label=group.label() or "compressed",
        )
    _dense(axis, plot, [group for group, _ in lines])
    values = {point.x for _, points in lines for point in points}
    _ticks(axis, positions, sorted(values) if plot.x in study.axes else [])
    axis.set(xlabel=_title(plot.x), ylabel=_title(plot.y))
    axis.grid(visible=True, color="#e4e7ec", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axis.get_legend_handles_labels()
    if len(labels) > 1 or plot.lines:
        order = sorted(range(len(labels)), key=lambda i: labels[i] in _DENSE.values())
        axis.legend(
            [handles[i] for i in order], [labels[i] for i in order],
            loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False,
        )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


def _ticks(axis: Axes, positions: dict[str, int] | None, values: Sequence[float]) -> None:
    """Names where x is an axis of names, the values of an axis where they are few, and round numbers otherwise."""
    if positions is not None:
        axis.set_xticks(list(positions.values()), list(positions), rotation=30 if len(positions) > 4 else 0)
        axis.set_xlim(-0.5, len(positions) - 0.5)
    elif 1 < len(values) <= 10 and min(b - a for a, b in pairwise(values)) >= (values[-1] - values[0]) / 20:
        axis.set_xticks(list(values), [plain_text(value) for value in values])
    else:
        axis.xaxis.set_major_locator(MaxNLocator(7))


def _positions(plot: Plot, study: Study, runs: Sequence[Run]) -> dict[str, int] | None:
    """Places along x for an axis of names; None where x is a number."""
    if plot.x not in study.axes:
        return None
    values = [run.value(plot.x) for run in runs]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return None
    return {text: place for place, text in enumerate(dict.fromkeys(plain_text(value) for value in values))}


def _points(group: Group, plot: Plot, study: Study, positions: dict[str, int] | None) -> list[_Point]:
    """Means along x, in its order; against a measure, in the order of the axes that the line runs along."""
    along = [plot.x] if plot.x in study.axes else [axis for axis in study.varied if axis not in plot.lines]
    points = []
    for part in grouped(group.runs, along):
        y = part.summary(plot.y)
        if y is None:
            continue
        if plot.x in study.axes:
            value = part.values[plot.x]
            points.append(_Point(float(value if positions is None else positions[plain_text(value)]), None, y))
        elif (x := part.summary(plot.x)) is not None:
            points.append(_Point(x.mean, x.sd, y))
    return sorted(points, key=lambda point: point.x)


def _dense(axis: Axes, plot: Plot, groups: Sequence[Group]) -> None:
    """The dense model's value, as given and calibrated: one line where all share it, else one in each's colour."""
    before: list[float | None] = []
    for prefix, style in (("dense_", "--"), ("dense_calibrated_", ":")):
        found = [summarised(run.measure(f"{prefix}{plot.y}") for run in group.runs) for group in groups]
        means = [None if summary is None else round(summary.mean, 9) for summary in found]
        if means == before or not any(mean is not None for mean in means):
            continue
        before, shared = means, len(set(means)) == 1
        for number, mean in enumerate(means[:1] if shared else means):
            if mean is not None:
                axis.axhline(mean, color=_GREY if shared else f"C{number % 10}", linestyle=style, linewidth=1.2)
        axis.plot([], [], color=_GREY, linestyle=style, linewidth=1.2, label=_DENSE[prefix])


def _bars(deviations: Iterable[float | None]) -> list[float] | None:
    """Lengths of error bars; none at all where every point is a single run."""
    listed = list(deviations)
    return None if not any(listed) else [sd or 0.0 for sd in listed]


def _title(name: str) -> str:
    """A measure or a setting in words."""
    if name in _TITLES:
        return _TITLES[name]
    for prefix, words in _PREFIXES:
        if name.startswith(prefix):
            return words + _title(name.removeprefix(prefix))
    return " ".join(word.upper() if word in _CAPITALS else word for word in name.split("_"))
