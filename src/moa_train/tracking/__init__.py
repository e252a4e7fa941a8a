"""What a run reports: console, metrics.jsonl, loggers (TensorBoard, CSV, Weights & Biases), provenance."""
