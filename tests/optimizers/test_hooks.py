"""Closures and hooks around a step."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import each, known_warnings, make, parameters, train, weights

pytestmark = known_warnings


@each
def test_closure(name: str) -> None:
    (p,) = parameters(shapes=[(3,)])
    optimizer = make(name, [p])
    before = weights([p])

    def closure() -> float:
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss  # type: ignore[return-value] # as everyone writes it

    expected = p.square().sum().item()
    with torch.no_grad():
        loss = optimizer.step(closure)
        assert not torch.is_grad_enabled()
    assert loss is not None
    assert torch.as_tensor(loss).item() == expected
    optimizer.step(closure)  # SOAP's first gradient makes state
    assert not torch.equal(p, before[0])
    p.grad = None
    assert optimizer.step() is None


@each
def test_step_hooks(name: str) -> None:
    (p,) = parameters(shapes=[(3,)])
    optimizer = make(name, [p])
    seen: list[tuple[str, Tensor]] = []
    pre = optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", p.detach().clone())))
    post = optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("post", p.detach().clone())))
    before = weights([p])[0]
    train(optimizer, [0])
    assert [kind for kind, _ in seen] == ["pre", "post"]
    assert torch.equal(seen[0][1], before)
    assert torch.equal(seen[1][1], p)
    pre.remove()
    post.remove()
    train(optimizer, [1])
    assert len(seen) == 2
