"""Every optimizer in every situation that training brings: one test per situation, run through the registry."""

import pytest

# Its assertions are told in full, as those of the tests are.
pytest.register_assert_rewrite(f"{__name__}.common")
