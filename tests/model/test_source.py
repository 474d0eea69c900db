"""Promises of finding a base: a directory, or a name on the hub, and a message for everything else."""

from pathlib import Path

import pytest

from qlora_trainer.common.errors import DiskError, FileMissingError, ModelError, QLoRATrainerError
from qlora_trainer.model.source import resolve_model


def test_each_kind_of_path_without_a_base_model_gets_its_own_message(tmp_path: Path) -> None:
    with pytest.raises(FileMissingError, match="no model at"):
        resolve_model(str(tmp_path / "nowhere"), None, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve_model(str(tmp_path / "empty"), None, tmp_path)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter\.init_from"):
        resolve_model(str(tmp_path / "adapter"), None, tmp_path)


def test_a_hub_name_that_cannot_be_fetched_ends_with_an_error_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(QLoRATrainerError, match="owner/model could not be fetched"):
        resolve_model("owner/model", None, tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        resolve_model("owner/model", None, tmp_path)


def test_a_download_that_breaks_off_ends_with_an_error_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    (library,) = {kind.__module__.split(".")[0] for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"}
    broken = __import__(library).ReadTimeout("nothing came for 10 seconds")
    assert not isinstance(broken, OSError)

    def breaks_off(*args: object, **kwargs: object) -> str:
        raise broken

    monkeypatch.setattr(huggingface_hub, "snapshot_download", breaks_off)
    with pytest.raises(ModelError, match="could not be fetched from the hub: ReadTimeout: nothing came"):
        resolve_model("owner/model", None, tmp_path)


def test_a_hub_cache_that_cannot_be_written_is_named_with_what_moves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", "/dev/null/hub")
    with pytest.raises(
        DiskError, match=r"^/dev/null/hub cannot be written: Not a directory\. Set HF_HOME to a writable folder"
    ):
        resolve_model("owner/model", None, tmp_path)


def test_a_name_that_is_neither_a_directory_nor_a_hub_name_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileMissingError, match="There is no directory my models/foo"):
        resolve_model("my models/foo", None, tmp_path)


def test_weights_in_other_formats_next_to_the_shards_are_not_fetched() -> None:
    from huggingface_hub.utils import filter_repo_objects

    from qlora_trainer.model.source import NOT_FETCHED, WEIGHT_FILES

    files = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja"]
    others = ["consolidated.safetensors", "original/params.json", "original/consolidated.00.pth", "onnx/config.json"]
    kept = filter_repo_objects(files + others, allow_patterns=[*WEIGHT_FILES], ignore_patterns=[*NOT_FETCHED])
    assert list(kept) == files
