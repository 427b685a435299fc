"""Schedules against independent closed forms, torch's schedulers, and themselves after a resume."""

import pytest

# Its assertions are told in full, as those of the tests are.
pytest.register_assert_rewrite(f"{__name__}.common")
