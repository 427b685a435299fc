"""Steps that ask for evaluations of their accumulation window: SAM, line searches, and Sophia's second derivatives.

Lightning's own closure evaluates the last batch of a window only, and calls hooks and clips at every evaluation. Here
it is called once. Further evaluations repeat the recorded ``training_step`` calls, with nothing but a backward pass
after each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_optim.control.replay.products import Products
from lightning_optim.control.replay.window import Window, muted, replaced
from lightning_optim.stepping.evaluations import Asking, asks, request_of
from lightning_optim.stepping.shards import is_distributed
from lightning_optim.warnings import warn_once

#: Stands for the base class that comes after this one: a strategy of Lightning's, of either root.
_Strategy: Any = object


class Replays(_Strategy):
    """Answers the requests of steps by evaluating their window again, in automatic optimization.

    See :mod:`lightning_optim.stepping.evaluations`: SAM gets its second pass, line searches a closure over the whole
    window, Sophia the Hessian's products.

    Raises:
        ValueError: (in ``setup``) Something in the training does not go with such an optimizer.
    """

    #: Tells others that the strategy does so.
    replays_windows: ClassVar[bool] = True

    _window: Window | None = None
    _is_replaying = False

    # -- what a subclass may say differently --------------------------------------------------------------------

    def _forget_gradients(self, optimizer: Optimizer) -> None:
        """Drop gradients before a window is replayed."""
        optimizer.zero_grad(set_to_none=True)

    def _backward_again(self, loss: Tensor, optimizer: Optimizer) -> None:
        """The backward pass of a batch that is replayed, without Lightning's hooks."""
        if (scaler := self._loss_scaler()) is not None:
            loss = scaler.scale(loss)
        self.precision_plugin.backward(loss, self.lightning_module, optimizer)

    def _average(self, tensors: list[Tensor]) -> None:
        """Average tensors over all processes, each of which has them from its own part of the data."""

    @contextmanager
    def _without_reductions(self) -> Iterator[None]:
        """A context in which forward passes prepare no exchange of gradients between processes."""
        yield

    def _unscale_again(self, optimizer: Optimizer) -> Tensor | None:
        """Unscale the gradients of a replayed window; nonzero where some are not finite, None without a scaler."""
        if (scaler := self._loss_scaler()) is None:
            return None
        inverse = scaler._get_scale_async().double().reciprocal().float()
        found = scaler._unscale_grads_(optimizer, inverse, torch.zeros_like(inverse), False)
        flags = [flag.to(inverse.device) for flag in found.values()]
        return torch.stack(flags).sum() if flags else torch.zeros_like(inverse)

    # -- what Lightning calls -----------------------------------------------------------------------------------

    def setup(self, trainer: Any) -> None:
        """Set up as Lightning's own strategy does; refuse trainings that do not go with such optimizers."""
        super().setup(trainer)
        self._window = None
        if trainer.state.fn == "fit" and self.lightning_module.automatic_optimization:
            for optimizer in self.optimizers:
                if request_of(optimizer) is not None:
                    self._check_replay(optimizer, trainer)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate a batch, and record this if it may have to be repeated."""
        evaluate = partial(super().training_step, *args, **kwargs)
        if self._is_replaying or self._skips_backward() or not self._is_recording():
            return evaluate()
        if self._window is None:
            self._window = Window(self.lightning_module, self._loss_of, self._trained)
        trainer = self.lightning_module.trainer
        if trainer.fit_loop.epoch_loop.batch_idx % trainer.accumulate_grad_batches == 0:
            self._window.clear()  # as Lightning clears the gradients then
        return self._window.run(evaluate)

    def backward(self, closure_loss: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Differentiate, and note which gradients there are before and after it."""
        if (window := self._window) is None:
            return super().backward(closure_loss, *args, **kwargs)
        module = self.lightning_module
        stock = module.backward

        def backward(*args: Any, **kwargs: Any) -> None:
            window.before_backward()
            stock(*args, **kwargs)
            window.after_backward()

        with replaced(module, "backward", backward):  # called between the hooks, which may drop gradients
            return super().backward(closure_loss, *args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Step as Lightning's own strategy does, with the window evaluated as often as the optimizer needs it."""
        if not (asks(optimizer) and self.lightning_module.automatic_optimization):
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        try:
            output = closure()
        finally:
            window, self._window = self._window, None
        if window:
            window.end()
            self._warn_if_touched(optimizer, window)
        step = partial(super().optimizer_step, optimizer, lambda: output, model, **kwargs)
        if output is None and self._loss_scaler() is not None:
            return step()  # Lightning leaves the step out: without a loss there was nothing to scale
        answers = _Answers(self, optimizer, window)
        if request_of(optimizer) == "loss_and_gradient":
            with self._searching(optimizer, answers):
                return step()
        asking = cast(Asking, optimizer)
        try:
            asking.ask(answers)
            return step()
        finally:
            asking.abandon()  # puts weights back in their places, whatever was raised

    def teardown(self) -> None:
        """Forget what was recorded."""
        self._window = None
        super().teardown()

    # -- what callbacks call ------------------------------------------------------------------------------------

    def rescaling(self) -> AbstractContextManager[None]:
        """A context in which the window's gradients are multiplied: see :meth:`Window.rescaling`."""
        return nullcontext() if self._window is None else self._window.rescaling()

    # -- ours ---------------------------------------------------------------------------------------------------

    def _is_recording(self) -> bool:
        return self.lightning_module.automatic_optimization and any(map(asks, self.optimizers))

    def _skips_backward(self) -> bool:
        """Whether Lightning makes no backward passes, as while SWA renews the statistics of batch norms."""
        module = self.lightning_module
        return bool(module.automatic_optimization and module.trainer.fit_loop._skip_backward)

    def _trained(self) -> Iterator[Tensor]:
        return (p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"])

    def _warn_if_touched(self, optimizer: Optimizer, window: Window) -> None:
        if window.touched and self.is_global_zero:
            name = type(optimizer).__name__.removesuffix("Optim")
            warn_once(
                f"{self.strategy_name}: gradients were written to between a backward pass and the step (in "
                f"on_after_backward, say): further evaluations of {name} do not do so again, unless it was to drop "
                "them all; SAM's can be changed in on_before_optimizer_step"
            )

    def _loss_scaler(self) -> Any:
        scaler = getattr(self.precision_plugin, "scaler", None)
        return scaler if scaler is not None and scaler.is_enabled() else None

    def _loss_of(self, output: Any) -> Tensor | None:
        """The loss in what ``training_step`` returned, divided as Lightning divides it."""
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if not isinstance(loss, Tensor):
            return None
        return loss / self.lightning_module.trainer.accumulate_grad_batches

    def _replay(self, optimizer: Optimizer, window: Window) -> Tensor:
        self._forget_gradients(optimizer)
        return self._evaluate_again(window, partial(self._backward_again, optimizer=optimizer), self._unsynced)

    def _evaluate_again(
        self,
        window: Window,
        backward: Callable[[Tensor], None],
        between: Callable[[], AbstractContextManager[Any]] = nullcontext,
        held: MutableMapping[Tensor, Tensor] | None = None,
    ) -> Tensor:
        self._is_replaying = True
        try:
            with torch.enable_grad(), muted(self.lightning_module, "log", "log_dict"):
                return window.replay(backward, between, held)
        finally:
            self._is_replaying = False

    def _unsynced(self) -> AbstractContextManager[Any]:
        """The context without synchronization that Lightning uses for all batches of a window but the last."""
        return self.block_backward_sync() if hasattr(self, "block_backward_sync") else nullcontext()

    @contextmanager
    def _searching(self, optimizer: Optimizer, answers: _Answers) -> Iterator[None]:
        """A context in which ``optimizer.step`` gets a closure over the window in place of Lightning's."""
        own = optimizer.step

        def step(_: Optimizer, closure: Callable[[], Any] | None = None) -> Any:
            result = None if closure is None else closure()  # with Lightning's hooks
            if answers.window:
                answers.window.end()
            return own(answers.loss_and_gradient) if answers.is_left else result  # type: ignore[arg-type]

        with replaced(optimizer, "step", MethodType(step, optimizer)):
            yield

    def _check_replay(self, optimizer: Optimizer, trainer: Any) -> None:
        name, module = type(optimizer).__name__.removesuffix("Optim"), self.lightning_module
        for option in ("step_in_backward", "capture"):
            if value := getattr(self, option, False):
                raise ValueError(f"{name} with {option}={value!r}: its step evaluates the model; valid: {option}=False")
        if "dataloader_iter" in inspect.signature(module.training_step).parameters:
            raise ValueError(
                f"{name} with training_step(dataloader_iter), whose batches cannot be evaluated again; valid: "
                "training_step(batch) or training_step(batch, batch_idx)"
            )
        if request_of(optimizer) == "hessian_vector":
            self._check_curvature(optimizer, name)
        if request_of(optimizer) != "loss_and_gradient":
            return
        if trainer.gradient_clip_val or not self._is_stock(module, "configure_gradient_clipping"):
            what = "a configure_gradient_clipping of the module's own"
            if trainer.gradient_clip_val:
                what = f"gradient_clip_val={trainer.gradient_clip_val!r}"
            raise ValueError(
                f"{name} with {what}: along a clipped gradient its line search compares what is not of the same "
                f"function; valid: no clipping, or another optimizer than {name}"
            )
        if isinstance(optimizer, LBFGS) and self._loss_scaler() is not None:
            raise ValueError(
                f"torch's {name} with precision={trainer.precision!r}, which Lightning refuses; valid: "
                "lightning_optim.LBFGS, or precision='bf16-mixed'"
            )

    def _check_curvature(self, optimizer: Optimizer, name: str) -> None:
        if any(is_distributed(p) for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                f"{name} under {self.strategy_name}: it needs second derivatives, and the gathering and scattering of "
                "sharded parameters is differentiated once only; valid: strategy='in_graph_ddp', or 'in_graph'"
            )
        if not self._is_stock(self.lightning_module, "backward"):
            warn_once(
                f"{self.strategy_name}: the module has a backward() of its own, of which {name}'s second derivatives "
                "know nothing: they are of the loss that training_step returns"
            )


class _Answers:
    """Evaluates a window again for one step, as an :class:`~lightning_optim.stepping.evaluations.Evaluator`."""

    def __init__(self, strategy: Replays, optimizer: Optimizer, window: Window | None) -> None:
        self.window = window
        self._strategy, self._optimizer = strategy, optimizer
        # Lightning's closure has just made an evaluation, at the weights as they are.
        self._recorded = None if not window else window.loss

    @property
    def is_left(self) -> bool:
        """Whether gradients of the window are left, so that it can be evaluated again."""
        return bool(self.window) and self.window.is_left  # type: ignore[union-attr]

    @property
    def loss_scale(self) -> Tensor | None:
        """The scale of the loss scaler, if there is one."""
        scaler = self._strategy._loss_scaler()
        return None if scaler is None else scaler._get_scale_async()

    def gradient(self) -> None:
        """Replace the gradients of the window by those at the present weights."""
        if self.window and self.is_left:
            self._strategy._replay(self._optimizer, self.window)

    def loss_and_gradient(self) -> Tensor:
        """The mean loss of the window over all ranks, with unscaled gradients; infinite, if these are not finite."""
        assert self.window is not None  # noqa: S101
        if self._recorded is not None:
            loss, self._recorded = self._recorded, None
        else:
            loss = self._strategy._replay(self._optimizer, self.window)
            if (found := self._strategy._unscale_again(self._optimizer)) is not None:
                loss = torch.where(found.reshape(()) == 0, loss, torch.inf)
        # The same on all ranks, so that all of them search alike.
        return self._strategy.reduce(loss.clone(), reduce_op="mean")

    def hessian_vector(self, directions: Mapping[Tensor, Tensor]) -> dict[Tensor, Tensor]:
        """Products with the window's Hessian, averaged over all ranks; no hook of a backward pass is called."""
        products = Products(directions, self.loss_scale)
        if self.window and self.is_left:
            with self._strategy._without_reductions():
                self._strategy._evaluate_again(self.window, products.add, held=products.sums)
        found = products.result()
        self._strategy._average(list(found.values()))
        return found
