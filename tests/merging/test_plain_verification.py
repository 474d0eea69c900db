"""Promises of the check by plain transformers: a merged directory that asks, answers or stops otherwise is refused."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from marks import slow_but
from spying import noting
from tiny_models import make_model_directory
from tiny_tokenizers import tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from qlora_trainer.common.errors import DtypeRangeError, MergeError
from qlora_trainer.config.load import make_config
from qlora_trainer.merging import fold, plain_check, plain_verification
from qlora_trainer.merging.check_prompts import CheckPrompt
from qlora_trainer.merging.merge_run import Deployment, merge_run
from qlora_trainer.merging.plain_verification import PlainCheckInputs
from qlora_trainer.merging.verify import PlainAgreement
from qlora_trainer.model.forward import LossPath
from qlora_trainer.runs.start import start_run
from qlora_trainer.runs.trained import evaluate_trained, open_trained

Spoil = Callable[[Callable[[Path], object]], None]
PAIRS = {"one": "a dog", "two": "the fox", "three": "black quartz", "four": "seven wizards"}


def quiet(record: dict[str, Any]) -> None:
    """A display that shows nothing."""


def chatml_base(directory: Path) -> Path:
    """A base as Qwen2.5's: its texts end with <|endoftext|>, and its template ends turns with <|im_end|>."""
    make_model_directory(directory, "qwen2")
    tokenizer = tiny_tokenizer("qwen2_5")
    tokenizer.save_pretrained(directory)
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    settings |= {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((directory / name).read_text())
        content |= {"eos_token_id": end, "bos_token_id": end, "pad_token_id": end}
        (directory / name).write_text(json.dumps(content))
    return directory


def pairs_file(path: Path) -> str:
    rows = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        for asked, answer in PAIRS.items()
    ]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    return str(path)


def trained(folder: Path, steps: int, make_base: Callable[[Path], Path] = chatml_base) -> Path:
    """Train a run in a folder, with its base, rows and cache; return the run directory."""
    rows = pairs_file(folder / "pairs.jsonl")
    config = make_config(
        {
            "model": {"name": str(make_base(folder / "base")), "device": "cpu"},
            "adapter": {"rank": 16},
            "data": {"train": rows, "eval": rows, "max_length": 128},
            "optimizer": {"learning_rate": 1e-2, "schedule": "constant"},
            "training": {"output_dir": str(folder / "run"), "global_batch_size": 4, "max_steps": steps},
            "evaluation": {"samples": 0, "max_new_tokens": 20},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        assert start_run(config).train(quiet)
    return folder / "run"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("chatml"), steps=2)


def agreement(done: Deployment) -> PlainAgreement:
    assert done.report.verification is not None
    assert done.report.verification.plain is not None
    return done.report.verification.plain


@pytest.mark.slow
@pytest.mark.fresh_process
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_base_taught_chatml_stops_in_plain_transformers_with_the_exact_match_of_evaluate(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    run_dir = trained(tmp_path, steps=150)
    assert evaluate_trained(open_trained(run_dir), -1)["exact_match"] == 1.0
    done = merge_run(run_dir, tmp_path / "merged", dtype=dtype)
    assert (agreement(done).prompts, agreement(done).stopped) == (4, 4)

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for asked, answer in PAIRS.items():
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        given = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0][prompt["input_ids"].shape[1] :]
        assert tokenizer.decode(given, skip_special_tokens=True) == answer
        assert tokenizer.convert_ids_to_tokens(int(given[-1])) == "<|im_end|>"


@pytest.mark.fresh_process
def test_a_fresh_process_renders_answers_and_stops_as_evaluate(run_dir: Path, tmp_path: Path) -> None:
    """What else the directory has is byte for byte the base's."""
    done = merge_run(run_dir, tmp_path / "merged", base="dequantized")
    found = agreement(done)
    assert (found.prompts, found.dtype, found.left_out) == (4, "float16", 0)
    assert found.tokens >= 4
    assert "4 answers are those of base + adapter" in str(found)
    assert len(done.report.changes) == 1
    assert "<|im_end|>" in done.report.changes[0]
    check_what_others_read(tmp_path / "merged", [397, 399])
    for path in (run_dir.parent / "base").iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors"):
            assert (tmp_path / "merged" / path.name).read_bytes() == path.read_bytes(), path.name


def base_without_template(directory: Path) -> Path:
    """A base whose tokenizer begins texts with a token, and has no chat template."""
    make_model_directory(directory)
    (directory / "chat_template.jinja").unlink(missing_ok=True)
    tiny_tokenizer("llama3", adds_bos=True, template="").save_pretrained(directory)
    rewrite(directory, "tokenizer_config.json", lambda content: content.update(chat_template=None))
    return directory


def check_what_others_read(directory: Path, stops: list[int]) -> None:
    """By the rules of llama.cpp's converter and of vLLM: ids that the embedding has, a template, a list of stops."""
    rows = json.loads((directory / "config.json").read_text())["vocab_size"]
    added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    assert all(token["id"] < rows for token in added)
    vocabulary = gguf.SpecialVocab(directory)
    assert vocabulary.chat_template == AutoTokenizer.from_pretrained(directory).chat_template
    assert vocabulary.special_token_ids["eos"] in stops
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == stops
    assert all(stop < rows for stop in stops)


def test_the_plain_format_that_was_taught_is_in_the_merged_model(tmp_path: Path) -> None:
    done = merge_run(trained(tmp_path, 1, base_without_template), tmp_path / "merged", base="dequantized")
    assert agreement(done).prompts == 4
    changed = [change.partition(":")[0] for change in done.report.changes]
    assert changed == ["generation_config.json", "tokenizer_config.json", "chat_template.jinja"]
    assert not [warning for warning in done.warnings if "server" in warning]  # it asks as training does
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    asked = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
    assert text == "<|begin_of_text|>### Instruction:\nHi\n\n### Response:\n"
    check_what_others_read(tmp_path / "merged", [2, tokenizer.eos_token_id])


def rewrite(directory: Path, name: str, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((directory / name).read_text())
    change(content)
    (directory / name).write_text(json.dumps(content))


def other_template(directory: Path) -> None:
    path = directory / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|im_start|>assistant", "<|im_start|>model"))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "stops": (
        lambda directory: rewrite(directory, "generation_config.json", lambda c: c.update(eos_token_id=397)),
        r"stops at the tokens \[397\] in plain transformers, and evaluate at \[397, 399\]",
    ),
    "no stops": (lambda directory: (directory / "generation_config.json").write_text("{}"), r"tokens \[\]"),
    "template": (other_template, r"does not give the prompt of .*pairs\.jsonl, line \d.* has '<\|im_start\|>|has 'm"),
    "no template": (lambda directory: (directory / "chat_template.jinja").unlink(), "chat_template"),
    "added token": (
        lambda directory: rewrite(directory, "tokenizer.json", lambda c: c["added_tokens"].__delitem__(slice(1, None))),
        r"does not give the prompt of .*pairs\.jsonl",
    ),
}


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Spoil:
    """Have a merged directory changed when its files have been verified."""
    right = fold.verify_files

    def install(change: Callable[[Path], object]) -> None:
        monkeypatch.setattr(fold, "verify_files", noting(right, lambda work, *rest: change(work)))

    return install


@pytest.mark.parametrize("fault", slow_but(FAULTS, "stops", "template"))
def test_a_directory_that_asks_or_stops_otherwise_is_refused_and_the_row_named(
    fault: str, run_dir: Path, tmp_path: Path, spoil: Spoil
) -> None:
    change, message = FAULTS[fault]
    spoil(change)
    with pytest.raises((MergeError, ValueError), match=message):
        merge_run(run_dir, tmp_path / "merged", base="dequantized")
    assert not (tmp_path / "merged").exists()


def test_a_model_that_does_not_fit_is_read_without_weights_and_streamed(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Spoil
) -> None:
    monkeypatch.setattr(plain_verification, "PROCESS_BYTES", 2**60)
    monkeypatch.setattr(plain_check, "answer", lambda *args: pytest.fail("the weights were loaded"))
    found = agreement(merge_run(run_dir, tmp_path / "merged", base="dequantized"))
    assert (found.prompts, found.dtype) == (4, None)
    assert found.tokens >= 4
    assert "reading all but the weights" in str(found)
    spoil(FAULTS["stops"][0])
    with pytest.raises(MergeError, match=FAULTS["stops"][1]):
        merge_run(run_dir, tmp_path / "other", base="dequantized")


def inputs_for(model: Any, prompts: list[CheckPrompt], limit: int, stops: list[int]) -> PlainCheckInputs:
    return PlainCheckInputs(prompts, stops, 0, limit, LossPath(), str, lambda: model, lambda directory: model)


def test_streamed_answers_are_those_of_plain_generation_whatever_is_guessed(tiny_llama: Path) -> None:
    """As many tokens as passes, or all of them where the guess is right."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    prompts = [[5, 6, 7, 8], [9, 10]]
    expected, _ = plain_check.answer(model, prompts, [], 12)
    stop = expected[1][5]
    expected, _ = plain_check.answer(model, prompts, [stop], 12)
    for guess, least in (([], 4), ([3, 3], 4), (None, 12)):
        asked = [
            CheckPrompt("row", prompt, {}, answer if guess is None else answer[:1] + guess)
            for prompt, answer in zip(prompts, expected, strict=True)
        ]
        found = plain_verification.answer_streamed(model, inputs_for(model, asked, 12, [stop]))
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == theirs[: len(ours)]
            assert len(ours) >= min(least, len(theirs))


def with_other_token(change: Callable[[list[int]], list[int]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def run(job: dict[str, Any]) -> dict[str, Any]:
        found = plain_check.check(job)
        found["answers"] = [change(answer) for answer in found["answers"]]
        return found

    return run


def test_another_token_is_a_tie_the_dtypes_arithmetic_or_a_failure_that_names_the_row(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = with_other_token(lambda answer: [*answer[:2], answer[2] ^ 1] if len(answer) > 2 else answer)
    monkeypatch.setattr(plain_verification, "run_job", other)
    with pytest.raises(MergeError, match=r"the prompt of pairs\.jsonl, line \d, token 3 of its answer is .* nats"):
        merge_run(run_dir, tmp_path / "merged", base="dequantized")
    monkeypatch.setattr(plain_verification, "ARITHMETIC_NATS", {"float16": 100.0})
    found = agreement(merge_run(run_dir, tmp_path / "arithmetic", base="dequantized"))
    assert found.ties == 0
    assert found.by_arithmetic >= 1
    assert "by the arithmetic of float16" in str(found)
    monkeypatch.setattr(plain_verification, "TIE_NATS", 100.0)
    tied = agreement(merge_run(run_dir, tmp_path / "tied", base="dequantized"))
    assert (tied.ties, tied.by_arithmetic) == (found.by_arithmetic, 0)


def test_values_that_are_not_finite_in_the_dtype_alone_are_refused_or_written_in_bfloat16(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As attention scores may be, which no module gives or takes."""

    def overflowing(job: dict[str, Any]) -> dict[str, Any]:
        found = plain_check.check(job)
        return found | ({"not_finite": "the output of model.layers.1"} if found["dtype"] == "float16" else {})

    monkeypatch.setattr(plain_verification, "run_job", overflowing)
    with pytest.raises(DtypeRangeError, match=r"in float16, .* model\.layers\.1\. Merge with --dtype bfloat16"):
        merge_run(run_dir, tmp_path / "merged", base="dequantized", dtype=torch.float16)
    done = merge_run(run_dir, tmp_path / "merged", base="dequantized")
    assert done.report.dtype == "bfloat16"
    assert "in bfloat16, as no --dtype was named" in done.warnings[-1]
    assert agreement(done).dtype == "bfloat16"


@pytest.mark.fresh_process
@pytest.mark.parametrize(
    ("code", "printed", "message"),
    [(1, "Traceback\nValueError: no such key\n", "cannot use the merged model: ValueError: no such key"), (-9, "", "")],
)
def test_a_process_that_fails_is_reported_and_one_that_is_killed_is_run_without_the_weights(
    code: int, printed: str, message: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[:2] == [sys.executable, "-P"]
        jobs.append(json.loads(Path(command[3]).read_text()))
        if jobs[-1]["with_weights"]:
            return subprocess.CompletedProcess(command, code, stderr=printed)
        Path(command[4]).write_text(json.dumps(plain_check.check(jobs[-1])))
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(plain_verification.subprocess, "run", run)
    if message:
        with pytest.raises(MergeError, match=message):
            merge_run(run_dir, tmp_path / "merged", base="dequantized")
        return
    assert agreement(merge_run(run_dir, tmp_path / "merged", base="dequantized")).dtype is None
    assert [job["with_weights"] for job in jobs] == [True, False]


def test_the_program_of_the_check_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(plain_check.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert not any(str(name).startswith("qlora") for name in imported)
    assert "transformers" in imported
