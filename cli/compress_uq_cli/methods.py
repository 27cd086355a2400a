"""`compress-uq methods`: everything that has a name."""

from __future__ import annotations

import compress_uq as cuq
from compress_uq_cli import options as o
from compress_uq_cli.console import print_json, show_table

__all__ = ["methods"]


def methods(json: o.Json = False) -> None:
    """List everything that has a name: criteria, uncertainty methods, calibrators, precisions, data sets and more."""
    listed = cuq.catalogue()
    if json:
        print_json(listed)
        return
    for kind, entries in listed.items():
        rows = [[entry["name"], entry["summary"], entry["source"]] for entry in entries]
        show_table(kind, ["name", "what it does", "source"], rows)
