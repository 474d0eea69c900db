"""Promises of the loss scale: the same gradient, torch's own rule of growth, and its value kept over a restart."""

import json
import math

import pytest
import torch
from torch import nn

from qlora_trainer.common.errors import CheckpointError
from qlora_trainer.training.flat import flatten_parameters
from qlora_trainer.training.loss_scale import GradScale


def test_loss_scaling_gives_the_same_gradient() -> None:
    weight = nn.Parameter(torch.randn(8))
    group = flatten_parameters([("weight", weight)], name="all", weight_decay=0.0)
    scaler = GradScale(enabled=True)
    scaler.scale((weight**3).sum()).backward()
    scaler.unscale_([group])
    (plain,) = torch.autograd.grad((weight**3).sum(), weight)
    assert torch.equal(group.grad, plain)


def test_loss_scale_follows_torch_amp() -> None:
    ours, theirs = GradScale(enabled=True, growth_interval=3), torch.amp.GradScaler("cpu", growth_interval=3)
    parameter = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    for bad in [False, False, True, False, False, False, True, True, False, False, False, False, False, False]:
        theirs.scale((parameter * (math.inf if bad else 1.0)).sum()).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()
        ours.update(bad)
        assert ours.value == theirs.get_scale()


def test_loss_scale_survives_a_restart_and_refuses_another_dtype() -> None:
    first = GradScale(enabled=True, growth_interval=2)
    first.update(True)
    first.update(False)
    second = GradScale(enabled=True, growth_interval=2)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    first.update(False)
    second.update(False)
    assert first.value == second.value == 2.0**16
    with pytest.raises(CheckpointError, match="compute_dtype"):
        GradScale(enabled=False).load_state_dict(first.state_dict())


def test_disabled_loss_scaling_is_the_identity() -> None:
    scaler, loss = GradScale(enabled=False), torch.ones(())
    assert scaler.scale(loss) is loss
    scaler.update(True)
    assert scaler.value == 1.0
