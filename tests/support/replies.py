"""Every reply has the documented form."""

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from flplatform.hci.render import JsonRenderer
from flplatform.hci.units import unit_of

SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "command.schema.json"
VALIDATOR = Draft202012Validator(json.loads(SCHEMA.read_text()))


def check(items: Iterable[Mapping[str, Any]], line: str = "") -> dict[str, Any]:
    """The JSON object of a reply, checked against the schema; cells with a unit are numbers."""
    out = io.StringIO()
    renderer = JsonRenderer(out, line)
    code = 0
    for item in items:
        if item["type"] == "done":
            code = item["exit_code"]
        else:
            renderer.show(dict(item))
    renderer.finish(code, 0.0)
    document: dict[str, Any] = json.loads(out.getvalue())
    VALIDATOR.validate(document)
    cells = [cell for row in document["rows"] for cell in row["cells"].items()]
    for table in document["tables"]:
        assert all(len(row) == len(table["columns"]) for row in table["rows"]), table["name"]
        if not table["verbatim"]:
            cells += [
                cell for row in table["rows"] for cell in zip(table["columns"], row, strict=True)
            ]
    for name, value in cells:
        if unit_of(name) in ("s", "bytes", "days"):
            assert value is None or type(value) in (int, float), (name, value)
    return document
