"""Pages about trained models: an evaluation in detail, and robustness to shifted data."""
