"""What a trained model does, in pictures and tables: evaluation reports, attention maps, class maps."""
