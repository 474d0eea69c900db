"""Find the user's cache directory, where imported models and prepared data are shared by all runs."""

import os
from pathlib import Path

from qlora_trainer.common.errors import DiskError


def user_cache() -> Path:
    """Where imported models and prepared data are kept: $XDG_CACHE_HOME/qlora-trainer, else ~/.cache/qlora-trainer."""
    if root := os.environ.get("XDG_CACHE_HOME"):
        return Path(root) / "qlora-trainer"
    try:
        return Path.home() / ".cache" / "qlora-trainer"
    except RuntimeError as error:  # a container's user that no list of users names
        raise DiskError("This user has no home. Set HOME or XDG_CACHE_HOME to a folder that can be written.") from error
