"""report.html: the card with its diagrams, in one file."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure
import numpy as np

from compress_uq.metrics import reliability, sparsification_curves
from compress_uq.report.evaluation import Evaluation

__all__ = ["column_titles", "render_page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1c2430; }
h1 { font-size: 1.6rem; margin-bottom: 0.2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { border-bottom: 1px solid #dde3ea; padding: 0.3rem 0.6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.warning { background: #fff6e0; border-left: 4px solid #e0a100; padding: 0.5rem 0.8rem; margin: 0.5rem 0; }
figure { margin: 1rem 0; } figcaption { color: #556; font-size: 0.9rem; } img { max-width: 100%; }
pre { background: #f5f7fa; padding: 0.8rem; overflow-x: auto; font-size: 0.85rem; }
"""
_COLOURS = {"dense": "#8a94a6", "before": "#8a94a6", "compressed": "#1f6feb"}
_RELIABILITY = {**_COLOURS, "uncalibrated": "#7aa7e9"}

_FIRST_RUN = ("dense", "dense_calibrated", "control")
"""Columns that are not measured again when a bundle is calibrated again."""

Rows = Sequence[tuple[str, Mapping[str, str]]]


def render_page(
    report: Mapping[str, Any], rows: Rows, columns: Mapping[str, Evaluation], method: Sequence[str] = ()
) -> str:
    """A whole HTML page; pictures are inside it, and nothing is loaded from elsewhere.

    Args:
        report: the content of report.json.
        rows: the card's table, a name and a text per column.
        method: lines on the uncertainty method.
        columns: the evaluations that the diagrams are drawn from; `dense`, `before` (another calibration) and
            `compressed` are shown, and `uncalibrated` where calibration is.
    """
    calibrated = {name: columns[name] for name in ("dense", "before", "uncalibrated", "compressed") if name in columns}
    shown = {name: columns[name] for name in _COLOURS if name in columns}
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>compress-uq report card</title>",
        f"<style>{_STYLE}</style></head><body><h1>Report card</h1>",
        f"<p>{html.escape(_headline(report))}</p>",
        *(f"<p class='warning'>{html.escape(text)}</p>" for text in report["warnings"]),
        "<h2>Side by side</h2>",
        _table(rows, column_titles(report, list(rows[0][1]))),
        "<h2>Is the confidence right?</h2>",
        _picture(
            _reliability(calibrated), "Reliability: accuracy against confidence in 15 bins; on the diagonal is right."
        ),
        "<h2>Are the uncertain images the wrong ones?</h2>",
        _picture(
            _sparsification(shown),
            "Sparsification: error rate of the images kept when the most uncertain are removed. "
            "Dashed: the oracle that knows every error. The area between is AUSE.",
        ),
        "<h2>What does answering less bring?</h2>",
        _picture(
            _risk_coverage(shown),
            "Risk and coverage: error rate of the share of images that is answered, most certain first. The mean of a "
            "curve is AURC; the dot is the acceptance rule, where there is one.",
        ),
        *(("<h2>Which classes changed?</h2>", _class_table(report)) if report.get("class_changes") else ()),
        "<h2>Uncertainty method</h2><ul>",
        *(f"<li>{html.escape(line)}</li>" for line in method),
        "</ul>",
    ]
    if shown["compressed"].ood_scores:
        caption = "Out-of-distribution score of test images and of each set; the less they overlap the better."
        parts += ["<h2>Does it notice foreign images?</h2>", _picture(_histograms(shown), caption)]
    parts += [
        "<h2>How it was measured</h2><ul>",
        *(f"<li><b>{html.escape(k)}</b>: {html.escape(v)}</li>" for k, v in report["conventions"].items()),
        "</ul><h2>Recipe</h2>",
        f"<pre>{html.escape(json.dumps(report['recipe'], indent=2, sort_keys=True))}</pre></body></html>",
    ]
    return "\n".join(parts)


def column_titles(report: Mapping[str, Any], columns: Sequence[str]) -> dict[str, str]:
    """What stands above each column: which of them are of other images than the rest is said there."""
    again = report.get("recalibration") is not None
    return {name: f"{name} (first run)" if again and name in _FIRST_RUN else name for name in columns}


def _headline(report: Mapping[str, Any]) -> str:
    """Two columns of the same images: dense and compressed, or before and after another calibration."""
    dense, onnx, changed = report["dense"], report["onnx"], report.get("recalibration")
    opening, names, pair = "", ("dense", "compressed"), (dense["metrics"], onnx["metrics"])
    if changed is not None:
        opening, names = f"Calibrated again on {changed['data']}. ", ("before", "after")
        pair = (changed["before"], changed["after"])
    accuracy = [figures["accuracy"]["value"] * 100 for figures in pair]
    ece = [figures["ece"]["value"] for figures in pair]
    share = onnx["cost"]["macs"] / dense["cost"]["macs"]
    return (
        f"{opening}Accuracy {accuracy[0]:.2f} % {names[0]}, {accuracy[1]:.2f} % {names[1]}; expected calibration error "
        f"{ece[0]:.4f} and {ece[1]:.4f}; a prediction with its uncertainty costs {share:.2f} of one dense pass in MACs."
    )


def _table(rows: Rows, columns: Mapping[str, str]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in columns.values())
    body = "".join(
        f"<tr><td>{html.escape(name)}</td>" + "".join(f"<td>{html.escape(texts[c])}</td>" for c in columns) + "</tr>"
        for name, texts in rows
    )
    return f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>"


def _picture(figure: matplotlib.figure.Figure, caption: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    text = html.escape(caption)
    return f"<figure><img alt='{text}' src='data:image/png;base64,{data}'><figcaption>{text}</figcaption></figure>"


def _reliability(shown: Mapping[str, Evaluation]) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(4 * len(shown) + 1, 4.2))
    axes = figure.subplots(1, len(shown), sharey=True)
    for axis, (name, column) in zip(axes, shown.items(), strict=True):
        bins = reliability(column.prediction.probabilities, column.labels)
        filled = bins.count > 0
        centres = (np.arange(len(bins.count)) + 0.5) / len(bins.count)
        width = 0.9 / len(bins.count)
        axis.bar(centres[filled], bins.accuracy[filled], width, color=_RELIABILITY[name], label="accuracy")
        axis.plot(
            bins.confidence[filled], bins.accuracy[filled], ".", color="black", label="mean confidence of the bin"
        )
        axis.plot([0, 1], [0, 1], "--", color="black", linewidth=0.8)
        share = bins.count[filled] / bins.count.sum()
        for x, y, s in zip(centres[filled], bins.accuracy[filled], share, strict=True):
            axis.annotate(f"{100 * s:.0f} %", (x, y + 0.025), ha="center", va="bottom", rotation=90, fontsize=7)
        axis.set(
            xlim=(0, 1),
            ylim=(0, 1.12),
            yticks=np.linspace(0, 1, 6),
            xlabel="confidence",
            title=f"{name}, ECE {bins.ece:.4f}",
        )
    axes[0].set_ylabel("accuracy")
    axes[0].legend(loc="upper center", bbox_to_anchor=(1.05, -0.13), ncol=2, fontsize=8, frameon=False)
    return figure


def _sparsification(shown: Mapping[str, Evaluation]) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(7, 4))
    axis = figure.subplots()
    for name, column in shown.items():
        prediction = column.prediction
        removed, kept, oracle = sparsification_curves(prediction.probabilities, column.labels, prediction.uncertainty)
        label = f"{name}, AUSE {column.metrics['ause'].value:.4f}"
        axis.plot(removed, kept, color=_COLOURS[name], label=label)
        axis.plot(removed, oracle, "--", color=_COLOURS[name], linewidth=0.9)
    axis.set(xlabel="share of images removed, most uncertain first", ylabel="error rate of the rest", xlim=(0, 1))
    axis.set_ylim(bottom=0)
    axis.legend()
    return figure


def _risk_coverage(shown: Mapping[str, Evaluation]) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(7, 4))
    axis = figure.subplots()
    for name, column in shown.items():
        prediction = column.prediction
        removed, kept, _ = sparsification_curves(prediction.probabilities, column.labels, prediction.uncertainty)
        axis.plot(1 - removed, kept, color=_COLOURS[name], label=f"{name}, AURC {column.metrics['aurc'].value:.4f}")
        rule = column.decisions
        if "acceptance_coverage" in rule and not np.isnan(rule["selective_risk"].value):
            place = (rule["acceptance_coverage"].value, rule["selective_risk"].value)
            axis.plot(*place, "o", color=_COLOURS[name], label=f"accepted: {place[0]:.3f} at risk {place[1]:.4f}")
    axis.set(xlabel="coverage: share of images answered", ylabel="risk: error rate of the answers", xlim=(0, 1.02))
    axis.set_ylim(bottom=0)
    axis.legend()
    return figure


def _class_table(report: Mapping[str, Any]) -> str:
    names = ("class", "dense", "compressed", "change", "lost", "gained", "p_value")
    head = "".join(f"<th>{name.replace('_', ' ')}</th>" for name in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(_cell(row[name]))}</td>" for name in names) + "</tr>"
        for row in report["class_changes"]
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return "undefined"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _histograms(shown: Mapping[str, Evaluation]) -> matplotlib.figure.Figure:
    figure = matplotlib.figure.Figure(figsize=(9, 3.8))
    axes = figure.subplots(1, len(shown), sharey=True)
    for axis, (name, column) in zip(axes, shown.items(), strict=True):
        every = np.concatenate([column.prediction.ood_score, *column.ood_scores.values()])
        edges = np.linspace(every.min(), max(every.max(), every.min() + 1e-6), 41)
        axis.hist(column.prediction.ood_score, edges, density=True, color="#c3cad5", label="test images")
        for number, (title, scores) in enumerate(column.ood_scores.items()):
            label = f"{title}, AUROC {column.ood[title]['auroc'].value:.3f}"
            axis.hist(scores, edges, density=True, histtype="step", color=f"C{number}", label=label)
        axis.set(xlabel="OOD score", title=name, yscale="log")
        axis.legend(fontsize=7)
    axes[0].set_ylabel("density")
    return figure
