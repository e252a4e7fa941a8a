"""Pages and pictures about trained models: evaluations, robustness to shifted images, class maps, attention."""
