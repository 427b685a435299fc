"""Every optimizer on every engine against float64 references and torch.optim, at every step, through a reload."""

import pytest

# Its assertions are told in full, as those of the tests are.
pytest.register_assert_rewrite(f"{__name__}.common")
