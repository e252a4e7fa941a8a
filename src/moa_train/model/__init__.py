"""The MOA-Transformer in two forms, baselines, weight files, and what a model costs."""
