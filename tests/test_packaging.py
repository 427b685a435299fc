"""What is shipped: a light import, a complete wheel, and an example for contributors that does what it says."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim import create_optimizer
from lightning_optim.optimizers.base import RuleOptimizer
from lightning_optim.registry import OPTIMIZERS, OptimizerInfo

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*the host engine cannot be used .no C compiler:lightning_optim.warnings.LightningOptimWarning"
)

ROOT = Path(__file__).parents[1]
SITE_PACKAGES = Path(torch.__file__).parents[1]


def python(code: str, *flags: str, cwd: Path | None = None, timeout: int = 120, **environment: str) -> str:
    """Run a script in a new process; its output."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "LIGHTNING_OPTIM_ENGINE")} | environment
    run = subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env=env,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


# ---------------------------------------------------------------- import


def test_import_is_light() -> None:
    """Beyond torch itself it brings in the standard library and its own modules, and of torch nothing heavy."""
    shown = python(
        """
        import sys
        import torch
        before = set(sys.modules)
        import lightning_optim
        print(sorted(set(sys.modules) - before))
        """
    )
    new = ast.literal_eval(shown)
    packages = {name.split(".")[0] for name in new} - set(sys.stdlib_module_names)
    assert packages <= {"lightning_optim", "torch"}
    heavy = {"torch._dynamo", "torch._inductor", "torch.distributed", "torch.testing"}
    assert not {".".join(name.split(".")[:2]) for name in new} & heavy
    assert not [name for name in new if name.startswith(("lightning_optim.cli", "lightning_optim.control"))]


def test_the_lower_floors_need_no_framework() -> None:
    """They import where lightning, accelerate, jsonargparse and triton are not installed."""
    python(
        """
        import sys
        for missing in ("lightning", "pytorch_lightning", "accelerate", "jsonargparse", "triton"):
            sys.modules[missing] = None
        import importlib, pkgutil
        floors = "rules engines stepping optimizers schedulers param_groups registry placement control"
        for name in floors.split():
            package = importlib.import_module(f"lightning_optim.{name}")
            for module in pkgutil.walk_packages(getattr(package, "__path__", []), package.__name__ + "."):
                importlib.import_module(module.name)
        """
    )


def test_everything_exported_exists() -> None:
    for name in vars(lightning_optim)["__all__"]:
        assert getattr(lightning_optim, name) is not None
    for info in OPTIMIZERS.values():
        assert getattr(lightning_optim, info.cls.public_name()) is info.cls
        assert {info.cls.public_name(), info.cls.__name__} <= set(vars(lightning_optim)["__all__"])


# ---------------------------------------------------------------- wheel


def _can_build_offline() -> bool:
    if importlib.util.find_spec("build") is None or importlib.util.find_spec("setuptools") is None:
        return False
    return int(importlib.metadata.version("setuptools").split(".")[0]) >= 77


#: Without a recent setuptools, `build` fetches one: slow, and it needs a network.
building = pytest.mark.slow if not _can_build_offline() else pytest.mark.filterwarnings("default")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source distribution, which must be complete for that."""
    folder = tmp_path_factory.mktemp("build")
    ignored = shutil.ignore_patterns(".*", "runs", "build", "dist", "*.egg-info", "__pycache__", "shared")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=ignored)
    isolation = ["--no-isolation"] if _can_build_offline() else []
    run = subprocess.run(
        [sys.executable, "-m", "build", *isolation, "--outdir", str(folder / "dist"), str(folder / "source")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(list((folder / "dist").glob("lightning_optim-*.tar.gz"))) == 1
    (path,) = (folder / "dist").glob("lightning_optim-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("installed")
    flags = ["--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *flags, "--target", str(folder), str(wheel)], timeout=120, check=True
    )
    return folder


@building
def test_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    version = lightning_optim.__version__
    assert {name.split("/")[0] for name in names} == {"lightning_optim", f"lightning_optim-{version}.dist-info"}
    source = {str(path.relative_to(ROOT)) for path in (ROOT / "lightning_optim").rglob("*.py")}
    assert source | {"lightning_optim/py.typed"} == {name for name in names if name.startswith("lightning_optim/")}
    assert any(name.endswith("LICENSE") for name in names)


@building
def test_wheel_metadata(installed: Path) -> None:
    (distribution,) = importlib.metadata.distributions(path=[str(installed)])
    assert distribution.version == lightning_optim.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(rc\d+|\.dev\d+)?", distribution.version)
    required = [r for r in distribution.requires or [] if "extra" not in r]
    assert [re.split(r"[<>=!~ ]", r)[0] for r in required] == ["torch"]
    for entry in distribution.entry_points:
        assert entry.value.startswith("lightning_optim."), entry


@building
def test_wheel_works_on_its_own(installed: Path, tmp_path: Path) -> None:
    """Away from the checkout, with torch beside it but none of the frameworks."""
    shown = python(
        f"""
        import sys
        for missing in ("lightning", "pytorch_lightning", "accelerate", "jsonargparse", "triton"):
            sys.modules[missing] = None
        import io, torch, lightning_optim
        from lightning_optim.registry import OPTIMIZERS
        assert lightning_optim.__file__.startswith({str(installed)!r}), lightning_optim.__file__
        for name in OPTIMIZERS:
            model = torch.nn.Linear(4, 2)
            before = model.weight.detach().clone()
            optimizer = lightning_optim.create_optimizer(name, model, lr=0.01, max_grad_norm=1.0)
            schedule = lightning_optim.Cosine(optimizer, warmup_steps=1, total_steps=3)
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.ones(1, 4)).sum().backward()
                optimizer.step(evaluate=lambda: model(torch.ones(1, 4)).sum())
                schedule.step()
            assert not torch.equal(before, model.weight)
            file = io.BytesIO()
            torch.save(optimizer.state_dict(), file)
            file.seek(0)
            optimizer.load_state_dict(torch.load(file, weights_only=True))
            print(name, optimizer.engine_report())
        from lightning_optim.cli.main import main
        assert main(["--version"]) == 0
        """,
        # Without `site`, the .pth files of an editable install do not lead back to the checkout.
        "-S",
        cwd=tmp_path,
        PYTHONPATH=os.pathsep.join((str(installed), str(SITE_PACKAGES))),
    )
    assert all(f"{name} " in shown for name in OPTIMIZERS)
    assert f"lightning-optim {lightning_optim.__version__}" in shown


# ---------------------------------------------------------------- the example of CONTRIBUTING.md


def _python_blocks(path: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def _defines_an_optimizer(block: str) -> bool:
    classes = [node for node in ast.parse(block).body if isinstance(node, ast.ClassDef)]
    return any(isinstance(base, ast.Name) and base.id == "RuleOptimizer" for c in classes for base in c.bases)


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OptimizerInfo:
    """The optimizer of CONTRIBUTING.md, from the very text."""
    blocks = _python_blocks(ROOT / "CONTRIBUTING.md")
    text = next(block for block in blocks if _defines_an_optimizer(block))
    path = tmp_path / "contributed_optimizer.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, path.stem, module)
    spec.loader.exec_module(module)
    info = OptimizerInfo.of(module.Signum)
    monkeypatch.setitem(OPTIMIZERS, info.name, info)
    return info


def _signum(p: Tensor, grads: list[Tensor], lr: float, momentum: float, weight_decay: float) -> Tensor:
    """Signum with decoupled decay, as its paper has it."""
    m = torch.zeros_like(p)
    for g in grads:
        m = momentum * m + (1 - momentum) * g
        p = p - lr * weight_decay * p - lr * m.sign()
    return p


@pytest.mark.parametrize("engine", ["eager", "foreach", "host"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_example_for_contributors(example: OptimizerInfo, engine: str, dtype: torch.dtype) -> None:
    assert example.name == "signum"
    assert example.kind == "elementwise"
    assert example.summary
    options: dict[str, Any] = {"lr": 0.03, "momentum": 0.8, "weight_decay": 0.1}
    generator = torch.Generator().manual_seed(0)
    shapes: list[tuple[int, ...]] = [(5, 3), (4,), ()]
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    grads = [[torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(6)] for shape in shapes]
    params = [nn.Parameter(p.clone().to(dtype)) for p in start]
    optimizer = create_optimizer("signum", params, engine=engine, **options)
    for step in range(6):
        if step == 3:
            state = optimizer.state_dict()
            optimizer = create_optimizer("signum", params, engine=engine, **options)
            optimizer.load_state_dict(state)
        for p, g in zip(params, grads, strict=True):
            p.grad = g[step].to(dtype)
        optimizer.step()
    assert isinstance(optimizer, RuleOptimizer)
    for p, p0, g in zip(params, start, grads, strict=True):
        expected = _signum(p0, g, **options)
        tolerance = 1e-14 if dtype == torch.float64 else 1e-6  # six roundings of numbers of about one
        torch.testing.assert_close(p.detach().double(), expected, rtol=tolerance, atol=tolerance)


def test_the_example_refuses_bad_input(example: OptimizerInfo) -> None:
    """What the base class checks needs no line in the example."""
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"Signum: momentum=-1\.0; valid"):
        example.create([weight], momentum=-1.0)
    with pytest.raises(TypeError, match="weight_deacy"):
        example.create([weight], weight_deacy=0.1)
