"""Undoing steps after which the loss spikes: "undo the step, halve the learning rate, go on", within limits.

A step is judged by the loss of the next batch, before the step of that batch. If the loss spikes, weights, state and
statistics become what they were before the judged step's batch, the next batch is left out, and the learning rate is
multiplied, together with the learning rates that schedules keep. Decisions depend on the losses alone, so that ranks
that are given the same losses decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_optim.control.rollback.policy import Decision, UndoJudge, UndoPolicy
from lightning_optim.control.rollback.snapshots import Snapshots
from lightning_optim.control.rollback.step_snapshot import StepSnapshot
from lightning_optim.control.schedules.learning_rates import all_groups, multiply_learning_rates, with_inner
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.stepping.shards import is_distributed

__all__ = ["Decision", "Undo", "UndoJudge", "UndoPolicy", "snapshot_bytes", "why_not_undone"]


class Undo:
    """Snapshots of a training, taken and put back as a judge decides.

    The order of calls for each step: :meth:`begin_window` before the first forward pass; :meth:`judge` after the last
    one; after the backward pass either :meth:`wait`, the optimizer's step and :meth:`stepped`, or only :meth:`revert`.

    Args:
        judge: Decides what is done about each loss.
        module: The module. Its buffers are put back as well, and so are its parameters that are not the optimizer's,
            once they were seen to change.
        optimizer: The optimizer.
        more: Returns further tensors that a step changes, such as masters.
        schedules: Returns the schedules of the learning rate.

    Attributes:
        optimizer: The optimizer.

    Example:
        >>> import torch
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        >>> undo = Undo(UndoJudge(UndoPolicy()), layer, optimizer)
        >>> before = layer.weight.item()
        >>> for loss in (1.0, float("nan")):
        ...     undo.begin_window()
        ...     decision = undo.judge(loss, step=0)
        ...     if decision.leaves_out:
        ...         whole = undo.revert(decision)
        ...         continue
        ...     layer.weight.grad = torch.ones(1, 1)
        ...     undo.wait()
        ...     optimizer.step()
        ...     undo.stepped()
        >>> layer.weight.item() == before, optimizer.param_groups[0]["lr"]
        (True, 0.5)
        >>> undo.release()
    """

    def __init__(
        self,
        judge: UndoJudge,
        module: nn.Module,
        optimizer: Optimizer,
        more: Callable[[], Iterable[Tensor]] = tuple,
        schedules: Callable[[], Iterable[object]] = tuple,
    ) -> None:
        self._judge = judge
        self._module = module
        self.optimizer = optimizer
        self._schedules = schedules
        where = judge.policy.snapshots
        self._stepped = StepSnapshot(optimizer, more, where)
        # What a forward pass changes is copied before it, when the copy from before the last pass may still be needed.
        self._before = Snapshots(self._moving, where)
        self._now = Snapshots(self._moving, where)
        self._frozen: Any = WeakTensorKeyDictionary()
        self._moved: Any = WeakTensorKeyDictionary()

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return self._stepped.snapshots.nbytes + self._before.nbytes + self._now.nbytes

    def begin_window(self) -> None:
        """Copy what forward passes change, before the first one of a step."""
        if not self._judge.off:
            self._now.begin(background=False)

    def judge(self, loss: float | None, step: int, *, background: bool = True) -> Decision:
        """Decide about a loss and, where it is fine, begin to copy what the step at hand will change.

        Args:
            loss: See :meth:`UndoJudge.judge`.
            step: See :meth:`UndoJudge.judge`.
            background: Copy in the background; False if the backward pass changes weights.

        Raises:
            MemoryError: There is no room for the copy.
        """
        decision = self._judge.judge(loss, step)
        if self._judge.off:
            self.release()
        elif not decision.leaves_out:
            try:
                if self._judge.pending == 0:
                    self._before, self._now = self._now, self._before
                    self._stepped.begin(background=background)
                else:  # earlier steps may still be undone, and this one with them
                    self._stepped.extend()
            except MemoryError as error:
                parts = snapshot_bytes(self._module, self.optimizer)
                sums = " + ".join(f"{count / 2**20:.1f} of {part}" for part, count in parts.items())
                total = sum(parts.values()) / 2**20
                raise MemoryError(
                    f"undo: {error}. Its snapshots need {total:.1f} MiB = {sums} (buffers twice); "
                    "valid: undo={'snapshots': 'host'} for what is on CUDA, or undo=False"
                ) from error
        return decision

    def wait(self) -> None:
        """Wait until what a step changes is copied: the step may begin."""
        self._stepped.wait()

    def stepped(self) -> None:
        """Note that the step was made."""
        self._multiply(self._judge.stepped())

    def revert(self, decision: Decision) -> bool:
        """Put back the training as it was before the steps that are undone, and lower the learning rate.

        The caller drops the gradients.

        Returns:
            Whether the steps could be undone. A run that was resumed after a step has no copy from before it.
        """
        whole = self._stepped.taken or not decision.undone
        if not whole:
            self._judge.records[-1]["restored"] = False
        if decision.undone and self._stepped.taken:
            self._stepped.restore()
            self._before.restore()
        else:
            self._now.restore()
        self._multiply(decision.factor)
        return whole

    def release(self) -> None:
        """Free all buffers."""
        for snapshot in (self._stepped, self._before, self._now):
            snapshot.release()

    def _multiply(self, factor: float) -> None:
        if factor != 1.0:
            multiply_learning_rates(all_groups(self.optimizer), self._schedules(), factor)

    def _moving(self) -> list[Tensor]:
        """All buffers (batch norm's kernels do not raise version counters), and frozen weights seen to change."""
        stepped = {id(p): p for group in all_groups(self.optimizer) for p in group["params"]}
        # With FSDP2, a module's parameters are sometimes its shards and sometimes whole, temporary weights.
        frozen = () if any(map(is_distributed, stepped.values())) else self._module.parameters()
        for p in frozen:
            # Most frozen weights never change, and copies of them would waste memory.
            if not p.requires_grad and id(p) not in stepped:
                version = (p._version, p.data_ptr())
                if self._frozen.setdefault(p, version) != version:
                    self._moved[p] = True
        buffers = [buffer for buffer in self._module.buffers() if _is_writable(buffer)]
        return [*buffers, *self._moved.keys()]


def why_not_undone(optimizer: Optimizer) -> str | None:
    """Why steps of an optimizer cannot be undone, or None if they can.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> why_not_undone(torch.optim.SGD([weight], lr=0.1)) is None
        True
    """
    wraps = len(list(with_inner(optimizer))) > 1
    # RuleOptimizer's own `state_dict` only writes the state in another form.
    if type(optimizer).state_dict not in (Optimizer.state_dict, RuleOptimizer.state_dict) and not wraps:
        return f"{type(optimizer).__name__}, which keeps state elsewhere than in its state (it has its own state_dict)"
    return None


def snapshot_bytes(module: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Bytes that the snapshots of a training will need, by part; for sharded parameters, on each process.

    Args:
        module: The module; its buffers are copied twice.
        optimizer: Its state need not exist yet: see :func:`~lightning_optim.placement.footprint.footprint`.

    Raises:
        ValueError: The optimizer has no parameter that requires a gradient.

    Example:
        >>> from lightning_optim import AdamW
        >>> layer = nn.Linear(100, 10, bias=False)
        >>> snapshot_bytes(layer, AdamW(layer.parameters()))
        {'weights': 4000, 'state': 8004, 'buffers': 0}
    """
    from lightning_optim.placement.footprint import footprint

    needs = footprint(module, optimizer)
    buffers = 2 * sum(buffer.nbytes for buffer in module.buffers())
    return {"weights": needs.trained, "state": needs.state.bytes, "buffers": buffers}


def _is_writable(tensor: Tensor) -> bool:
    """Whether a tensor can be written: several elements of an expanded tensor share one place in memory."""
    return not any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
