"""Find the user's cache directory, where imported models and prepared data are shared by all runs."""

import os
from pathlib import Path

from qlora_trainer.common.errors import DiskError


def user_cache() -> Path:
    """Find the directory for imported models and prepared data; it need not exist.

    Returns:
        $XDG_CACHE_HOME/qlora-trainer, or ~/.cache/qlora-trainer where that is not set.

    Raises:
        DiskError: neither variable is set, and the system knows no home directory of this user; or the directory is
            behind a link that leads nowhere, such as to a disk that is not mounted.
    """
    if root := os.environ.get("XDG_CACHE_HOME"):
        directory = Path(root) / "qlora-trainer"
    else:
        try:
            directory = Path.home() / ".cache" / "qlora-trainer"
        except RuntimeError as error:  # a container's user that is not in the system's list of users
            raise DiskError("This user has no home. Set HOME or XDG_CACHE_HOME to a writable folder.") from error
    for path in (directory, *directory.parents):
        if path.is_symlink() and not path.exists():
            raise DiskError(
                f"The cache {directory} is behind a link that leads nowhere: {path} leads to {path.readlink()}. Mount "
                "that disk, or set XDG_CACHE_HOME to another folder."
            )
    return directory
