"""The command line, in this process: names, files, groups, schedules, errors, and the commands without a Trainer."""

import pytest

# Its assertions are told in full, as those of the tests are.
pytest.register_assert_rewrite(f"{__name__}.common")
