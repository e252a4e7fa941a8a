"""From image files to normalized, augmented, mixed batches."""
