"""What a training run owes its learning-rate schedules: their totals, and no step that was left out."""
