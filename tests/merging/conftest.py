"""A run to merge, made once."""

import pytest
from merge_runs import LLAMA, Run, make_base, train
from transformers import LlamaConfig


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trained run whose base is tied and sharded."""
    config = LlamaConfig(**LLAMA, tie_word_embeddings=True)
    return train(make_base(tmp_path_factory.mktemp("llama"), config, shard="200KB"))
