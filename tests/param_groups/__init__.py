"""Parameter groups: what is decayed, which layer has which learning rate, and what overrides do."""

import pytest

# Its assertions are told in full, as those of the tests are.
pytest.register_assert_rewrite(f"{__name__}.common")
