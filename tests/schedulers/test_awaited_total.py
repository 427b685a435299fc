"""A total that was promised, and then came with a state."""

from __future__ import annotations

import torch

from lightning_optim import SGD, Cosine


def test_a_total_that_comes_with_the_state_is_awaited_no_longer() -> None:
    """So that a run which is resumed where nothing remains to be done leaves what the finished run left."""
    finished = Cosine(SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    finished.set_total_steps(1, filled=True)
    finished.optimizer.step()
    finished.step()
    resumed = Cosine(SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1))
    resumed.await_total()
    resumed.load_state_dict(finished.state_dict())
    assert not resumed.awaits_total
    assert resumed.state_dict() == finished.state_dict()
