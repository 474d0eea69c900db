import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data files beside the repository, or where QLORA_TEST_DATA says."""
    directory = Path(os.environ.get("QLORA_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not directory.is_dir():
        pytest.skip(f"no test data at {directory}; set QLORA_TEST_DATA to where it is")
    return directory
