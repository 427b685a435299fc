"""The example: data that stays the same, a metric that counts bytes, training that learns and resumes exactly."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("torchmetrics")
pytest.importorskip("matplotlib")

from examples.char_lm.data import SourceText, WindowLoader, read_files, split_text
from examples.char_lm.metrics import BitsPerByte
from examples.char_lm.model import GPT
from examples.char_lm.plots import Step, Validation, plot_curves
from lightning_optim.cli.optim_cli import OptimCLI

# Of LightningCLI itself, about its use of jsonargparse; of the Trainer, about tiny data and a checkpoint that moved.
pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*(LeafSpec|number of training batches|dirpath has changed|callbacks used to)"),
]

CONFIG = Path(__file__).parents[1] / "examples" / "char_lm" / "config.yaml"
CONTEXT, BATCH = 16, 4
# Small enough for a second or two: 9 batches of 4 windows of 16 bytes make an epoch.
TINY = [
    "fit",
    f"--config={CONFIG}",
    "--model.layers=1",
    "--model.width=16",
    "--model.heads=2",
    f"--model.context={CONTEXT}",
    f"--data.context={CONTEXT}",
    f"--data.batch_size={BATCH}",
    "--data.val_fraction=0.25",
    "--data.val_windows=9",  # 3 batches, the last one of a single window
]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests here."""


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Fifty files whose bytes name them, and files that must not be read."""
    folder = tmp_path / "corpus"
    for index in range(50):
        path = folder / f"package{index % 5}" / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([65 + index]) * 100)
    for name in ("site-packages/other.py", "test/test_it.py", "_sysconfigdata_x.py", "notes.md"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"!" * 100)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 800 bytes with something to learn; 600 are trained on, which makes 36 windows and 9 batches."""
    path = tmp_path / "text.txt"
    path.write_bytes((b"def f(x):\n    return x + 1\n" * 40)[:800])
    return path


def run(text: Path, root: Path, *more: str) -> OptimCLI:
    return OptimCLI(
        args=[*TINY, f"--data.path={text}", f"--trainer.logger.save_dir={root}", *more],
        save_config_kwargs={"overwrite": True},
    )


# --- data


def test_files_are_chosen_by_their_names_alone(corpus: Path) -> None:
    files = read_files(corpus, max_bytes=2050)
    assert len(files) == 20, "20 files of 100 bytes fit under the cap"
    assert files == read_files(corpus, max_bytes=2050)
    assert set(files) <= set(read_files(corpus, max_bytes=10**6)), "a larger cap adds files and replaces none"
    assert len(read_files(corpus, max_bytes=10**6)) == 50, "other packages, tests and other suffixes are left out"
    with pytest.raises(FileNotFoundError, match="at most 50 bytes"):
        read_files(corpus, max_bytes=50)


def test_no_file_is_in_both_parts(corpus: Path) -> None:
    split = split_text(corpus, 10**6, val_fraction=0.3)
    train, val = set(split.train.tolist()), set(split.val.tolist())
    assert not train & val
    assert len(train | val) == 50
    assert len(split.train) + len(split.val) == 5000
    assert 5 <= len(val) <= 25, "about 15 of the 50 files"


def test_one_file_is_cut_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(100)))
    split = split_text(path, 80, val_fraction=0.25)
    assert split.train.tolist() == list(range(60))
    assert split.val.tolist() == list(range(60, 80))


def test_the_standard_library_is_there() -> None:
    data = SourceText(max_bytes=1_000_000)
    data.setup()
    assert data.split is not None
    assert len(data.split.train) > 500_000
    assert b"import" in bytes(data.split.train[:200_000].tolist())


def test_an_epoch_visits_each_byte_at_most_once_in_an_order_of_its_own() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    loader = WindowLoader(text, context=8, batch_size=4, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert len(batches) == len(loader) == 6
        for inputs, targets in batches:
            assert inputs.shape == targets.shape == (4, 8)
            assert torch.equal(inputs + 1, targets), "the target is the next byte"
        epochs.append(torch.cat([inputs for inputs, _ in batches]).flatten().tolist())
    assert len(set(epochs[0])) == len(epochs[0]) == 192
    assert epochs[0] == epochs[2]
    assert epochs[0] != epochs[1]


def test_validation_windows_are_all_there_also_the_last_few() -> None:
    text = torch.arange(201, dtype=torch.uint8)
    loader = WindowLoader(text, context=8, batch_size=4)
    assert [len(inputs) for inputs, _ in loader] == [4, 4, 4, 4, 4, 4, 1]
    assert torch.cat([inputs for inputs, _ in loader]).flatten().tolist() == list(range(200))
    few = WindowLoader(text, context=8, batch_size=4, limit=5)
    assert [inputs[:, 0].tolist() for inputs, _ in few] == [[0, 40, 80, 120], [160]], "evenly spread"


def test_processes_share_the_windows_of_an_epoch() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    parts = [WindowLoader(text, 8, 2, seed=3, rank=rank, world_size=3) for rank in range(3)]
    seen = [torch.cat([inputs for inputs, _ in part]).flatten().tolist() for part in parts]
    assert {len(part) for part in parts} == {4}, "all processes make the same number of steps"
    assert len({byte for part in seen for byte in part}) == 3 * 4 * 2 * 8


def test_a_loader_goes_on_where_another_was() -> None:
    text = torch.arange(200, dtype=torch.uint8)
    whole = WindowLoader(text, 8, 4, seed=3)
    whole.set_epoch(2)
    stream = iter(whole)
    for _ in range(4):
        next(stream)
    resumed = WindowLoader(text, 8, 4, seed=3)
    resumed.load_state_dict(whole.state_dict())
    iterator = iter(resumed)  # made before the epoch is set, as Lightning does
    resumed.set_epoch(2)
    rest = list(iterator)
    assert len(rest) == 2
    assert all(torch.equal(a[0], b[0]) for a, b in zip(rest, stream, strict=True))
    resumed.set_epoch(3)
    assert len(list(resumed)) == 6, "the next epoch is whole"


@pytest.mark.parametrize("length", [10, 40])
def test_too_little_text_is_an_error_with_numbers(length: int) -> None:
    with pytest.raises(ValueError, match=f"{length} bytes are too few for a batch of 8 windows of 16 bytes"):
        WindowLoader(torch.zeros(length, dtype=torch.uint8), 16, 8, seed=0)


# --- model and metric


def test_bits_per_byte_counts_bytes_not_batches() -> None:
    metric = BitsPerByte()
    # A batch of 3 bytes at 1 bit each and one of 1 byte at 5 bits: 8 bits in 4 bytes, not (1 + 5) / 2.
    metric.update(torch.tensor(3 * 1 * math.log(2)), 3)
    metric.update(torch.tensor(1 * 5 * math.log(2)), 1)
    assert metric.compute().item() == pytest.approx(2.0)


def test_bits_per_byte_equals_an_independent_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    metric, bits, count = BitsPerByte(), 0.0, 0
    for rows in (5, 5, 2):
        logits = torch.randn(rows, 7, 256, generator=generator)
        targets = torch.randint(256, (rows, 7), generator=generator)
        nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        metric.update(nats, targets.numel())
        for row in range(rows):
            for column in range(7):
                p = torch.softmax(logits[row, column].double(), 0)[targets[row, column]].item()
                bits -= math.log2(p)
                count += 1
    assert metric.compute().item() == pytest.approx(bits / count, rel=1e-6)


def test_the_model_is_causal_tied_and_starts_near_eight_bits() -> None:
    torch.manual_seed(0)
    model = GPT(layers=2, width=32, heads=4, context=12).eval()
    assert model.head.weight is model.embedding.weight
    text = torch.randint(256, (64, 12))
    changed = text.clone()
    changed[:, 8:] = (changed[:, 8:] + 1) % 256
    logits, other = model(text), model(changed)
    torch.testing.assert_close(logits[:, :8], other[:, :8])
    assert not torch.allclose(logits[:, 8:], other[:, 8:])
    # Random bytes cannot be guessed: an untrained model must not claim to.
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten())
    assert loss.item() / math.log(2) == pytest.approx(8, abs=0.2)
    with pytest.raises(ValueError, match=r"13 bytes is longer than the model's context of 12"):
        model(torch.zeros(1, 13, dtype=torch.long))


def test_generation_repeats_and_leaves_the_random_state_alone() -> None:
    model = GPT(layers=1, width=16, heads=2, context=8)
    before = torch.get_rng_state()
    first = model.generate(b"def ", 20, seed=5)
    assert torch.equal(before, torch.get_rng_state())
    assert first.startswith(b"def ")
    assert len(first) == 24
    assert first == model.generate(b"def ", 20, seed=5)
    assert first != model.generate(b"def ", 20, seed=6)
    assert model.training


def test_curves_are_drawn(tmp_path: Path) -> None:
    path = tmp_path / "curves.png"
    plot_curves([Step(1, 8.0, 1e-3), Step(2, 7.0, 1e-3)], [Validation(0, 8.0), Validation(2, 7.0)], path)
    assert path.read_bytes().startswith(b"\x89PNG")


# --- training, through the command line's own configuration


def test_training_learns_and_leaves_its_artifacts(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli = run(text, tmp_path, "--trainer.max_steps=30", "--trainer.val_check_interval=10", "--optimizer.lr=0.01")
    printed = capsys.readouterr().out
    folder = Path(cli.trainer.log_dir or "")
    assert folder.parent == tmp_path / "char_lm"
    for name in ("curves.png", "sample.txt", "metrics.csv", "config.yaml", "checkpoints/last.ckpt"):
        assert (folder / name).stat().st_size > 0, name
    with (folder / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val_bpb"]]
    curve = [(int(row["step"]), float(row["val_bpb"])) for row in rows]
    assert [step for step, _ in curve] == [0, 9, 19, 29], "the first value is that of the untrained model"
    assert curve[0][1] == pytest.approx(8, abs=0.3)
    assert curve[-1][1] < curve[0][1] - 2
    assert f"validation bits per byte: {curve[0][1]:.2f} -> {curve[-1][1]:.2f}" in printed
    assert printed.index("Text the model wrote") < printed.index("validation bits per byte")
    assert (folder / "sample.txt").read_text().startswith("def ")


# The checkpoint is taken in the middle of the first epoch, at its end, and in the middle of the second.
@pytest.mark.parametrize("stop", [5, 9, 12])
def test_a_resumed_run_is_the_uninterrupted_one(text: Path, tmp_path: Path, stop: int) -> None:
    steps = ("--trainer.max_steps=16", f"--trainer.val_check_interval={stop}")
    keep_all = (
        "--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint",
        "--trainer.callbacks.save_top_k=-1",
        "--trainer.callbacks.filename={step}",
        f"--trainer.callbacks.dirpath={tmp_path / 'all'}",
    )
    whole = run(text, tmp_path / "whole", *steps, *keep_all)
    resumed = run(text, tmp_path / "resumed", *steps, f"--ckpt_path={tmp_path / 'all' / f'step={stop}.ckpt'}")
    assert resumed.trainer.global_step == 16
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert _curves(resumed) == _curves(whole), "the report goes on with the curve of the checkpoint"


@pytest.mark.filterwarnings("ignore:in_graph\\w*. the triton engine cannot be used")
def test_the_overlay_that_undoes_spikes(text: Path, tmp_path: Path) -> None:
    cli = run(text, tmp_path, f"--config={CONFIG.parent / 'undo.yaml'}", "--trainer.max_steps=3")
    strategy: Any = cli.trainer.strategy
    assert (strategy.undo.threshold, strategy.undo.recover_steps) == (7.0, 100)
    assert cli.trainer.callback_metrics["undo/count"] == 0
    assert cli.trainer.global_step == 3


@pytest.mark.filterwarnings("ignore:in_graph\\w*. the triton engine cannot be used")
def test_the_overlay_with_sam(text: Path, tmp_path: Path) -> None:
    """Its parameters are split as AdamW alone would have it."""
    overlay = f"--config={CONFIG.parent / 'sam.yaml'}"
    cli = run(text, tmp_path, overlay, "--trainer.accumulate_grad_batches=2", "--trainer.max_steps=3")
    optimizer: Any = cli.trainer.optimizers[0]
    assert type(optimizer.base).__name__ == "AdamW"
    groups = [(group["weight_decay"], group["betas"], group["sam_rho"]) for group in optimizer.param_groups]
    assert groups == [(0.1, (0.9, 0.95), 0.05), (0.0, (0.9, 0.95), 0.05)]
    assert cli.trainer.global_step == 3


def _curves(cli: OptimCLI) -> Any:
    callbacks: list[Any] = cli.trainer.callbacks  # type: ignore[attr-defined]
    (report,) = (callback for callback in callbacks if type(callback).__name__ == "Report")
    return report.state_dict()
