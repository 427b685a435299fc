"""Printing a Program as Triton: kernels that update hundreds of tensors through tables of pointers."""

from __future__ import annotations

from typing import ClassVar

import torch

from lightning_optim.engines.base import Layout
from lightning_optim.engines.printer import Printer
from lightning_optim.engines.triton.prelude import CONTROL, PRELUDE
from lightning_optim.rules.program import Kind, Node, Pass, Program, Rate

TRITON_TYPES: dict[torch.dtype, str] = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
}

_COMMON = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "neg": "-{0}",
    "pow": "power({0}, {1})",
    "abs": "tl.abs({0})",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "floor": "tl.floor({0})",
    "tanh": "tanh({0})",
    "atan2": "atan2({0}, {1})",
    "sign": "sign({0})",
    "maximum": "maximum({0}, {1})",
    "minimum": "minimum({0}, {1})",
    "lerp": "lerp({0}, {1}, {2})",
    "gt": "({0} > {1})",
    "ge": "({0} >= {1})",
    "lt": "({0} < {1})",
    "le": "({0} <= {1})",
    "where": "tl.where({0} != 0, {1}, {2})",
}


class TritonPrinter(Printer):
    """Prints a module of Triton kernels.

    For each pass ``k`` over memory there are two, in the order of their launches:

    - ``scalars_k`` evaluates, for each tensor, the scalars that the pass reads, in float64. ``scalars_0`` is one
      program for all tensors: it also decides on unscaling, clipping and leaving the step out, and advances the
      counters. Later ones are one program for each tensor, which first adds up the partial sums of the pass before.
    - ``sweep_k`` is one program for each chunk of each tensor. A full chunk of aligned tensors takes a branch
      without masks, in which memory is read and written 16 bytes at a time.

    The kernels share these arrays in memory: ``pointers`` (a line of ``stride`` addresses for each tensor name, and one
    for the counters), ``numel``, ``groups`` and ``ids`` of each tensor, ``table`` (a line of :attr:`table_columns` for
    each param group), ``chunk_tensor`` and ``chunk_begin`` of each chunk, ``first_chunk`` of each tensor, ``work`` (the
    scalars of each tensor), ``partials`` (the sums of each chunk) and ``skip`` (whether the step is left out).

    Args:
        program: What to print.
        layout: The storage types.
        interpreted: For Triton's interpreter, whose conversion to bfloat16 truncates.
    """

    scalar_templates: ClassVar = {
        **_COMMON,
        "div": "{0} / {1}",
        "sqrt": "tl.sqrt({0})",
        "noise_key": "noise_key({0}, {1}, {2}, {3})",
        "sum": "{0}",
        "norm": "tl.sqrt({0})",
        "mean": "{0} / maximum({numel}.to(tl.float64), tl.full((), 1.0, tl.float64))",
    }
    numel: ClassVar[str] = "size"
    index: ClassVar[str] = "index"

    def __init__(self, program: Program, layout: Layout, *, interpreted: bool = False) -> None:
        super().__init__(program, layout)
        self.interpreted = interpreted
        self.real = TRITON_TYPES[layout.math]
        # The GPU's own float32 division and square root are approximate; torch's and C's are not.
        exact = layout.math == torch.float32
        self.element_templates = {  # type: ignore[misc] # what a class has once, an instance has by its math type
            **_COMMON,
            "div": "tl.math.div_rn({0}, {1})" if exact else "{0} / {1}",
            "sqrt": "tl.math.sqrt_rn({0})" if exact else "tl.sqrt({0})",
            "round_to": "round_{dtype}({0})",
            "stochastic_round": "stochastic_round({0}, {1}, {index})",
        }
        self.mask = False
        self.lanes = ""  # the mask of a kernel of scalars

    # -- the language -------------------------------------------------------------------------------------------

    def number(self, value: float, *, element: bool) -> str:
        """See :meth:`Printer.number`."""
        return f"tl.full((), {float(value)!r}, {self.real if element else 'tl.float64'})"

    def special(self, value: float, *, element: bool) -> str:
        """See :meth:`Printer.special`."""
        return f"tl.full((), float('{value}'), {self.real if element else 'tl.float64'})"

    def assign(self, name: str, expression: str, node: Node) -> str:
        """See :meth:`Printer.assign`."""
        if self.kind(node) == "bool":
            expression += f".to({self.real if node.rate == Rate.ELEMENT else 'tl.float64'})"
        return f"{name} = {expression}"

    def load(self, tensor: str, dtype: torch.dtype) -> str:
        """See :meth:`Printer.load`."""
        mask = ", mask=mask, other=0.0" if self.mask else ""
        return f"tl.load(p_{tensor} + index{mask}).to({self.real})"

    def store(self, tensor: str, dtype: torch.dtype, value: str) -> str:
        """See :meth:`Printer.store`."""
        mask = ", mask=mask" if self.mask else ""
        if self.interpreted and dtype == torch.bfloat16:
            value = f"round_bfloat16(({value}).to(tl.float32))"
        # A constant or a scalar is stored as a full block.
        block = f"({value} + tl.zeros((BLOCK,), {self.real}))" if not value.startswith("v") else value
        return f"tl.store(p_{tensor} + index, {block}.to({TRITON_TYPES[dtype]}){mask})"

    def load_scalar(self, tensor: str, dtype: torch.dtype) -> str:
        """See :meth:`Printer.load_scalar`."""
        return f"tl.load({self._address(tensor, dtype)}{self.lanes}).to(tl.float64)"

    def store_scalar(self, tensor: str, dtype: torch.dtype, value: str) -> str:
        """See :meth:`Printer.store_scalar`."""
        each = f"({value} + tl.zeros_like(size).to(tl.float64))" if not value.startswith("s") else value
        mask = self.lanes.replace(", other=0", "")
        return f"tl.store({self._address(tensor, dtype)}, {each}.to({TRITON_TYPES[dtype]}){mask})"

    def _address(self, tensor: str, dtype: torch.dtype) -> str:
        """The address of each tensor's number, in a kernel of scalars."""
        place = f"pointers + {self.program.tensors.index(tensor)} * stride + t"
        return f"tl.load({place}{self.lanes}).to(tl.pointer_type({TRITON_TYPES[dtype]}))"

    def widen(self, value: str) -> str:
        """See :meth:`Printer.widen`."""
        return f"{value}.to(tl.float64)"

    # -- the frame ----------------------------------------------------------------------------------------------

    def source(self) -> str:
        """See :meth:`Printer.source`."""
        parts = [f'"""{self.program.name}: generated by lightning-optim from the update rule."""', PRELUDE, CONTROL]
        for stage, sweep in enumerate(self.program.passes):
            parts += [self._first_scalars(sweep) if stage == 0 else self._scalars(stage, sweep)]
            parts += [self._sweep(stage, sweep)]
        return "\n\n".join(parts)

    @property
    def table_columns(self) -> list[str]:
        """The columns of the table, without ``grad_scale``, which the first kernel computes itself."""
        return [name for name in self.table_scalars if name != "grad_scale"]

    @property
    def width(self) -> int:
        """How many scalars ``work`` keeps for each tensor."""
        return max(len(self.work_slots), 1)

    def _statements(self, stage: int, sweep: Pass, mask: str) -> list[str]:
        """The statements that read a tensor's scalars, evaluate those of a pass, and keep them."""
        self.lanes = mask
        slots, previous = self.work_slots, self.reduced_before(stage)
        columns = {name: column for column, name in enumerate(self.table_columns)}

        def read(name: str) -> str:
            if name == "grad_scale":
                return "factor"
            if name in columns:
                return f"tl.load(table + group * {max(len(columns), 1)} + {columns[name]}{mask})"
            return {"step": "step", "tensor_id": "tensor_id"}[name]

        def place(index: int) -> str:
            return f"work + t * {self.width} + {slots[index]}"

        lines = [f"{self.name(i)} = tl.load({place(i)}{mask})" for i in self.earlier_scalars(sweep)]
        statements = self.scalar_statements(sweep, read=read, reduced=lambda index: f"r{previous.index(index)}")
        for index, statement in statements:
            lines += [statement, f"tl.store({place(index)}, {self.name(index)}{mask.replace(', other=0', '')})"]
        return lines + self.scalar_stores(sweep)

    def _counter(self, mask: str) -> list[str]:
        """The statements that find a tensor's counter, and read it."""
        counters = len(self.program.tensors)
        return [
            f"counter = tl.load(pointers + {counters} * stride + t{mask}).to(tl.pointer_type(tl.float32))",
            f"step = tl.load(counter{mask}).to(tl.float64)",
        ]

    def _first_scalars(self, sweep: Pass) -> str:
        """The kernel that begins a step."""
        steps = "step" in self.program.scalars
        mask = ", mask=mask, other=0"
        body = [
            "t = first + tl.arange(0, LANES)",
            "mask = t < n",
            f"group = tl.load(groups + t{mask})",
            f"size = tl.load(numel + t{mask})",
            f"tensor_id = tl.load(ids + t{mask}).to(tl.float64)",
        ]
        if steps:
            body += [
                *self._counter(mask),
                "step = next_step(step)",
                # A Program without stores uses the coming step, and leaves the counter as it is.
                *(["tl.store(counter, step.to(tl.float32), mask=mask)"] if self.program.stores else []),
            ]
        body += self._statements(0, sweep, mask)
        return "\n".join(
            [
                "@triton.jit(do_not_specialize=['n', 'stride', 'parts'])",
                "def scalars_0(pointers, numel, groups, ids, table, squares, loss_scale, found_inf, max_norm, work,",
                "              skip, n, stride, parts, CLIP: tl.constexpr, UNSCALE: tl.constexpr, CHECK: tl.constexpr,",
                "              SKIP: tl.constexpr, LANES: tl.constexpr, PARTS: tl.constexpr):",
                "    factor, leave = control(squares, parts, loss_scale, found_inf, max_norm, CLIP, UNSCALE, CHECK,",
                "                            SKIP, PARTS)",
                "    tl.store(skip, leave)",
                "    if leave == 0:",
                "        for first in range(0, n, LANES):",
                *(f"            {line}" for line in body),
                "",
            ]
        )

    def _scalars(self, stage: int, sweep: Pass) -> str:
        """The kernel between two passes: one program for each tensor."""
        count = len(self.reduced_before(stage))
        body = [
            "t = tl.program_id(0).to(tl.int64)",
            "group = tl.load(groups + t)",
            "size = tl.load(numel + t)",
            "tensor_id = tl.load(ids + t).to(tl.float64)",
            "begin = tl.load(first_chunk + t)",
            "end = tl.load(first_chunk + t + 1)",
            *(f"sums{k} = tl.zeros((LANES,), tl.float64)" for k in range(count)),
            "for start in range(begin, end, LANES):",
            "    chunk = start + tl.arange(0, LANES)",
            *(
                f"    sums{k} += tl.load(partials + chunk * {self.reductions} + {k}, mask=chunk < end, other=0.0)"
                for k in range(count)
            ),
            *(f"r{k} = tl.sum(sums{k}, axis=0)" for k in range(count)),
        ]
        if "step" in self.program.scalars:
            body += self._counter("") + ([] if self.program.stores else ["step = next_step(step)"])
        body += self._statements(stage, sweep, "")
        return "\n".join(
            [
                "@triton.jit(do_not_specialize=['stride'])",
                f"def scalars_{stage}(pointers, numel, groups, ids, table, first_chunk, partials, work, skip, stride,",
                "              LANES: tl.constexpr):",
                "    if tl.load(skip) == 0:",
                *(f"        {line}" for line in body),
                "",
            ]
        )

    def _sweep(self, stage: int, sweep: Pass) -> str:
        """The kernel that does one pass over memory."""
        store = stage == len(self.program.passes) - 1
        nodes, slots = self.program.nodes, self.work_slots
        accessed = self.accessed(sweep, store=store)
        types: dict[Kind, str] = {"number": self.real, "bool": self.real, "key": "tl.int64).to(tl.uint32"}
        head = [
            "c = tl.program_id(0).to(tl.int64)",
            "t = tl.load(chunk_tensor + c).to(tl.int64)",
            "begin = tl.multiple_of(tl.load(chunk_begin + c), 16)",
            "count = tl.load(numel + t) - begin",
        ]
        for tensor in accessed:
            head.append(f"a_{tensor} = tl.load(pointers + {self.program.tensors.index(tensor)} * stride + t)")
        for i in sweep.inputs:
            head.append(
                f"{self.name(i)} = tl.load(work + t * {self.width} + {slots[i]}).to({types[self.kind(nodes[i])]})"
            )
        sums = [f"sums{k}" for k in range(len(sweep.reductions))]
        head += [f"{total} = tl.zeros((BLOCK,), tl.float64)" for total in sums]
        together = " | ".join(f"a_{tensor}" for tensor in accessed) or "0"
        head.append(f"aligned = (({together}) & 15) == 0")
        body = ["if (count >= CHUNK) & aligned:"]
        for masked in (False, True):
            self.mask = masked
            for tensor in accessed:
                pointer = f"a_{tensor}.to(tl.pointer_type({TRITON_TYPES[self.dtypes[tensor]]}))"
                hinted = pointer if masked else f"tl.multiple_of({pointer}, 16)"
                body.append(f"    p_{tensor} = {hinted}")
            body += [
                f"    for offset in range(0, {'tl.minimum(count, CHUNK).to(tl.int32)' if masked else 'CHUNK'}, BLOCK):",
                "        lanes = offset + tl.arange(0, BLOCK)",
                "        index = begin + lanes",
                *(["        mask = lanes < count"] if masked else []),
            ]
            body += [f"        {line}" for line in self.element_statements(sweep, store=store)]
            for total, (_, value) in zip(sums, self.accumulated(sweep), strict=True):
                body.append(f"        {total} += " + (f"tl.where(mask, {value}, 0.0)" if masked else value))
            if not masked:
                body.append("else:")
        self.mask = False
        body += [f"tl.store(partials + c * {self.reductions} + {k}, tl.sum({s}, axis=0))" for k, s in enumerate(sums)]
        return "\n".join(
            [
                "@triton.jit(do_not_specialize=['stride'])",
                f"def sweep_{stage}(pointers, numel, chunk_tensor, chunk_begin, work, partials, skip, stride,",
                "            CHUNK: tl.constexpr, BLOCK: tl.constexpr):",
                "    if tl.load(skip) == 0:",
                *(f"        {line}" for line in head + body),
                "",
            ]
        )
