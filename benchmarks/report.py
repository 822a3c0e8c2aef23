"""A report's two files: the numbers as JSON, and the page made of them."""

import json
import pathlib
from collections.abc import Mapping


def write(folder: pathlib.Path, name: str, report: Mapping, page: str) -> pathlib.Path:
    """Writes `<name>_<backend>.json` and `.md`; returns the JSON file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{report['environment']['backend']}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    path.with_suffix(".md").write_text(page)
    return path
