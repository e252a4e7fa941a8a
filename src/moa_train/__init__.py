"""Train, evaluate and compare MOA-Transformers (arXiv 2201.12903)."""

__version__ = "0.1.0"
