"""Reading the addresses and forms of hundreds of tensors by one call.

Asking each tensor for its class, address, type, shape, strides, storage and lazy signs from Python costs more than
updating a small model: about 500 µs for the 740 tensors of an AdamW step over 148 parameters; this module needs 45 µs.
It goes through the C functions that DLPack defines for this purpose, which torch exposes as
``Tensor.__dlpack_c_exchange_api__`` (https://dmlc.github.io/dlpack/latest/c_api.html). What DLPack does not tell (that
a tensor is lazily negated, and how large its storage is) is asked of torch's own library.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from lightning_optim.engines.errors import EngineError
from lightning_optim.engines.host.build import load
from lightning_optim.engines.host.toolchain import ToolchainError, find_toolchain
from lightning_optim.engines.memory import Reading, is_plain, problem_of_storage

#: The major version of DLPack; minor versions only add to the end of what is declared below.
DLPACK_MAJOR = 1
#: How many integers describe a tensor of two dimensions; room for more is made when it is needed.
_USUAL_FORM = 6

#: Functions of torch's library: three for lazy signs and inference mode, by their C++ names, and two of its C
#: interface for compiled models.
_FUNCTIONS = (
    "_ZN2at6native6is_negERKNS_6TensorE",
    "_ZN2at6native7is_conjERKNS_6TensorE",
    "_ZN2at6native12is_inferenceERKNS_6TensorE",
    "aoti_torch_get_storage_offset",
    "aoti_torch_get_storage_size",
)

_SOURCE = """\
/* Addresses and forms of a list of tensors, through DLPack's C exchange API (version 1). */
#include <stddef.h>
#include <stdint.h>

typedef struct {
  void *data;
  int32_t device_type, device_id, ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
} DLTensor;

typedef struct Header { uint32_t major, minor; struct Header *previous; } Header;

typedef struct {
  Header header;
  void *allocate, *export_owned, *import;
  int (*describe)(void *object, DLTensor *out);
} ExchangeAPI;

/* Of torch's library: a tensor is given by the address of a pointer to what it is. */
typedef struct {
  _Bool (*is_neg)(void *const *tensor);
  _Bool (*is_conj)(void *const *tensor);
  _Bool (*is_inference)(void *const *tensor);
  int32_t (*storage_offset)(void *const *tensor, int64_t *elements);
  int32_t (*storage_size)(void *const *tensor, int64_t *bytes);
  void *classes[2];  /* torch's own: their instances have memory at their address, and torch's pointer inside */
  int64_t class_at, tensor_at;  /* bytes from the start of a Python object */
} Torch;

uint32_t lo_dlpack_major(const ExchangeAPI *api) { return api->header.major; }

/* Fills addresses[n], and forms as far as capacity reaches: device, type, signs and rank, then each dimension's size
   and stride. Returns the length of the forms; -1 with a Python exception set; or -2 - i for a tensor i that is none of
   torch's own, or is not inside of its storage. The caller holds the GIL. */
int64_t lo_read(const ExchangeAPI *api, const Torch *torch, void *(*item)(void *list, ptrdiff_t index), void *list,
                int64_t n, int64_t *addresses, int64_t *forms, int64_t capacity) {
  int64_t used = 0;
  for (int64_t i = 0; i < n; ++i) {
    char *object = item(list, (ptrdiff_t)i);
    DLTensor t;
    if (object == NULL) return -1;
    void *class = *(void **)(object + torch->class_at), *const *tensor = (void **)(object + torch->tensor_at);
    if (class != torch->classes[0] && class != torch->classes[1]) return -2 - i;
    if (api->describe(object, &t) != 0) return -1;
    int64_t offset, bytes, last = 0, empty = 0;
    for (int32_t d = 0; d < t.ndim; ++d) {
      last += (t.shape[d] - 1) * t.strides[d];
      empty |= t.shape[d] == 0;
    }
    if (!empty) {
      if (torch->storage_offset(tensor, &offset) != 0 || torch->storage_size(tensor, &bytes) != 0) return -2 - i;
      if ((offset + last + 1) * (t.bits * t.lanes / 8) > bytes) return -2 - i;
    }
    addresses[i] = (int64_t)(intptr_t)t.data + (int64_t)t.byte_offset;
    int64_t *form = forms + used;
    used += 2 + 2 * (int64_t)t.ndim;
    if (used > capacity) continue;
    const uint64_t signs = torch->is_neg(tensor) | torch->is_conj(tensor) << 1 | torch->is_inference(tensor) << 2;
    *form++ = (int64_t)((uint64_t)(uint32_t)t.device_type << 32 | (uint32_t)t.device_id);
    *form++ = (int64_t)((uint64_t)t.lanes << 48 | (uint64_t)t.code << 40 | (uint64_t)t.bits << 32 | signs << 24 |
                        (uint32_t)t.ndim);
    for (int32_t d = 0; d < t.ndim; ++d) { *form++ = t.shape[d]; *form++ = t.strides[d]; }
  }
  return used;
}

/* Whether one of m ranges meets one of those between the n / 2 pairs of bounds, which are in order. */
int32_t lo_meet(const int64_t *bounds, int64_t n, const int64_t *begins, const int64_t *lengths, int64_t m) {
  for (int64_t i = 0; i < m; ++i) {
    int64_t low = 0, high = n;  /* the first bound beyond the begin */
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (bounds[middle] > begins[i]) high = middle; else low = middle + 1;
    }
    if (lengths[i] && (low % 2 || (low < n && bounds[low] < begins[i] + lengths[i]))) return 1;
  }
  return 0;
}
"""


class _Torch(ctypes.Structure):
    """What the C code calls ``Torch``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("is_neg", "is_conj", "is_inference", "storage_offset", "storage_size")),
        ("classes", ctypes.py_object * 2),
        *((name, ctypes.c_int64) for name in ("class_at", "tensor_at")),
    )


@lru_cache(maxsize=1)
def _library() -> ctypes.PyDLL | None:
    try:
        return load(_SOURCE, find_toolchain(), ctypes.PyDLL)  # type: ignore[return-value] # the kind asked for
    except (EngineError, ToolchainError):
        return None


@lru_cache(maxsize=1)
def native_reader() -> Callable[[list[Tensor]], Reading] | None:
    """A function that reads a list of torch's own tensors, or None if this torch or machine has none.

    The function raises RuntimeError for tensors of other classes, tensors without an address, and tensors whose storage
    has become too small for them.
    """
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    library, asked = _library(), _torch()
    if library is None or asked is None:
        return None
    unpack = ctypes.pythonapi.PyCapsule_GetPointer
    unpack.argtypes, unpack.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    try:
        api = unpack(capsule, b"dlpack_exchange_api")
    except ValueError:  # a capsule of another name
        return None
    major = library.lo_dlpack_major
    major.argtypes, major.restype = [pointer], ctypes.c_uint32
    if major(api) != DLPACK_MAJOR:
        return None
    function = library.lo_read
    function.argtypes = [pointer, pointer, pointer, ctypes.py_object, integer, pointer, pointer, integer]
    function.restype = integer
    item = ctypes.cast(ctypes.pythonapi.PyList_GetItem, pointer)
    address = ctypes.addressof(asked)
    capacity = _USUAL_FORM

    def read(tensors: list[Tensor]) -> Reading:
        nonlocal capacity
        count = len(tensors)
        addresses = array("q", bytes(8 * count))
        while True:
            room = capacity * count  # read once: another thread may change the capacity
            forms = array("q", bytes(8 * room))
            places = addresses.buffer_info()[0], forms.buffer_info()[0]
            used = function(api, address, item, tensors, count, *places, room)
            if used < 0:
                place = -used - 2
                problem = problem_of_storage(tensors[place]) if is_plain(tensors[place]) else None
                raise RuntimeError(problem or f"{type(tensors[place])} is none of torch's own tensors")
            if used <= room:
                return Reading(addresses, forms[:used])
            capacity = -(-used // count)

    read.keeps = asked  # type: ignore[attr-defined] # keeps alive what is at `address`
    return read


@lru_cache(maxsize=1)
def native_meet() -> Callable[[array[int], array[int], array[int]], bool] | None:
    """A compiled :meth:`Ranges.meet`, of bounds, begins and lengths, or None if there is no compiler."""
    if (library := _library()) is None:
        return None
    function = library.lo_meet
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [pointer, integer, pointer, pointer, integer]

    def meet(bounds: array[int], begins: array[int], lengths: array[int]) -> bool:
        addresses = begins.buffer_info()[0], lengths.buffer_info()[0]
        return bool(function(bounds.buffer_info()[0], len(bounds), *addresses, len(begins)))

    return meet


def _torch() -> _Torch | None:
    """The functions and offsets by which C code asks torch's library, or None if this torch is not as expected."""
    try:
        library = ctypes.PyDLL(torch._C.__file__)  # with all libraries that it is linked to
        functions = [ctypes.cast(getattr(library, name), ctypes.c_void_p) for name in _FUNCTIONS]
    except (OSError, AttributeError):
        return None
    word = ctypes.sizeof(ctypes.c_void_p)
    example = torch.zeros(0, dtype=torch.float32, device="cpu")
    examples = [example, torch.nn.Parameter(example)]
    places = [
        place
        for place in range(object.__basicsize__, Tensor.__basicsize__, word)
        if all(ctypes.c_void_p.from_address(id(t) + place).value == t._cdata for t in examples)
    ]
    # The class is the last field of every object's header, also in builds without a global interpreter lock.
    class_at = object.__basicsize__ - word
    if not places or any(ctypes.c_void_p.from_address(id(t) + class_at).value != id(type(t)) for t in examples):
        return None
    classes = (ctypes.py_object * 2)(Tensor, torch.nn.Parameter)  # type: ignore[misc] # any object is one
    return _Torch(*functions, classes, class_at, places[0])
