"""The callbacks, under a Trainer."""
