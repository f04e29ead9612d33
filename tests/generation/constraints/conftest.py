from __future__ import annotations

import pytest

from tests.generation.constraints.helpers import Processes


@pytest.fixture
def processes() -> Processes:
    """The processes that the test starts."""
    return Processes()
