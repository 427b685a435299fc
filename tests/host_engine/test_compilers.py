"""Compilers as users name them, and as they answer: with arguments, in other encodings, slowly, or not at all."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from lightning_optim.engines.host import compiler
from lightning_optim.engines.host import toolchain as toolchains
from lightning_optim.engines.host.compiler import CompilerError, call

from .common import needs_compiler, run, script

VERSION = '[ "$1" = --version ] && echo cc 1.0 && exit 0'


@needs_compiler
@pytest.mark.parametrize(
    "form", ["{cc} -DSOME=1", "env {cc}", "'{folder}/my tools/cc' -DSOME=1", "{folder}/my tools/cc", "  "]
)
def test_a_compiler_may_have_arguments_and_blanks(form: str, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = toolchains.find_toolchain().compiler
    toolchains.find_toolchain.cache_clear()
    (tmp_path / "my tools").mkdir()
    script(tmp_path / "my tools" / "cc", f'exec {good} "$@"')
    fresh.setenv("CC", form.format(cc=good, folder=tmp_path))
    found = toolchains.find_toolchain()
    assert found.arguments == {"{cc} -DSOME=1": ("-DSOME=1",), "env {cc}": (good,), "  ": ()}.get(
        form, ("-DSOME=1",) if "DSOME" in form else ()
    )
    assert "foreach" not in run()[1].engine_report()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("missing --flag", "no C compiler: missing not found in PATH"),
        ("'gcc", 'no C compiler: CC="\'gcc" is no command: No closing quotation'),
        ("false", "the C compiler .*false does not run: it ended with status 1"),
    ],
)
def test_what_is_no_compiler_is_named(value: str, message: str, fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("CC", value)
    with pytest.raises(toolchains.ToolchainError, match=message):
        toolchains.find_toolchain()


@pytest.mark.parametrize("locale", ["C", "POSIX", "de_DE.ISO-8859-1"])
def test_messages_in_another_encoding_are_shown(locale: str, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("LC_ALL", locale)
    fresh.setenv("CC", script(tmp_path / "cc", f"{VERSION}\nprintf 'Datei f\\374r Ger\\344t \\377' >&2; exit 1"))
    with pytest.warns(UserWarning, match="cc failed: Datei f.r Ger.t"):
        run()


def test_a_version_in_another_encoding_is_read(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setenv("CC", script(tmp_path / "cc", "printf 'cc \\374ber 1.0\\nmore\\n'"))
    assert toolchains.find_toolchain().version == "cc \ufffdber 1.0"


def test_of_a_compiler_that_says_much_the_beginning_and_the_end_are_kept() -> None:
    code = "import sys; print('first'); print('x' * 3_000_000, file=sys.stderr); print('last')"
    status, said = call([sys.executable, "-S", "-u", "-c", code], 60)
    assert status == 0
    assert said.startswith("first\n")
    assert said.endswith("last\n")
    assert len(said) <= 2 * compiler.KEPT_BYTES


def test_a_compiler_that_says_much_and_never_ends_is_killed() -> None:
    with pytest.raises(CompilerError, match=r"timed out after 0\.5 seconds"):
        call(["yes"], 0.5)


def test_what_a_compiler_has_started_is_killed_with_it(tmp_path: Path) -> None:
    wrapper = script(tmp_path / "cc", f"sleep 60 & echo $! > {tmp_path}/pid; wait")
    with pytest.raises(CompilerError, match="timed out"):
        call([wrapper], 0.5)
    child = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.02)
    else:
        assert not os.path.exists(f"/proc/{child}")


def test_a_server_that_a_compiler_leaves_behind_is_not_waited_for(tmp_path: Path) -> None:
    """As sccache does: it keeps the outputs open."""
    before = time.monotonic()
    status, said = call([script(tmp_path / "cc", "sleep 5 &\necho done")], 60)
    assert (status, said) == (0, "done\n")
    assert time.monotonic() - before < 4


def test_a_compiler_is_given_no_input() -> None:
    assert call(["cat"], 10) == (0, "")
