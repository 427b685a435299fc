"""What a training run does for learning-rate schedules: fill their totals, and skip steps that were left out."""
