"""SAM by itself: its perturbation, its steps around any optimizer, its state, its names."""
