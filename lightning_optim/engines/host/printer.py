"""Printing a Program as C: one shared library with one function, ``lo_run``, for all tensors of a bucket."""

from __future__ import annotations

from typing import ClassVar

import torch

from lightning_optim.engines.printer import Printer
from lightning_optim.rules.program import Kind, Node, Pass, Rate

#: C types of the storage formats; bfloat16 is handled as its bits.
C_TYPES = {
    torch.float32: "float",
    torch.float64: "double",
    torch.float16: "_Float16",
    torch.bfloat16: "uint16_t",
}

#: C types of the values in the loop over elements. A bool is a `real`, 0 or 1, so that all vectors have one width.
_ELEMENT_TYPES: dict[Kind, str] = {"number": "real", "bool": "real", "key": "uint32_t"}

_HEADER = """\
#include <fenv.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

static inline float bits_to_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t float_to_bits(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }

/* bfloat16: the upper half of a float. Round to nearest even; a NaN stays a NaN (adding the rounding bias to its
   bits could carry it into an infinity or a finite number). */
static inline float load_bfloat16(uint16_t bits) { return bits_to_float((uint32_t)bits << 16); }
static inline uint16_t store_bfloat16(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return x != x ? (uint16_t)0x7fc0u : (uint16_t)rounded;
}
#define load_float32(x) (x)
#define store_float32(x) ((float)(x))
#define load_float64(x) (x)
#define store_float64(x) ((double)(x))
#define load_float16(x) ((float)(x))
#define store_float16(x) ((_Float16)(float)(x)) /* by way of float, as torch does */

/* Counting as lightning_optim/rules/counting.py has it. */
static inline double next_step(float step) {
  return step < 16777216.0f || !(step < INFINITY) ? (double)step + 1 : bits_to_float(float_to_bits(step) + 1);
}
static inline uint32_t step_word(double step) {
  return step < 16777216.0 ? (uint32_t)step : float_to_bits((float)step);
}

/* The rounding noise of lightning_optim/rules/rounding.py, bit for bit. */
static inline uint32_t hash32(uint32_t x) {
  x ^= x >> 16; x *= 0x7feb352du; x ^= x >> 15; x *= 0x846ca68bu; return x ^ (x >> 16);
}
static inline double noise_key(double seed, double id, double step, double salt) {
  return (double)hash32(hash32(hash32(hash32((uint32_t)seed) ^ (uint32_t)id) ^ step_word(step)) ^ (uint32_t)salt);
}
static inline float stochastic_round(float x, uint32_t key, uint64_t index) {
  const uint32_t noise = hash32((uint32_t)index ^ hash32((uint32_t)(index >> 32) + key));
  const uint32_t bits = float_to_bits(x);
  const uint32_t finite = (bits & 0x7f800000u) != 0x7f800000u;
  return bits_to_float(finite ? (bits + (noise & 0xffffu)) & 0xffff0000u : bits);
}
"""

_MATH = """\
typedef {real} real;
#define SQRT sqrt{f}
#define EXP exp{f}
#define LOG log{f}
#define POW pow{f}
#define ABS fabs{f}
#define FLOOR floor{f}
#define TANH tanh{f}
#define ATAN2 atan2{f}
static inline real sign(real x) {{ return (real)((x > 0) - (x < 0)); }}
static inline real lerp(real a, real b, real w) {{
  return ABS(w) < (real)0.5 ? a + w * (b - a) : b - (b - a) * (1 - w);
}}
static inline real maximum(real a, real b) {{ return a > b || a != a ? a : b; }}
static inline real minimum(real a, real b) {{ return a < b || a != a ? a : b; }}
static inline double scalar_sign(double x) {{ return (double)((x > 0) - (x < 0)); }}
static inline double scalar_lerp(double a, double b, double w) {{
  return fabs(w) < 0.5 ? a + w * (b - a) : b - (b - a) * (1 - w);
}}
static inline double scalar_maximum(double a, double b) {{ return a > b || a != a ? a : b; }}
static inline double scalar_minimum(double a, double b) {{ return a < b || a != a ? a : b; }}
"""

_COMMON = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "neg": "-{0}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "where": "{0} ? {1} : {2}",
}


class CPrinter(Printer):
    """Prints C that any C11 compiler with OpenMP takes.

    The library exports ``lo_run``, whose arguments are, for ``n`` tensors in ``chunks`` chunks:

    - ``data[field * n + t]``: addresses, fields in the order of the Program's tensors; ``numel[t]``;
      ``steps[t]``: address of the float32 counter, or ``steps`` NULL;
    - ``groups[t]``, ``ids[t]``, and ``table``: a line of :attr:`table_scalars` for each param group;
    - ``chunk_tensor[c]``, ``chunk_begin[c]``, ``chunk`` (elements of a full one), ``bounds[parts + 1]``: each of
      ``parts`` threads does its own run of chunks, so that memory stays with the thread that touched it, and then
      helps the others; what a chunk yields does not depend on who did it, nor when;
    - scratch: ``work`` (:attr:`width` scalars of each tensor, and after them eight words for each part), ``partials``
      (the reductions of each chunk);
    - ``results``: the Program's results, for each tensor.
    """

    scalar_templates: ClassVar = {
        **_COMMON,
        "pow": "pow({0}, {1})",
        "sqrt": "sqrt({0})",
        "abs": "fabs({0})",
        "exp": "exp({0})",
        "log": "log({0})",
        "floor": "floor({0})",
        "tanh": "tanh({0})",
        "atan2": "atan2({0}, {1})",
        "sign": "scalar_sign({0})",
        "maximum": "scalar_maximum({0}, {1})",
        "minimum": "scalar_minimum({0}, {1})",
        "lerp": "scalar_lerp({0}, {1}, {2})",
        "noise_key": "noise_key({0}, {1}, {2}, {3})",
        "sum": "{0}",
        "norm": "sqrt({0})",
        "mean": "{0} / ({numel} > 0 ? (double){numel} : 1.0)",
    }
    element_templates: ClassVar = {
        **_COMMON,
        "pow": "POW({0}, {1})",
        "sqrt": "SQRT({0})",
        "abs": "ABS({0})",
        "exp": "EXP({0})",
        "log": "LOG({0})",
        "floor": "FLOOR({0})",
        "tanh": "TANH({0})",
        "atan2": "ATAN2({0}, {1})",
        "sign": "sign({0})",
        "maximum": "maximum({0}, {1})",
        "minimum": "minimum({0}, {1})",
        "lerp": "lerp({0}, {1}, {2})",
        "round_to": "(real)load_{dtype}(store_{dtype}({0}))",
        "stochastic_round": "(real)stochastic_round({0}, {1}, {index})",
    }
    index: ClassVar = "(uint64_t)(begin + i)"

    def number(self, value: float, *, element: bool) -> str:
        """See :meth:`Printer.number`."""
        return f"((real){value!r})" if element else f"({value!r})"

    def special(self, value: float, *, element: bool) -> str:
        """See :meth:`Printer.special`."""
        return "NAN" if value != value else ("INFINITY" if value > 0 else "(-INFINITY)")

    def assign(self, name: str, expression: str, node: Node) -> str:
        """See :meth:`Printer.assign`."""
        ctype = _ELEMENT_TYPES[self.kind(node)] if node.rate == Rate.ELEMENT else "double"
        return f"const {ctype} {name} = {expression};"

    def load(self, tensor: str, dtype: torch.dtype) -> str:
        """See :meth:`Printer.load`."""
        return f"(real)load_{_suffix(dtype)}(p_{tensor}[i])"

    def store(self, tensor: str, dtype: torch.dtype, value: str) -> str:
        """See :meth:`Printer.store`."""
        return f"p_{tensor}[i] = store_{_suffix(dtype)}({value});"

    def load_scalar(self, tensor: str, dtype: torch.dtype) -> str:
        """See :meth:`Printer.load_scalar`."""
        return f"(double)load_{_suffix(dtype)}(*(const {C_TYPES[dtype]} *){self._address(tensor)})"

    def store_scalar(self, tensor: str, dtype: torch.dtype, value: str) -> str:
        """See :meth:`Printer.store_scalar`."""
        return f"*({C_TYPES[dtype]} *){self._address(tensor)} = store_{_suffix(dtype)}({value});"

    def _address(self, tensor: str) -> str:
        return f"data[{self.program.tensors.index(tensor)} * n + t]"

    def widen(self, value: str) -> str:
        """See :meth:`Printer.widen`."""
        return f"(double){value}"

    @property
    def width(self) -> int:
        """How many scalars ``work`` keeps for each tensor."""
        return max(len(self.work_slots), 1)

    def source(self) -> str:
        """See :meth:`Printer.source`."""
        real = {torch.float32: "float", torch.float64: "double"}[self.layout.math]
        parts = [
            f"/* {self.program.name}: generated by lightning-optim from the update rule */",
            _HEADER,
            _MATH.format(real=real, f="f" if real == "float" else ""),
        ]
        for stage, sweep in enumerate(self.program.passes):
            parts += [self._scalars(stage, sweep), self._sweep(stage, sweep)]
        parts.append(self._run())
        return "\n".join(parts)

    def _scalars(self, stage: int, sweep: Pass) -> str:
        """The function that evaluates, for one tensor, the scalars needed before a pass."""
        slots, previous = self.work_slots, self.reduced_before(stage)
        lines = [f"  const double {self.name(i)} = w[{slots[i]}];" for i in self.earlier_scalars(sweep)]
        table = {name: f"group[{column}]" for column, name in enumerate(self.table_scalars)}
        statements = self.scalar_statements(
            sweep,
            read=lambda name: table.get(name, name),
            reduced=lambda index: f"r[{previous.index(index)}]",
        )
        for index, statement in statements:
            lines += [f"  {statement}", f"  w[{slots[index]}] = {self.name(index)};"]
        lines += [f"  {statement}" for statement in self.scalar_stores(sweep)]
        return (
            f"static void scalars_{stage}(void *const *data, int64_t n, int64_t t, const double *group, double step,\n"
            "                      double tensor_id, int64_t numel, const double *r, double *w) {\n"
            "  (void)data; (void)n; (void)t; (void)group; (void)step; (void)tensor_id; (void)numel; (void)r; (void)w;\n"
            + "\n".join(lines)
            + "\n}\n"
        )

    def _sweep(self, stage: int, sweep: Pass) -> str:
        """The function that does one pass over one chunk."""
        store = stage == len(self.program.passes) - 1
        nodes, slots = self.program.nodes, self.work_slots
        lines = []
        for tensor in self.accessed(sweep, store=store):
            ctype = C_TYPES[self.dtypes[tensor]]
            const = "" if store and tensor in self.stored else "const "
            field = self.program.tensors.index(tensor)
            lines.append(f"  {const}{ctype} *restrict p_{tensor} = ({const}{ctype} *)data[{field} * n + t] + begin;")
        for i in sweep.inputs:
            ctype = _ELEMENT_TYPES[self.kind(nodes[i])]
            lines.append(f"  const {ctype} {self.name(i)} = ({ctype})w[{slots[i]}];")
        sums = [f"r{k}" for k in range(len(sweep.reductions))]
        if sums:
            lines.append(f"  double {', '.join(f'{s} = 0' for s in sums)};")
        body = self.element_statements(sweep, store=store)
        body += [f"{total} += {value};" for total, (_, value) in zip(sums, self.accumulated(sweep), strict=True)]
        clause = f" reduction(+:{', '.join(sums)})" if sums else ""
        if body:
            lines += [f"#pragma omp simd{clause}", "  for (int64_t i = 0; i < count; ++i) {"]
            lines += [f"    {line}" for line in body] + ["  }"]
        lines += [f"  r[{k}] = {total};" for k, total in enumerate(sums)]
        return (
            f"static void sweep_{stage}(void *const *data, int64_t n, int64_t t, int64_t begin, int64_t count,\n"
            "                    const double *w, double *r) {\n"
            "  (void)data; (void)n; (void)t; (void)begin; (void)count; (void)w; (void)r;\n" + "\n".join(lines) + "\n}\n"
        )

    def _run(self) -> str:
        """The exported function."""
        width = self.width
        columns = max(len(self.table_scalars), 1)
        # The threads' places are not on the stack, whose size must not depend on the number of threads. All threads
        # flush denormal numbers if the calling thread does, where alone torch sets this: a chunk's result must not
        # depend on which thread computed it.
        lines = [f"  int64_t *const next = (int64_t *)(work + {width} * n);  /* of each part; a cache line apart */"]
        lines += ["  fenv_t callers;", "  if (parts > 1) fegetenv(&callers);"]
        for stage, sweep in enumerate(self.program.passes):
            previous = self.reduced_before(stage)
            lines += [
                "  for (int64_t t = 0, c = 0; t < n; ++t) {",
                f"    double r[{max(len(previous), 1)}] = {{0}};",
            ]
            if previous:
                # Chunks of a tensor follow one another; summing them in order is deterministic.
                lines += [
                    "    for (; c < chunks && chunk_tensor[c] == t; ++c)",
                    f"      for (int k = 0; k < {len(previous)}; ++k) r[k] += partials[c * {self.reductions} + k];",
                ]
            # A Program without stores uses the coming step, and leaves the counter as it is.
            stores = bool(self.program.stores)
            counted = "next_step(*steps[t])" if stage == 0 or not stores else "(*steps[t])"
            lines += [
                f"    const double step = steps ? {counted} : 0;",
                *(["    if (steps) *steps[t] = (float)step;"] if stage == 0 and stores else []),
                f"    scalars_{stage}(data, n, t, table + {columns} * groups[t], step, (double)ids[t], numel[t], r,",
                f"              work + {width} * t);",
                "    (void)c;",
                "  }",
            ]
            if sweep.elements or (stage == len(self.program.passes) - 1 and self.stored):
                lines += [
                    "  for (int part = 0; part < parts; ++part) next[8 * part] = bounds[part];",
                    "#pragma omp parallel for schedule(static, 1) num_threads(parts) if (parts > 1)",
                    "  for (int part = 0; part < parts; ++part) {",
                    "    fenv_t own;",
                    "    if (parts > 1) { fegetenv(&own); fesetenv(&callers); }",
                    "    for (int k = 0; k < parts; ++k) {",
                    "      const int from = (part + k) % parts;",
                    "      int64_t c;",
                    "      while ((c = __atomic_fetch_add(&next[8 * from], 1, __ATOMIC_RELAXED)) < bounds[from + 1]) {",
                    "        const int64_t t = chunk_tensor[c], begin = chunk_begin[c], left = numel[t] - begin;",
                    f"        sweep_{stage}(data, n, t, begin, left < chunk ? left : chunk, work + {width} * t,",
                    f"                partials + {self.reductions} * c);",
                    "      }",
                    "    }",
                    "    if (parts > 1) fesetenv(&own);",
                    "  }",
                ]
        for column, index in enumerate(self.program.results):
            slot = self.work_slots[index]
            lines.append(
                f"  for (int64_t t = 0; t < n; ++t) results[{len(self.program.results)} * t + {column}]"
                f" = work[{width} * t + {slot}];"
            )
        return (
            "void lo_run(int64_t n, void *const *data, const int64_t *numel, float *const *steps,\n"
            "            const int32_t *groups, const int32_t *ids, const double *table, int64_t chunks,\n"
            "            const int64_t *chunk_tensor, const int64_t *chunk_begin, int64_t chunk,\n"
            "            const int64_t *bounds, int parts, double *work, double *partials, double *results) {\n"
            "  (void)chunks; (void)partials; (void)results; (void)bounds; (void)parts;\n" + "\n".join(lines) + "\n}\n"
        )


def _suffix(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
