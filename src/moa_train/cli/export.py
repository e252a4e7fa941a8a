"""moa-export: write trained weights to files that work without moa-train."""

import json
import sys

from moa_train.cli import app
from moa_train.schema import ExportConfig

EXAMPLES = """moa-export: write trained weights to files that work without moa-train, and check them on real images.

A report is printed as JSON. docs/EXPORT.md describes the formats.

Examples:
  moa-export ckpt=outputs/RUN                                   ONNX, with preprocessing and class names in the file
  moa-export ckpt=outputs/RUN format=int8 max_drop=0.3          quantized for CPUs
  moa-export ckpt=outputs/RUN format=torch_export output=model.pt2
  moa-export ckpt=outputs/RUN format=hub license=mit output=my-model"""


def export(config: ExportConfig, overrides: list[str]) -> None:
    """Export weights and print the report."""
    config.place()  # before anything is imported
    from moa_train.export.job import export as run

    print(json.dumps(run(config, sys.stderr), indent=2))  # standard output is for the JSON only


def main() -> None:
    """Entry point."""
    app.run(export, ExportConfig, "export", EXAMPLES)


if __name__ == "__main__":
    main()
