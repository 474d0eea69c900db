"""The user's cache is where the environment says, or an error names what to change."""

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_trainer.common.cache import user_cache
from qlora_trainer.common.errors import DiskError


def test_a_cache_behind_a_link_to_nowhere_is_refused_and_nothing_is_made_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a link to a disk that is not mounted: its folder would fill the disk that it hangs on."""
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "cache")
    for root in (tmp_path / "link", tmp_path / "link" / "below"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(root))
        with pytest.raises(DiskError, match=r"leads nowhere.*set XDG_CACHE_HOME to another folder"):
            user_cache()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache").symlink_to(tmp_path / "disk")
    with pytest.raises(DiskError, match="leads nowhere"):
        user_cache()
    (tmp_path / "disk").mkdir()
    assert user_cache() == tmp_path / ".cache" / "qlora-trainer"


@pytest.mark.parametrize("root", ["link", "a file", "/proc/1"])
def test_a_cache_that_cannot_be_written_ends_a_command_with_a_message(
    root: str,
    config_file: Path,
    qlora: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / root))
    code, _, error = qlora("train", config_file)
    assert code == 2
    assert "XDG_CACHE_HOME to another folder" in error
