"""Report measurements as tables and as JSON."""

import importlib.metadata
import importlib.util
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from moa_train.runtime.device import available_cores
from moa_train.runtime.files import write_file
from moa_train.tracking import provenance

PEERS = ("timm", "torchvision")


@dataclass(frozen=True)
class Row:
    """One quantity, measured once per round.

    Attributes:
        what: name of the quantity.
        unit: unit of the values.
        values: one value per round.
        facts: additional columns, whose names include the units: ``{"ms": 12.5, "MFU %": 41.0}``.
    """

    what: str
    unit: str
    values: Sequence[float]
    facts: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def rate(cls, what: str, seconds: Sequence[float], work: float, unit: str = "images/s", **facts: float) -> "Row":
        """Return a row of ``work`` per second, given the seconds of each round."""
        return cls(what, unit, [work / value for value in seconds], facts)

    def over(self, other: "Row") -> "Row":
        """Return the row of ratios to the other row's values, computed round by round."""
        pairs = zip(self.values, other.values, strict=True)
        return Row(f"{self.what} / {other.what}", "ratio", [value / reference for value, reference in pairs])

    @property
    def median(self) -> float:
        """The median over the rounds."""
        return statistics.median(self.values)

    def as_dict(self) -> dict[str, Any]:
        """Return the row and its statistics in a form that JSON can represent."""
        numbers = {"median": self.median, "min": min(self.values), "max": max(self.values), "n": len(self.values)}
        return {"what": self.what, "unit": self.unit, **numbers, "values": list(self.values), **self.facts}


@dataclass(frozen=True)
class Table:
    """The rows of one comparison. ``part`` is a part of moa-bench; ``title`` describes what all rows have in common."""

    part: str
    title: str
    rows: Sequence[Row]

    def text(self) -> str:
        """Return the table as text with aligned columns."""
        facts = list(dict.fromkeys(name for row in self.rows for name in row.facts))
        cells = [["", "", "median", "min", "max", "n", *facts]]
        for row in self.rows:
            numbers = [number(value) for value in (row.median, min(row.values), max(row.values))]
            extra = [number(row.facts[name]) if name in row.facts else "" for name in facts]
            cells.append([row.what, row.unit, *numbers, str(len(row.values)), *extra])
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines = [
            "  ".join(f"{cell:{'<' if column < 2 else '>'}{widths[column]}}" for column, cell in enumerate(line))
            for line in cells
        ]
        return "\n".join([f"{self.part}: {self.title}", *(f"  {line}".rstrip() for line in lines)])

    def as_dict(self) -> dict[str, Any]:
        """Return the table in a form that JSON can represent."""
        return {"part": self.part, "title": self.title, "rows": [row.as_dict() for row in self.rows]}


def number(value: float) -> str:
    """Format a number with four significant digits, and without decimals from 1000 on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def header(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """Return date, hardware, versions and code of a measurement in a form that JSON can represent."""
    origin = provenance.collect()
    return {
        "date": origin["started"],
        "command": list(command),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else origin["hardware"]["cpu"],
        "threads": torch.get_num_threads(),
        "cores": available_cores(),
        "system": origin["hardware"]["system"],
        "versions": {name: version for name, version in (origin["versions"] | _peers()).items() if version},
        "commit": origin["code"]["commit"],
        "code": origin["code"]["sha256"],
    }


def describe(header: Mapping[str, Any]) -> str:
    """Return a header as text."""
    shown = ("torch", *(["cuda"] if torch.cuda.is_available() else []), *PEERS)
    versions = ", ".join(f"{name} {header['versions'][name]}" for name in shown if name in header["versions"])
    where = f"{header['device']}, {header['threads']} threads on {header['cores']} cores"
    return f"moa-bench {header['versions']['moa-train']}, {header['date']}\n{where}; {versions}"


def write(path: Path, header: Mapping[str, Any], tables: Iterable[Table]) -> None:
    """Write a header and tables to a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**header, "tables": [table.as_dict() for table in tables]}
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def _peers() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PEERS if importlib.util.find_spec(name) is not None}
