"""Prepare small files of rows for a test, with a tiny tokenizer and a cache of the test's own."""

import json
from pathlib import Path

from data_files import write_file
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.config.data_schema import DataConfig
from qlora_trainer.data.preparation.prepare import prepare

TOKENIZER = tiny_tokenizer("smollm2")


def row(question: str, answer: str) -> dict:
    return {"question": question, "answer": answer}


def write(tmp_path: Path, name: str, rows: list[dict]) -> str:
    return str(write_file(tmp_path, name, "".join(json.dumps(r) + "\n" for r in rows)))


def run(
    tmp_path: Path, train, *, tokenizer=TOKENIZER, seed=0, max_positions=None, vocab_size=None, progress=None, **data
):
    settings = {"eval": 0.0, "max_length": 128} | data
    return prepare(
        DataConfig(train=train, **settings),
        tokenizer,
        max_positions=max_positions,
        seed=seed,
        cache_dir=tmp_path / "cache",
        vocab_size=vocab_size,
        **({"progress": progress} if progress else {}),
    )


def stores(tmp_path: Path) -> list[Path]:
    """Everything in the cache, remembered digests of files left aside."""
    return [entry for entry in (tmp_path / "cache").iterdir() if entry.name != "digests"]


ROWS = [row(f"question {n}", f"answer {n}") for n in range(40)]


def as_lists(examples) -> list[tuple[list[int], list[int]]]:
    return [(examples[i].input_ids, examples[i].labels) for i in range(len(examples))]


BAD_ROWS = [ROWS[0], {"question": "q1"}, ROWS[1], {"question": 5, "answer": "a"}, {"question": "q2"}, ROWS[2]]
