"""The version, in one place, so that builds need not import torch."""

__version__ = "0.1.0"
