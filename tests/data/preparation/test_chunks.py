"""Promises of making chunks: tokenizing in another thread changes nothing but the time."""

import threading
from collections.abc import Generator

import pytest
from marks import slow_but
from tiny_tokenizers import tiny_tokenizer

from qlora_trainer.common.errors import DataError
from qlora_trainer.config.schema import DataConfig
from qlora_trainer.data.preparation.chunks import Chunk, ChunkMaker, make_chunks
from qlora_trainer.data.preparation.record_groups import in_chunks

TOKENIZER = tiny_tokenizer("smollm2")
CONFIG = DataConfig(train="rows.jsonl", on_bad_row="skip", max_length=64)
RECORDS = [
    (f"rows.jsonl, line {n}", {"question": f"question {n}", "answer": "answer " * (n % 90)}) for n in range(1500)
]
BAD = ("rows.jsonl, line 1501", {"question": "no answer"})


def maker_of(config: DataConfig = CONFIG, tokenizer=TOKENIZER) -> ChunkMaker:
    return ChunkMaker(config, tokenizer, 64, None)


def jobs_of(records):
    return [(0, "auto", chunk) for chunk in in_chunks(records)]


def made(records, maker: ChunkMaker) -> list[Chunk]:
    return [chunk for _, chunk in make_chunks(jobs_of(records), maker)]


def one_after_another(records, maker: ChunkMaker) -> list[Chunk]:
    rendered = [maker.render(*job) for job in jobs_of(records)]
    return [maker.finish(one, maker.encode(one)) for one in rendered]


def as_lists(chunks: list[Chunk]) -> list[dict]:
    return [{**vars(chunk), "block": chunk.block.to_pylist()} for chunk in chunks]


@pytest.mark.parametrize("family", slow_but(["smollm2", "generation"], "smollm2"))
def test_chunks_are_those_made_one_after_another(family):
    tokenizer = tiny_tokenizer(family)
    own_text = ("rows.jsonl, line 1503", {"question": "What is <|im_end|>?", "answer": "<s> </s>"})
    records = [*RECORDS, BAD, ("rows.jsonl, line 1502", DataError("not JSON")), own_text, *RECORDS]
    expected = one_after_another(records, maker_of(tokenizer=tokenizer))
    assert len(expected) > 5
    assert as_lists(made(records, maker_of(tokenizer=tokenizer))) == as_lists(expected)
    skipped = [row for chunk in expected for row in chunk.skipped]
    assert [where for where, _ in skipped] == [BAD[0], "rows.jsonl, line 1502"]


def test_the_next_chunk_is_rendered_while_one_is_tokenized(monkeypatch):
    """Neither goes on before the other has begun: done one after another they would wait for ever."""
    maker, both = maker_of(), threading.Barrier(2, timeout=600)
    render, encode = maker.render, maker.encode
    rendered: list[object] = []

    def meeting_render(*job):
        if len(rendered) == 1:
            both.wait()
        rendered.append(job)
        return render(*job)

    def meeting_encode(one):
        if one.records[0] == RECORDS[0]:
            both.wait()
        return encode(one)

    monkeypatch.setattr(maker, "render", meeting_render)
    monkeypatch.setattr(maker, "encode", meeting_encode)
    assert sum(chunk.rows for chunk in made(RECORDS, maker)) == len(RECORDS)


def test_few_chunks_are_in_memory_at_once():
    taken, most = 0, 0

    def jobs():
        nonlocal taken
        for job in jobs_of(RECORDS * 3):
            taken += 1
            yield job

    for number, _ in enumerate(make_chunks(jobs(), maker_of())):
        most = max(most, taken - number)
    assert taken == len(jobs_of(RECORDS * 3)) > 12
    assert most == 3


def test_the_first_bad_row_is_the_error_whatever_comes_after_it():
    maker = maker_of(CONFIG.model_copy(update={"on_bad_row": "error"}))

    def failing():
        yield from jobs_of([*RECORDS, BAD, ("later", {"question": "no answer either"})])
        raise DataError("the file is cut off")

    with pytest.raises(DataError, match="line 1501"):
        list(make_chunks(failing(), maker))


def test_what_was_read_before_a_file_is_cut_off_is_made_and_then_it_is_the_error():
    def failing():
        yield from jobs_of(RECORDS)
        raise DataError("the file is cut off")

    chunks: list[Chunk] = []
    with pytest.raises(DataError, match="the file is cut off"):
        chunks.extend(chunk for _, chunk in make_chunks(failing(), maker_of()))
    assert sum(chunk.rows for chunk in chunks) == len(RECORDS)


def test_a_fault_while_tokenizing_is_raised_and_ends_the_thread(monkeypatch):
    maker = maker_of()

    def out_of_memory(_):
        raise MemoryError

    monkeypatch.setattr(maker, "encode", out_of_memory)
    with pytest.raises(MemoryError):
        made(RECORDS, maker)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokenizing")]


def test_stopping_early_ends_the_thread():
    chunks = make_chunks(jobs_of(RECORDS), maker_of())
    assert isinstance(chunks, Generator)
    next(chunks)
    assert [thread for thread in threading.enumerate() if thread.name.startswith("tokenizing")]
    chunks.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokenizing")]
