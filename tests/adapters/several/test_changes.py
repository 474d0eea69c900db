"""What is replaced in a model is noted, put back without a trace, and done again."""

from typing import Any

import pytest
import torch
from torch import nn

from qlora_trainer.adapters.several.changes import apply, changes_made, undo


def model() -> Any:
    return nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))


def test_all_that_is_replaced_is_put_back_and_done_again() -> None:
    net = model()
    x = torch.ones(2, 4)
    tree = str(net)
    inner = net[1]

    def make() -> None:
        net[0] = nn.Identity()
        inner[0].bias = nn.Parameter(torch.full((4,), 3.0))
        inner.forward = lambda x: nn.Sequential.forward(inner, x) + 1.0
        net.register_buffer("more", torch.ones(1))
        inner.register_forward_pre_hook(lambda module, given: (2.0 * given[0],))
        inner.register_forward_hook(lambda module, given, named, output: output - 1.0, with_kwargs=True)

    net[1].register_forward_hook(lambda module, given, output: output + 1.0)
    before = net(x)
    changes = changes_made(net, make)
    named = {change.name for change in changes if isinstance(change.name, str)}
    assert named == {"0", "bias", "forward", "more"}
    assert torch.equal(net(x), before)
    for _ in range(2):
        apply(changes)
        assert not torch.equal(net(x), before)
        assert isinstance(net[0], nn.Identity)
        assert "more" in dict(net.named_buffers())
        undo(changes)
        assert torch.equal(net(x), before)
        assert str(net) == tree
        assert "more" not in dict(net.named_buffers())
        assert "forward" not in vars(inner)


def test_a_function_that_fails_halfway_leaves_the_model_as_it_was() -> None:
    net = model()
    first = net[0]

    def make() -> None:
        net[0] = nn.Identity()
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        changes_made(net, make)
    assert net[0] is first
