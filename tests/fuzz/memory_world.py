"""An optimizer and what a program may do to its weights, gradients, state and groups between two steps."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import lightning_optim

KINDS = ["SGD", "plain SGD", "AdamW", "AMSGrad", "adopted", "Muon"]
DTYPES = [torch.float32, torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.complex64]
SHAPES = [(4, 3), (4, 3), (3, 4), (5,), (5,), (), (2, 3, 2), (0,), (40, 30)]


class World:
    """An optimizer and its weights, made from a seed alone: two worlds of one seed differ in the engine only.

    Args:
        seed: Of the case.
        engine: That steps; None: the eager one, planned anew at every step.
    """

    def __init__(self, seed: int, engine: str | None) -> None:
        self.random = random.Random(seed)  # noqa: S311 # no secret
        self.generator = torch.Generator().manual_seed(seed)
        self.engine = engine
        self.params = [
            nn.Parameter(self.values(self.random.choice(SHAPES), self.random.choice(DTYPES)))
            for _ in range(self.random.randint(2, 5))
        ]
        self.names: list[str] = []
        self.kept: list[Any] = []  # what the program holds on to
        groups: list[dict[str, Any]] = [{"params": self.params[:1]}, {"params": self.params[1:], "lr": 0.05}]
        self.broken = False  # whether a tensor must not be touched any more
        name = self.name = self.random.choice(KINDS)
        clip: dict[str, Any] = {"max_grad_norm": 2.0} if self.random.random() < 0.3 else {}
        self.plain = name == "plain SGD" and not clip
        chosen = engine or "eager"
        if name == "Muon":
            for p in self.params:
                if p.is_complex():
                    p.data, p.grad = self.values(p.shape, torch.float32), None
            groups = [{"params": [p], "use_muon": p.ndim > 1} for p in self.params]
        if name == "adopted":
            self.optimizer: Any = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.1)
            self.adopted: Any = lightning_optim.adopt(self.optimizer, engine=chosen)
            self.step: Callable[[], None] = self.adopted.step
        else:
            self.adopted = None
            if name in ("SGD", "plain SGD"):
                momentum: dict[str, Any] = {"momentum": 0.9, "dampening": 0.5} if name == "SGD" else {}
                self.optimizer = lightning_optim.SGD(groups, lr=0.1, engine=chosen, **momentum, **clip)
            elif name == "Muon":
                self.optimizer = lightning_optim.Muon(groups, lr=0.1, engine=chosen, **clip)
            else:
                self.optimizer = lightning_optim.AdamW(
                    groups, lr=0.1, weight_decay=0.1, amsgrad=name == "AMSGrad", engine=chosen, **clip
                )
            self.step = self.optimizer.step

    def values(self, shape: Any, dtype: torch.dtype) -> Tensor:
        """Random numbers, none of them close to zero."""
        wide = torch.complex128 if dtype.is_complex else torch.float64
        x = torch.randn(tuple(shape), generator=self.generator, dtype=wide)
        return (torch.view_as_complex(torch.view_as_real(x).sign() + torch.view_as_real(x)) if dtype.is_complex
                else x.sign() + x).to(dtype)  # fmt: skip

    def give_gradients(self) -> None:
        for p in self.params:
            p.grad = None
            p.grad = self.values(p.shape, p.dtype)

    def stepper(self) -> Any:
        return (self.adopted or self.optimizer)._stepper

    def contents(self) -> list[Tensor]:
        """Copies of all that a step writes; counters by their numbers, whatever has them."""
        found = [p.detach() for p in self.params]
        for p in self.params:
            state = self.optimizer.state.get(p) or {}
            found += [v for name, v in sorted(state.items()) if name != "step" and isinstance(v, Tensor)]
            if state.get("step", "?") != "?":
                found.append(torch.tensor(float(state["step"])))
        return [t.clone() for t in found if is_whole(t)]

    def wanted(self) -> list[tuple[nn.Parameter, Tensor]]:
        """What plain SGD comes to, in float64, unless memory is shared."""
        shared = {"weight_where_another_lies", "weights_in_one_buffer", "gradient_over_weight"} & set(self.names)
        if not self.plain or shared:
            return []
        found = []
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None and is_whole(p) and is_whole(p.grad):
                    wide = torch.complex128 if p.is_complex() else torch.float64
                    p64, g64 = p.detach().to(wide), p.grad.to(wide) * (-1 if group["maximize"] else 1)
                    found.append((p, p64 - group["lr"] * (g64 + group["weight_decay"] * p64)))
        return found

    # -- what a program may do ----------------------------------------------------------------------------------

    def one(self) -> nn.Parameter:
        return self.random.choice(self.params)

    def slot(self) -> tuple[nn.Parameter, dict[str, Any], str] | None:
        """A slot of a random parameter."""
        p = self.one()
        state = self.optimizer.state.get(p)
        names = sorted(name for name, v in (state or {}).items() if name != "step" and isinstance(v, Tensor))
        return (p, state, self.random.choice(names)) if names else None

    def lookalike(self, t: Tensor) -> Tensor:
        """The same values in another guise."""
        t = t.detach()
        kind = self.random.randrange(9)
        if kind == 0:
            return t.clone()
        if kind == 1:
            return torch._neg_view(-t)
        if kind == 2 and t.is_complex():
            return t.conj().resolve_conj().conj()
        if kind == 3:
            big = torch.zeros(t.numel() + 7, dtype=t.dtype)
            offset = self.random.randrange(7)
            big[offset : offset + t.numel()] = t.reshape(-1)
            return big[offset : offset + t.numel()].view(t.shape)
        if kind == 4 and t.ndim == 2:
            return t.t().contiguous().t()
        if kind == 5:
            return torch.stack([t, t], -1)[..., 0]
        if kind == 6 and t.is_complex():
            return torch.view_as_complex(torch.view_as_real(t).clone())
        if kind == 7 and not t.is_complex():
            return torch.complex(t.to(torch.float32), -t.to(torch.float32)).conj().imag.to(t.dtype)
        if kind == 8 and not t.is_complex():
            z = torch.complex(t.double(), -t.double()).conj()
            return z.imag if t.dtype == torch.float64 else t.clone()
        return t.clone()

    def weight_in_another_guise(self) -> None:
        p = self.one()
        p.data = self.lookalike(p)

    def weight_conjugated(self) -> None:
        p = self.one()
        if p.is_complex():
            p.data = p.detach().resolve_conj().conj_physical().conj()

    def weight_of_another_type(self) -> None:
        p = self.one()
        if not p.is_complex():
            p.grad = None
            p.data = p.detach().to(self.random.choice([torch.float32, torch.float64, torch.bfloat16]))
            p.grad = self.values(p.shape, p.dtype)

    def weight_where_another_lies(self) -> None:
        p, q = self.one(), self.one()
        if p.dtype == q.dtype and p.numel() == q.numel():
            p.data = q.detach().reshape(p.shape)

    def weights_in_one_buffer(self) -> None:
        p, q = self.one(), self.one()
        if p.dtype == q.dtype:
            shift = self.random.randrange(3)
            size = max(p.numel(), q.numel() + shift)
            buffer = self.values((size + 1,), p.dtype)
            p.data = buffer[: p.numel()].view(p.shape)
            q.data = buffer[shift : shift + q.numel()].view(q.shape)

    def weight_expanded(self) -> None:
        p = self.one()
        if p.ndim and p.shape[0] > 1:
            p.data = p.detach()[:1].clone().expand(p.shape)

    def weight_swapped(self) -> None:
        p = self.one()
        other = nn.Parameter(self.lookalike(p)) if self.random.random() < 0.5 else None
        if other is None:
            data = self.values(p.shape, p.dtype)
            other = nn.Parameter(TwoTensor(data, data.clone()))
        other.grad = p.grad if type(other) is nn.Parameter else None
        p.grad = None
        torch.utils.swap_tensors(p, other)

    def weight_made_in_inference_mode(self) -> None:
        p = self.one()
        if type(p) is not nn.Parameter:
            return
        with torch.inference_mode():
            data = p.detach().clone()
        p.data = data
        self.broken = True  # as it cannot even be detached

    def weight_frozen(self) -> None:
        p = self.one()
        p.requires_grad_(self.random.random() < 0.5)

    def storage_resized(self) -> None:
        candidates = [p.detach() for p in self.params] + [p.grad for p in self.params if p.grad is not None]
        if (found := self.slot()) is not None:
            candidates.append(found[1][found[2]])
        t = self.random.choice(candidates)
        if type(t) is not Tensor or not t.numel() or not t.is_contiguous() or t.untyped_storage().nbytes() == 0:
            return
        kind = self.random.randrange(4)
        storage, whole = t.untyped_storage(), t.untyped_storage().nbytes()
        if kind < 2:
            storage.resize_(kind * whole // 2)
            self.broken = True
        elif kind == 2:
            storage.resize_(whole * 2)
        else:
            old = storage.clone()
            storage.resize_(0)
            storage.resize_(whole)
            storage.copy_(old)

    def gradient_in_another_guise(self) -> None:
        p = self.one()
        if p.grad is not None and type(p.grad) is Tensor:
            p.grad = self.lookalike(p.grad)

    def gradient_of_another_class(self) -> None:
        p = self.one()
        if type(p.grad) is Tensor:
            p.grad = TwoTensor(p.grad.contiguous().clone(), p.grad.contiguous().clone())

    def gradient_sparse(self) -> None:
        p = self.one()
        if p.ndim == 2 and not p.is_complex():
            p.grad = None
            p.grad = self.values(p.shape, p.dtype).to_sparse()

    def gradient_expanded(self) -> None:
        p = self.one()
        if p.ndim and p.shape[0] > 1:
            p.grad = None
            p.grad = self.values((1, *p.shape[1:]), p.dtype).expand(p.shape)

    def gradient_over_weight(self) -> None:
        p = self.one()
        buffer = self.values((p.numel() + 2,), p.dtype)
        p.grad = None
        p.data = buffer[1 : 1 + p.numel()].view(p.shape)
        shift = self.random.randrange(3)
        p.grad = buffer[shift : shift + p.numel()].view(p.shape)

    def gradient_shared(self) -> None:
        p, q = self.one(), self.one()
        if p.shape == q.shape and p.dtype == q.dtype:
            p.grad = q.grad

    def gradient_that_is_state(self) -> None:
        if (found := self.slot()) is not None:
            p, state, name = found
            if state[name].dtype == p.dtype and state[name].shape == p.shape:
                p.grad = state[name]

    def gradient_gone(self) -> None:
        self.one().grad = None

    def state_in_another_guise(self) -> None:
        if (found := self.slot()) is not None:
            _, state, name = found
            state[name] = self.lookalike(state[name])

    def state_of_another_type(self) -> None:
        if (found := self.slot()) is not None:
            _, state, name = found
            value = state[name]
            if not value.is_complex():
                state[name] = value.to(self.random.choice([torch.float32, torch.float64, torch.bfloat16, torch.int64]))

    def state_shared(self) -> None:
        a, b = self.slot(), self.slot()
        if a is not None and b is not None and a[1][a[2]].shape == b[1][b[2]].shape:
            a[1][a[2]] = b[1][b[2]]

    def state_overlapping(self) -> None:
        a, b = self.slot(), self.slot()
        if a is not None and b is not None and not (a[1] is b[1] and a[2] == b[2]):
            t, u = a[1][a[2]], b[1][b[2]]
            if t.dtype == u.dtype and t.shape == u.shape:
                buffer = self.values((t.numel() + 1,), t.dtype).abs().to(t.dtype)
                a[1][a[2]], b[1][b[2]] = buffer[1:].view(t.shape), buffer[:-1].view(u.shape)

    def state_that_is_weight(self) -> None:
        if (found := self.slot()) is not None:
            p, state, name = found
            if state[name].dtype == p.dtype and state[name].shape == p.shape and "sq" not in name:
                state[name] = p.detach()

    def state_gone(self) -> None:
        p = self.one()
        kind = self.random.randrange(4)
        if kind == 0:
            self.optimizer.state.pop(p, None)
        elif kind == 1 and p in self.optimizer.state:
            self.optimizer.state[p].clear()
        elif kind == 2 and (found := self.slot()) is not None:
            found[1][found[2]] = None
        elif (found := self.slot()) is not None:
            del found[1][found[2]]

    def state_copied(self) -> None:
        p = self.one()
        if p in self.optimizer.state:
            self.optimizer.state[p] = copy.deepcopy(self.optimizer.state[p])

    def state_that_cannot_be(self) -> None:
        if (found := self.slot()) is not None:
            p, state, name = found
            wrong: list[Any] = [
                "?", 3.0, torch.zeros(7), torch.empty(p.shape, device="meta"), torch.zeros(p.shape, dtype=torch.int32),
            ]  # fmt: skip
            if p.ndim == 2:
                wrong.append(torch.zeros(p.shape, dtype=p.dtype).to_sparse())
            state[name] = self.random.choice(wrong)

    def counter_in_another_guise(self) -> None:
        p, q = self.one(), self.one()
        state, other = self.optimizer.state.get(p) or {}, self.optimizer.state.get(q) or {}
        if isinstance(state.get("step"), Tensor) and isinstance(other.get("step"), Tensor):
            step = state["step"]
            guises = [
                float(step), int(step), step.clone(), step.double(), torch._neg_view(-step), step.reshape(1),
                torch.tensor(int(step)), other["step"], torch.stack([step, step])[1], "?", step.to_sparse(),
            ]  # fmt: skip
            state["step"] = self.random.choice(guises)

    def option_changed(self) -> None:
        group = self.random.choice(self.optimizer.param_groups)
        name = self.random.choice(["lr", "weight_decay", "maximize"])
        group[name] = {"lr": 0.01, "weight_decay": 0.3, "maximize": not group["maximize"]}[name]

    def momentum_switched(self) -> None:
        group = self.random.choice(self.optimizer.param_groups)
        if self.name == "SGD":
            group["momentum"] = 0.0 if group["momentum"] else 0.9

    def groups_reordered(self) -> None:
        self.optimizer.param_groups.reverse()

    def parameter_moved(self) -> None:
        groups = self.optimizer.param_groups
        a, b = self.random.sample(groups, 2) if len(groups) > 1 else (groups[0], groups[0])
        if len(a["params"]) > 1:
            b["params"].append(a["params"].pop())

    def reloaded(self) -> None:
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))

    def gradients_elsewhere(self) -> None:
        self.kept.append([p.grad for p in self.params])  # so that the next ones get new memory

    def mutate(self) -> None:
        name = self.random.choice(MUTATIONS)
        self.names.append(name)
        try:
            getattr(self, name)()
        except (RuntimeError, ValueError, TypeError):  # torch, or a load, has refused it
            self.names[-1] += " (refused)"


_NOT_MUTATIONS = {"values", "give_gradients", "stepper", "contents", "wanted", "one", "slot", "lookalike", "mutate"}
MUTATIONS = sorted(n for n, f in vars(World).items() if callable(f) and n[0] != "_" and n not in _NOT_MUTATIONS)


def is_whole(t: Tensor) -> bool:
    """Whether all of a tensor may be read."""
    if type(t) not in (Tensor, nn.Parameter) or t.layout != torch.strided or t.device.type != "cpu":
        return False
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    size = t.untyped_storage().nbytes()
    return not t.numel() or (t.storage_offset() + last + 1) * t.element_size() <= size
