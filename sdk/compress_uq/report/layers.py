"""Tables and a picture of what each layer bears."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.figure

__all__ = ["layer_pages"]

_MEASURES = ("accuracy", "nll", "ece", "ause")
_DRAWN = {"nll": "NLL", "ece": "ECE", "ause": "AUSE"}


def layer_pages(dense: Mapping[str, float], rows: Sequence[Mapping[str, Any]], images: str) -> dict[str, bytes]:
    """`md`, `csv` and `png` of rows with `layer`, `channels`, `ratio` and the measures `accuracy nll ece ause`."""
    return {"md": _markdown(dense, rows, images).encode(), "csv": _csv(rows).encode(), "png": _png(dense, rows)}


def _markdown(dense: Mapping[str, float], rows: Sequence[Mapping[str, Any]], images: str) -> str:
    lines = [
        "# Sensitivity of each layer",
        "",
        f"One group of channels pruned at a time, not fine-tuned, calibrated. Measured on images {images}.",
        "",
        f"| layer | channels | ratio | {' | '.join(_MEASURES)} |",
        f"|---|---|---|{'---|' * len(_MEASURES)}",
        f"| none | | 0 | {' | '.join(f'{dense[name]:.4f}' for name in _MEASURES)} |",
    ]
    for row in rows:
        figures = " | ".join(f"{row[name]:.4f}" for name in _MEASURES)
        lines.append(f"| {row['layer']} | {row['channels']} | {row['ratio']} | {figures} |")
    return "\n".join([*lines, "", "![Sensitivity](sensitivity.png)", ""])


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["layer", "channels", "ratio", *_MEASURES], extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _png(dense: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> bytes:
    """A panel for each measure, a row for each layer, a mark for each ratio."""
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    ratios = sorted({row["ratio"] for row in rows})
    figure = matplotlib.figure.Figure(figsize=(11, 1.6 + 0.26 * len(layers)))
    axes = figure.subplots(1, len(_DRAWN), sharey=True)
    for axis, (name, title) in zip(axes, _DRAWN.items(), strict=True):
        for number, ratio in enumerate(ratios):
            found = {row["layer"]: row[name] for row in rows if row["ratio"] == ratio}
            places = [i for i, layer in enumerate(layers) if layer in found]
            values = [found[layers[i]] for i in places]
            axis.plot(
                values, places, "osD^vP"[number % 6], color=f"C{number}", markersize=5, label=f"{ratio:g} removed"
            )
        axis.axvline(dense[name], color="#667085", linewidth=1, linestyle="--", label="dense")
        axis.set(xlabel=title)
        axis.grid(visible=True, color="#e4e7ec", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(layers)), layers, fontsize=8)
    axes[0].invert_yaxis()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=len(labels), frameon=False)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()
