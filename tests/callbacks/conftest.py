"""Settings for the tests of this folder: those of the strategies' tests."""

from strategies.conftest import _quiet as _quiet
