"""DeepSpeed by Accelerate on CPUs, in one process and in two: the steps are those of the run without it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import launch, leave
from torch import Tensor

from lightning_optim.control.deepspeed import deepspeed_config

from .common import (
    CLOSE,
    EXACT,
    NAMES,
    OPTIMIZERS,
    assert_same_steps,
    groups,
    join,
    loss_of,
    needs,
    network,
    samples,
    schedule_of,
    snapshot,
    unsharded,
)

pytestmark = [pytest.mark.peers, needs("accelerate", "transformers")]

MICRO = 2  # samples of one process at a time
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip and accumulate": {"gradient_clipping": 0.3, "gradient_accumulation_steps": 2},
    "offload, clip and accumulate": {
        "gradient_clipping": 0.3,
        "gradient_accumulation_steps": 2,
        "zero_optimization": OFFLOAD,
    },
    # The ranks have the same samples, so that the mean of their bfloat16 gradients is exact.
    "bfloat16": {"bf16": {"enabled": True}},
    "bfloat16, offload": {"bf16": {"enabled": True}, "zero_optimization": OFFLOAD},
}
RUNS = [(name, stage, case) for name in NAMES for stage in (1, 2) for case in CASES]
RUNS += [(name, 3, case) for name in NAMES for case in ("clip and accumulate", "offload, clip and accumulate")]


def _configuration(stage: int, case: str) -> dict[str, Any]:
    # DeepSpeed takes 1.0 for a missing `gradient_clipping`.
    defaults = {"gradient_clipping": 0.0, "gradient_accumulation_steps": 1}
    config = {"train_micro_batch_size_per_gpu": MICRO, **defaults, **CASES[case]}
    return config | {"zero_optimization": {"stage": stage, **config.get("zero_optimization", {})}}


class _Run:
    """A model and its optimizer, prepared by Accelerate."""

    def __init__(self, name: str, stage: int, case: str, *, helped: bool = True) -> None:
        from accelerate import (  # type: ignore[import-untyped]
            Accelerator,
            DeepSpeedPlugin,
            InitProcessGroupKwargs,
        )
        from accelerate.state import AcceleratorState, GradientState  # type: ignore[import-untyped]

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        # On its own behalf Accelerate would build the model of stage 3 in pieces, by a hook of transformers'.
        plugin = DeepSpeedPlugin(hf_ds_config=_configuration(stage, case), zero3_init_flag=False)
        gloo = InitProcessGroupKwargs(backend="gloo")
        self.accelerator = Accelerator(deepspeed_plugin=plugin, kwargs_handlers=[gloo])
        assert self.accelerator.distributed_type.value == "DEEPSPEED"
        assert self.accelerator.num_processes == _place()[1]
        self.stage, self.case = stage, case
        net = network(torch.bfloat16 if "bfloat16" in case else torch.float32)
        self.made: Any = OPTIMIZERS[name](groups(net))
        self.schedule = schedule_of(self.made)
        if helped:
            plugin.deepspeed_config.update(deepspeed_config(plugin.deepspeed_config, self.made))
        self.engine, self.optimizer = self.accelerator.prepare(net, self.made)

    @property
    def stepped(self) -> Any:
        """What DeepSpeed steps."""
        return self.optimizer.optimizer.optimizer

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank, ranks = (0, 1) if "bfloat16" in self.case else _place()
        x, y = samples()
        for some, labels in zip(x.split(MICRO * ranks), y.split(MICRO * ranks), strict=True):
            yield some[rank::ranks], labels[rank::ranks]

    def weights(self) -> dict[str, Tensor]:
        import deepspeed

        if self.stage < 3:
            return snapshot(self.engine.module)
        with deepspeed.zero.GatheredParameters(list(self.engine.module.parameters())):
            return snapshot(self.engine.module)

    def train(self, batches: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
        """The weights after every step."""
        found = []
        for x, y in batches:
            with self.accelerator.accumulate(self.engine):
                self.accelerator.backward(loss_of(self.engine, x, y))
                self.optimizer.step()
                self.optimizer.zero_grad()
            if self.accelerator.sync_gradients:
                self.schedule.step()
                found.append(self.weights())
        return found


def _place() -> tuple[int, int]:
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _rank(ranks: int, rank: int, folder: Path) -> None:
    join(rank, ranks, folder)
    found: dict[str, Any] = {"runs": {}, "resumed": {}}
    for name, stage, case in RUNS:
        run = _Run(name, stage, case)
        assert run.stepped is run.made, "another optimizer has taken its place"
        batches = list(run.batches())
        found["runs"][name, stage, case] = run.train(batches), run.stepped.engine_report(), _state(run)
        if case.startswith("offload"):
            half = len(batches) // 2
            first, second = _Run(name, stage, case), _Run(name, stage, case)
            first.train(batches[:half])
            path = str(folder / f"{name}{stage}")
            first.accelerator.save_state(path)
            second.accelerator.load_state(path)
            for _ in range(half // 2):  # the schedule is not Accelerate's, so neither is its state
                second.schedule.step()
            found["resumed"][name, stage, case] = second.train(batches[half:])
    found |= _without_help()
    torch.save(found, folder / f"{rank}.pt")
    leave()


def _without_help() -> dict[str, Any]:
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState

    found: dict[str, Any] = {}
    found["offloaded"] = type(_Run("Lion", 2, "offload, clip and accumulate", helped=False).stepped).__name__
    lamb = _Run("LAMB", 2, "plain", helped=False)
    found["LAMB"] = lamb.train(list(lamb.batches()))
    AcceleratorState._reset_state(reset_partial_state=True)
    found["processes"] = Accelerator(deepspeed_plugin=DeepSpeedPlugin()).num_processes
    AcceleratorState._reset_state(reset_partial_state=True)
    found["cpu=True"] = Accelerator(cpu=True, deepspeed_plugin=DeepSpeedPlugin()).distributed_type.value
    return found


def _state(run: _Run) -> dict[Any, Any]:
    """What a standard ``state_dict`` of our optimizer has, under stages that leave it its parameters."""
    if run.stage == 3:
        return {}
    return run.made.state_dict()["state"]


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def ranks(
    request: pytest.FixtureRequest, operators: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[int, list[dict[str, Any]]]:
    count = request.param
    folder = launch(partial(_rank, count), tmp_path_factory.mktemp("ranks"), count)
    return count, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


@pytest.mark.parametrize(("name", "stage", "case"), RUNS)
def test_the_steps_of_a_run_without(name: str, stage: int, case: str, ranks: tuple[int, list[dict[str, Any]]]) -> None:
    count, found = ranks
    low = "bfloat16" in case
    expected = unsharded(
        name,
        batch=MICRO * (1 if low else count),
        clip=CASES[case].get("gradient_clipping"),
        accumulate=CASES[case].get("gradient_accumulation_steps", 1),
        dtype=torch.bfloat16 if low else torch.float32,
    )
    for rank in found:
        assert_same_steps(rank["runs"][name, stage, case][0], expected, **(EXACT if low else CLOSE))
        assert_same_steps(rank["runs"][name, stage, case][0], found[0]["runs"][name, stage, case][0], **EXACT)


@pytest.mark.parametrize(("name", "stage", "case"), RUNS)
def test_our_engine_steps_flat_partitions(
    name: str, stage: int, case: str, ranks: tuple[int, list[dict[str, Any]]]
) -> None:
    from lightning_optim.engines import ENGINES

    count, found = ranks
    for rank in found:
        _, report, state = rank["runs"][name, stage, case]
        assert ("host (the fastest that supports it)" in report) == (ENGINES["host"].unavailable() is None)
        assert "p float32, g float32, exp_avg float32" in report
        if stage < 3:
            assert len(state) == 2  # one tensor of each param group
            weights = sum(p.numel() for p in network().parameters())
            held = sum(slots["exp_avg"].numel() for slots in state.values())
            assert weights <= held * count < weights + 16  # its share, and some padding
            assert all(slots["exp_avg"].ndim == 1 for slots in state.values())


@pytest.mark.parametrize(("name", "stage", "case"), [run for run in RUNS if run[2].startswith("offload")])
def test_resuming(name: str, stage: int, case: str, ranks: tuple[int, list[dict[str, Any]]]) -> None:
    """DeepSpeed's checkpoints hold what our optimizers need, and they take it back."""
    for rank in ranks[1]:
        straight, resumed = rank["runs"][name, stage, case][0], rank["resumed"][name, stage, case]
        assert_same_steps(resumed, straight[len(straight) - len(resumed) :], **EXACT)


def test_what_would_happen_without_help(ranks: tuple[int, list[dict[str, Any]]]) -> None:
    """Why the helper changes or refuses these: where this fails, it need no longer."""
    count, found = ranks
    expected = unsharded("LAMB", batch=MICRO * count)
    for rank in found:
        assert rank["offloaded"] == "DeepSpeedCPUAdam"
        assert not torch.allclose(rank["LAMB"][0]["0.weight"], expected[0]["0.weight"], atol=1e-3)
        assert rank["cpu=True"] in ("NO", "MULTI_CPU")
        assert rank["processes"] == 1  # where it is not told that processes talk by gloo
