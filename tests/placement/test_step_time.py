"""The arithmetic of a pipeline, against a pipeline."""

from __future__ import annotations

import pytest

from lightning_optim.placement.step_time import CLIP_MODES, SPECULATIVE_FACTOR, ClipMode, Stages

STAGES = [
    Stages(0.02, 0.08, 0.02, 8),
    Stages(0.3, 0.1, 0.2, 10),
    Stages(0.05, 0.06, 0.7, 4),
    Stages(0.01, 0.02, 0.03, 1),
]


def simulated(stages: Stages, clip: ClipMode, backward: float) -> float:
    """The time after the backward pass, bucket by bucket: each stage takes one at a time, in order."""
    count = stages.buckets
    factor = SPECULATIVE_FACTOR if clip == "speculative" else 1.0
    times = (stages.to_host / count, factor * stages.on_host / count, stages.to_device / count)
    arrivals = [backward * (i + 1) / count for i in range(count)]
    link = host = back = 0.0
    fetched = []
    for arrival in arrivals:
        link = max(link, arrival) + times[0]
        fetched.append(link)
    for ready in fetched:
        host = max(host, fetched[-1] if clip == "exact" else ready) + times[1]
        back = max(back, host) + times[2]
    return back - backward


@pytest.mark.parametrize("clip", CLIP_MODES)
@pytest.mark.parametrize("stages", STAGES, ids=str)
@pytest.mark.parametrize("backward", [0.0, 0.05, 0.25, 2.0])
def test_what_remains_visible(stages: Stages, clip: ClipMode, backward: float) -> None:
    assert stages.exposed(clip, backward) == pytest.approx(simulated(stages, clip, backward), rel=1e-12)


@pytest.mark.parametrize("stages", STAGES, ids=str)
def test_the_pipeline_is_what_remains_of_no_backward_pass(stages: Stages) -> None:
    assert stages.pipelined == pytest.approx(stages.exposed("none", 0.0), rel=1e-12)
    slowest = max(stages.to_host, stages.on_host, stages.to_device)
    assert stages.pipelined == pytest.approx(slowest + (stages.serial - slowest) / stages.buckets)


def test_one_bucket_is_serial() -> None:
    assert Stages(1.0, 2.0, 3.0, 1).pipelined == 6.0


def test_one_pass_for_everything() -> None:
    whole = Stages(0.4, 0.1, 0.2, 4, whole=True)
    assert whole.pipelined == whole.serial
    assert whole.exposed("exact", 0.0) == pytest.approx(whole.serial)
    assert whole.exposed("exact", 10.0) == pytest.approx(0.4 / 4 + 0.1 + 0.2)
    with pytest.raises(ValueError, match="clip='none' with one pass for everything; valid: exact"):
        whole.exposed("none")


def test_errors() -> None:
    with pytest.raises(ValueError, match="clip='soft'; valid: exact, speculative, none"):
        STAGES[0].exposed("soft")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"backward=-1\.0; valid: seconds"):
        STAGES[0].exposed("none", -1.0)
