"""Evaluating an accumulation window again, for steps that need the model at other weights."""
