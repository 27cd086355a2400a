"""The report card: the dense and the compressed model side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress_uq.errors import InputError, UnknownNameError
from compress_uq.metrics import METRICS, Figure
from compress_uq.report.changes import calibration_change, class_changes
from compress_uq.report.decisions import DECISIONS, guarantees
from compress_uq.report.evaluation import Evaluation
from compress_uq.report.page import column_titles, render_page

__all__ = ["FORMAT_VERSION", "ReportCard", "Requirement", "conventions", "markdown", "method_lines", "table_rows"]

FORMAT_VERSION = 1
COLUMNS = ("dense", "dense_calibrated", "control", "compressed", "onnx")

CONVENTIONS = {
    "ece": "top label, 15 equal-width bins [a, b), the last closed",
    "ause": "Holzbock algorithm 1, sign corrected: q = 0, 2 ... 98, oracle 1 - p[label], trapezoid with step 0.02",
    "ood": "out-of-distribution is the positive class; fpr95 at 95 % of them flagged; ood_auroc is the mean over sets",
    "intervals": "95 % percentile bootstrap, 1,000 resamples, widened to hold the figure; per class: Wilson",
    "decisions": "shares of test images; intervals: Wilson, and of set_size the normal approximation",
    "class_changes": "p: exact McNemar test on the images that one of the two models classifies right",
    "latency": "ONNX Runtime on this machine's CPU, one thread, files taken in turns, median; key: batch size",
    "macs": "multiply-accumulates of convolutions and matrix products, one image, all members",
}


@dataclass(frozen=True)
class Requirement:
    """A bound such as `ece<=0.03` on a figure of the `onnx` column."""

    metric: str
    operator: str
    bound: float

    @classmethod
    def parse(cls, text: str) -> Requirement:
        """From the command line's spelling.

        Raises:
            InputError: not `METRIC<=NUMBER` or `METRIC>=NUMBER`.
            UnknownNameError: no such metric.
        """
        for operator in ("<=", ">="):
            name, found, value = text.partition(operator)
            if found:
                if name.strip() not in METRICS:
                    raise UnknownNameError("metric", name.strip(), METRICS.names)
                try:
                    return cls(name.strip(), operator, float(value))
                except ValueError:
                    break
        raise InputError(f"--require {text!r}: expected METRIC<=NUMBER or METRIC>=NUMBER, such as 'ece<=0.03'")

    def failure(self, figure: Figure | None) -> str | None:
        """Why it is not met, or None."""
        if figure is None or math.isnan(figure.value):
            return f"{self.metric} is not defined for this run, required {self.operator} {self.bound}"
        met = figure.value <= self.bound if self.operator == "<=" else figure.value >= self.bound
        return None if met else f"{self.metric} is {figure.value:.4g}, required {self.operator} {self.bound}"


@dataclass(frozen=True)
class ReportCard:
    """Measurements of every model on the same images, how they came about, and what to beware of."""

    dense: Evaluation
    dense_calibrated: Evaluation
    compressed: Evaluation
    onnx: Evaluation
    control: Evaluation | None
    recipe: Mapping[str, Any]
    warnings: Sequence[str]
    fidelity: Mapping[str, float] | None = None
    """How far the compressed model's fixed members are from many, where that was measured."""
    uncalibrated: Evaluation | None = None
    """The compressed model without its calibrator; None where it has none."""

    @property
    def columns(self) -> dict[str, Evaluation]:
        """The models in the order they are shown."""
        present = {name: getattr(self, name) for name in COLUMNS}
        return {name: column for name, column in present.items() if column is not None}

    def to_json(self) -> dict[str, Any]:
        """The content of report.json."""
        return {
            "format_version": FORMAT_VERSION,
            **{name: None if getattr(self, name) is None else getattr(self, name).to_json() for name in COLUMNS},
            "fidelity": None if self.fidelity is None else dict(self.fidelity),
            "calibration": calibration_change(self.uncalibrated, self.compressed, self.recipe["calibrator"]),
            "class_changes": class_changes(self.dense, self.compressed),
            "recipe": dict(self.recipe),
            "conventions": conventions(self.recipe, self.fidelity),
            "warnings": list(self.warnings),
        }

    def to_markdown(self) -> str:
        """The card as tables."""
        return markdown(self.to_json())

    def to_html(self) -> str:
        """A page with diagrams that needs no other file."""
        report = self.to_json()
        before = {} if self.uncalibrated is None else {"uncalibrated": self.uncalibrated}
        return render_page(report, table_rows(report), {**self.columns, **before}, method_lines(self.recipe))

    def unmet(self, requirements: Sequence[Requirement]) -> list[str]:
        """What the exported file misses of the requirements."""
        checked = [r.failure(self.onnx.metrics.get(r.metric)) for r in requirements]
        return [failure for failure in checked if failure is not None]


def conventions(recipe: Mapping[str, Any], fidelity: Mapping[str, float] | None) -> dict[str, str]:
    """How the figures of a card with this recipe were measured, in words by topic."""
    return {**CONVENTIONS, **_of_samples(recipe, fidelity), **_of_answers(recipe.get("answers", {}))}


def _of_samples(recipe: Mapping[str, Any], fidelity: Mapping[str, float] | None) -> dict[str, str]:
    """Where the fixed masks of dropout come from; nothing for a method that draws none."""
    if "candidates" not in recipe.get("uncertainty", {}).get("options", {}):
        return {}
    if fidelity is None:
        return {"samples": "fixed masks: the first draw, not compared with more samples"}
    return {
        "samples": f"fixed masks: of {fidelity['draws']} draws the one that ranks calibration images, labels unseen, "
        f"as {fidelity['reference']} samples do; chosen on half of {fidelity['images']} images, figures on the rest"
    }


def _of_answers(answers: Mapping[str, Any]) -> dict[str, str]:
    """Which scores the columns answer with, and what their decisions promise."""
    formulas = {"confidence": "1 - confidence"}
    score, ood_score = answers.get("score", "confidence"), answers.get("ood_score", "entropy")
    chosen = answers.get("ood_score_choice")
    text = f"float32, from logits; uncertainty = {formulas.get(score, score)}; ood_score = {ood_score}"
    if chosen is not None:
        means = ", ".join(f"{name} {value:.4f}" for name, value in chosen["mean_auroc"].items())
        text += (
            f", chosen by its mean AUROC, {', '.join(chosen['validation_sets'])} against "
            f"{chosen['in_distribution']}: {means}"
        )
    if (score, ood_score) != ("confidence", "entropy"):
        text += "; of the dense columns 1 - confidence and entropy"
    return {"scores": text, **guarantees(answers)}


def table_rows(report: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """Rows of the card: a name, and a text per column; figures with their interval."""
    present = [name for name in COLUMNS if report[name] is not None]
    rows: list[tuple[str, dict[str, str]]] = []
    for metric in METRICS.names:
        texts = {c: _figure(report[c]["metrics"].get(metric)) for c in present}
        if any(texts.values()):
            rows.append((metric, texts))
    sets = dict.fromkeys(s for c in present for s in report[c]["ood"])
    for title, figure in (("OOD AUROC", "auroc"), ("OOD FPR95", "fpr95")):
        rows += [(f"{title} {s}", {c: _figure(report[c]["ood"].get(s, {}).get(figure)) for c in present}) for s in sets]
    rows += _fidelity_rows(report)
    for name in DECISIONS:
        texts = {c: _figure(report[c].get("decisions", {}).get(name)) for c in present}
        if any(texts.values()):
            rows.append((name, texts))
    rows.append(("parameters", {c: _count(report[c]["cost"]["parameters"]) for c in present}))
    rows.append(("MACs", {c: _count(report[c]["cost"]["macs"]) for c in present}))
    rows.append(("bytes", {c: _count(report[c]["cost"]["size_bytes"]) for c in present}))
    keys = sorted({key for c in present for key in report[c]["cost"]["latency_ms"]})
    for key in keys:
        batch = key.rpartition("_")[2]
        texts = {c: _milliseconds(report[c]["cost"]["latency_ms"].get(key)) for c in present}
        rows.append((f"ms, batch {batch}", texts))
    rows.append(("training s", {c: _count(report[c]["cost"]["training_seconds"]) for c in present}))
    return rows


def _fidelity_rows(report: Mapping[str, Any]) -> list[tuple[str, dict[str, str]]]:
    """How far the fixed samples are from many; `report` may be older than the measurement."""
    known = report.get("fidelity")
    if known is None:
        return []
    pair = f"{known['samples']} and {known['reference']} samples"
    if report.get("recalibration") is not None:
        pair += ", first run"
    figures = {f"Spearman of MI, {pair}": known["spearman"], f"mean difference of p, {pair}": known["difference"]}
    present = [name for name in COLUMNS if report[name] is not None]
    members = ("compressed", "onnx")
    return [(n, {c: f"{v:.4f}" if c in members else "" for c in present}) for n, v in figures.items()]


def markdown(report: Mapping[str, Any]) -> str:
    """report.md from report.json."""
    present = [name for name in COLUMNS if report[name] is not None]
    titles = column_titles(report, present)
    lines = ["# Report card", "", "| | " + " | ".join(titles.values()) + " |", "|---" * (len(present) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(texts[c] for c in present) + " |" for name, texts in table_rows(report)]
    lines += ["", "## Uncertainty", "", *(f"- {line}" for line in method_lines(report["recipe"]))]
    if report.get("calibration") is not None:
        lines += _before_and_after("Calibration of the compressed model", report["calibration"])
    if report.get("recalibration") is not None:
        changed = report["recalibration"]
        lines += _before_and_after(f"Calibrated again on {changed['data']}", changed)
    lines += _per_class(report)
    if report["warnings"]:
        lines += ["", "## Warnings", "", *(f"- {warning}" for warning in report["warnings"])]
    lines += ["", "## How it was measured", "", *(f"- {k}: {v}" for k, v in report["conventions"].items())]
    lines += ["", "## Recipe", "", "```json", json.dumps(report["recipe"], indent=2, sort_keys=True), "```", ""]
    return "\n".join(lines)


def method_lines(recipe: Mapping[str, Any]) -> list[str]:
    """The uncertainty method and what it costs, as it described itself before the work."""
    described = recipe.get("uncertainty", {})
    told = {name: value for name, value in described.items() if name != "options" and value not in (None, [], {})}
    return [f"{name.replace('_', ' ')}: {_plain(value)}" for name, value in told.items()]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_plain(v) for v in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _per_class(report: Mapping[str, Any]) -> list[str]:
    """Accuracy before and after, and a test of the difference where both are of the same images."""
    tested = {row["class"]: row for row in report.get("class_changes", [])}
    head = ["class", *column_titles(report, ("dense", "compressed")).values()]
    head += ["change", "lost", "gained", "p"] if tested else []
    lines = ["", "## Accuracy per class", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, dense in report["dense"]["per_class"].items():
        cells = [name, _figure(dense), _figure(report["compressed"]["per_class"].get(name))]
        if tested:
            row = tested[name]
            change = "" if row["change"] is None else f"{row['change']:+.4f}"
            cells += [change, str(row["lost"]), str(row["gained"]), f"{row['p_value']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _before_and_after(title: str, changed: Mapping[str, Any]) -> list[str]:
    """What a calibrator changed, on the same images."""
    before, after = changed["before"], changed["after"]
    lines = ["", f"## {title}", "", "| | before | after |", "|---|---|---|"]
    lines.append(f"| calibration | {before['calibration']} | {after['calibration']} |")
    names = [name for name in before if name != "calibration"]
    return lines + [f"| {name} | {_figure(before[name])} | {_figure(after[name])} |" for name in names]


def _figure(figure: Mapping[str, float | None] | None) -> str:
    if figure is None:
        return ""
    if figure["value"] is None:
        return "undefined"
    return f"{figure['value']:.4f} [{figure['low']:.4f}, {figure['high']:.4f}]"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
