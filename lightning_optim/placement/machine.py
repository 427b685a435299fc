"""What a plan must know about a machine: its free memory, and how fast memory and the link to the device are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any

import torch

from lightning_optim.checks import NONNEGATIVE, POSITIVE_FINITE, check_choice, check_number
from lightning_optim.engines.host.threads import thread_count
from lightning_optim.engines.host_memory import host_memory
from lightning_optim.placement.step_time import BUCKET_BYTES

#: Bytes of one transfer over the link when it is timed.
TRANSFER = BUCKET_BYTES

#: Bytes of each of the two arrays that are added to time host memory, or copied to time device memory. Together they
#: must not fit in the last-level cache: 96 MB on most servers, 50 MB on an H200.
STREAM = 128 * 2**20

#: How often each measurement is repeated; the fastest counts, since whatever else runs can only slow it down.
REPEATS = 5


@dataclass(frozen=True)
class Machine:
    """One machine, as far as the choice between placements depends on it.

    Attributes:
        device: Type of the device that computes gradients, ``"cuda"`` or ``"cpu"``. On a CPU there is no device
            beside the host: the memories are one, and a copy in memory stands for the link.
        name: The device's name, for people.
        devices: How many such devices the machine has.
        device_free: Bytes that one device has free.
        host_free: Bytes that the host has free, for all processes on it together.
        link_to_host: Bytes per second from the device to pinned host memory.
        link_to_device: Bytes per second from pinned host memory to the device.
        host_bandwidth: Bytes per second that all threads together read and write in host memory.
        device_bandwidth: Bytes per second read and written by a copy on the device.
        notes: How these numbers were found, in words.

    Raises:
        ValueError: A number is out of its range, or the device type is another.
    """

    device: str
    name: str
    devices: int
    device_free: int
    host_free: int
    link_to_host: float
    link_to_device: float
    host_bandwidth: float
    device_bandwidth: float
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values."""
        check_choice("Machine", "device", self.device, ("cpu", "cuda"))
        for field in fields(self):
            if field.type in ("int", "float"):
                valid = NONNEGATIVE if field.name in ("device_free", "host_free") else POSITIVE_FINITE
                check_number("Machine", field.name, getattr(self, field.name), valid)

    @property
    def shares_memory(self) -> bool:
        """Whether the device's memory is the host's."""
        return self.device == "cpu"

    @classmethod
    def measure(cls, device: torch.device | str | None = None) -> Machine:
        """Measure this machine, in less than a second.

        Free memory is read at every call; speeds are measured once per device in a process. Nothing else should run
        on the device meanwhile.

        Args:
            device: Default: the current CUDA device if there is one, else the CPU.

        Raises:
            ValueError: The device is of another type.
        """
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"Machine.measure: device={str(device)!r}; valid: cpu, cuda")
        index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
        memory = host_memory()
        speeds, notes = _speeds(device.type, index or 0)
        if device.type == "cpu":
            name, devices, free = "CPU", 1, memory.free
        else:
            name, devices = torch.cuda.get_device_name(index), torch.cuda.device_count()
            # Memory that torch's allocator holds without using it is free as well.
            idle = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
            free = torch.cuda.mem_get_info(index)[0] + idle
        limit = f"free host memory: {memory.source}"
        return cls(device.type, name, devices, free, memory.free, **speeds, notes=(*notes, limit))

    @classmethod
    def weakest(cls, machines: Sequence[Machine]) -> Machine:
        """A machine with the least that any of several machines has, for processes that must choose alike.

        Args:
            machines: The machines as measured by each process, all with the same device type.

        Raises:
            ValueError: There is no machine, or there are several device types.

        >>> a, b = (Machine("cuda", "a card", 1, free, 10**11, 2e10, 2e10, 6e10, 9e11) for free in (7 * 10**9, 10**9))
        >>> Machine.weakest([a, b]).device_free
        1000000000
        """
        kinds = sorted({machine.device for machine in machines})
        if len(kinds) != 1:
            raise ValueError(f"Machine.weakest: device types {kinds}; valid: one type, of at least one machine")
        least = {
            field.name: min(getattr(machine, field.name) for machine in machines)
            for field in fields(cls)
            if field.type in ("int", "float")
        }
        return replace(machines[0], **least)

    def to_json(self) -> str:
        """The machine as JSON, for :meth:`from_json`."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Machine:
        """A machine from its JSON: it may have been measured elsewhere, or be one that is yet to be bought.

        Args:
            text: A JSON object with the attributes by name; ``notes`` may be left out.

        Raises:
            ValueError: ``text`` is no JSON object, a name is missing or unknown, or a value is not valid.

        >>> laptop = Machine("cuda", "RTX 4090", 1, 24 * 10**9, 60 * 10**9, 2.4e10, 2.4e10, 6e10, 9e11)
        >>> Machine.from_json(laptop.to_json()) == laptop
        True
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"Machine: this is no JSON ({error})") from None
        if not isinstance(values, dict):
            raise ValueError(f"Machine: a JSON {type(values).__name__}; valid: an object")
        known = [field.name for field in fields(cls)]
        missing = [name for name in known if name not in values and name != "notes"]
        unknown = [name for name in values if name not in known]
        if missing or unknown:
            found = [*(f"{name} is missing" for name in missing), *(f"{name!r} is unknown" for name in unknown)]
            raise ValueError(f"Machine: {', '.join(found)}; valid: {', '.join(known)}")
        notes = values.get("notes", [])
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise ValueError(f"Machine: notes={notes!r}; valid: a list of strings")
        return cls(**{**values, "notes": tuple(notes)})


@cache
def _speeds(kind: str, index: int) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    host = _host_bandwidth()
    if kind == "cpu":
        source, target = torch.ones(2, TRANSFER, dtype=torch.uint8, device="cpu").unbind()
        link = TRANSFER / _fastest(lambda: target.copy_(source))
        return (
            # The step's own pass over memory is the same in both placements.
            {"link_to_host": link, "link_to_device": link, "host_bandwidth": host, "device_bandwidth": host},
            ("no accelerator: a copy in host memory stands for the link",),
        )
    with torch.cuda.device(index):
        to_host, to_device = _link()
        device = _device_bandwidth()
    speeds = {"link_to_host": to_host, "link_to_device": to_device, "host_bandwidth": host, "device_bandwidth": device}
    return speeds, (f"the link: pinned copies of {TRANSFER / 1e6:g} MB, one way at a time",)


def _link() -> tuple[float, float]:
    on_host = torch.empty(TRANSFER, dtype=torch.uint8, device="cpu", pin_memory=True)
    on_device = torch.empty(TRANSFER, dtype=torch.uint8, device="cuda")
    to_host = _fastest_on_device(lambda: on_host.copy_(on_device, non_blocking=True))
    to_device = _fastest_on_device(lambda: on_device.copy_(on_host, non_blocking=True))
    return TRANSFER / to_host, TRANSFER / to_device


def _device_bandwidth() -> float:
    size = min(STREAM, torch.cuda.mem_get_info()[0] // 4)
    source, target = torch.zeros(2, size, dtype=torch.uint8, device="cuda").unbind()
    return 2 * size / _fastest_on_device(lambda: target.copy_(source))


def _host_bandwidth() -> float:
    """Measure an in-place addition: it reads two bytes for each one it writes, much as an optimizer's step does."""
    threads = torch.get_num_threads()
    size = min(STREAM, host_memory().free // 8)
    try:
        torch.set_num_threads(thread_count())  # as many as the host engine's step has
        source, target = torch.zeros(2, max(1, size // 4), dtype=torch.float32, device="cpu").unbind()
        return 3 * source.nbytes / _fastest(lambda: target.add_(source))
    finally:
        torch.set_num_threads(threads)


def _fastest(run: Callable[[], object]) -> float:
    """Seconds of the fastest run, by the host's clock."""
    run()  # memory is only allocated when it is first touched
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return max(min(times), 1e-9)


def _fastest_on_device(run: Callable[[], object]) -> float:
    """Seconds of the fastest run, by CUDA events."""
    run()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return max(min(times), 1e-9)
