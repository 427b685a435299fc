"""What other users could put into the cache, or in its place, is never loaded."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

from lightning_optim.engines import cache, private
from lightning_optim.engines.host import build
from lightning_optim.engines.host import toolchain as toolchains

from .common import libraries, needs_compiler, new_process, run

SOURCE = "void lo_run(void) {}"
STRANGER = 54321

as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can play another user")


def named(folder: Path, key: str, content: bytes) -> Path:
    path = folder / f"{key}-{hashlib.sha256(content).hexdigest()}.so"
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def sticky(folder: Path) -> Path:
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


@needs_compiler
@pytest.mark.parametrize(
    "fault", ["writable", "a second name", "a link", pytest.param("owner", marks=as_root), "a pipe"]
)
def test_a_file_that_another_user_could_have_put_there_is_made_anew(
    fault: str, fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    toolchain = toolchains.find_toolchain()
    build.load(SOURCE, toolchain)
    (path,) = libraries(tmp_path / "cache")
    elsewhere = tmp_path / "elsewhere.so"
    if fault == "writable":
        path.chmod(0o620)
    elif fault == "owner":
        os.chown(path, STRANGER, STRANGER)
    elif fault == "a pipe":
        path.unlink()
        os.mkfifo(path)
    else:
        path.rename(elsewhere)
        (path.symlink_to if fault == "a link" else path.hardlink_to)(elsewhere)
    build.load(SOURCE, toolchain)
    assert libraries(tmp_path / "cache") == [path]
    info = path.lstat()
    assert (info.st_uid, info.st_mode & 0o7777, info.st_nlink, path.is_symlink()) == (os.getuid(), 0o600, 1, False)


@needs_compiler
def test_a_library_that_loads_but_is_another_is_made_anew(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whole, this user's own and rightly named, but of other contents: of another kernel, or of none of ours."""
    toolchain = toolchains.find_toolchain()
    build.load(SOURCE, toolchain)
    (right,) = libraries(tmp_path / "cache")
    build.load("void lo_run(void) {} int other;", toolchain)
    (other,) = set(libraries(tmp_path / "cache")) - {right}
    key = right.name.partition("-")[0]
    foreign = build._compile("int nothing_of_ours;", toolchain, tmp_path)
    planted = [named(tmp_path / "cache", key, other.read_bytes()), named(tmp_path / "cache", key, foreign.read_bytes())]
    right.unlink()
    assert build.load(SOURCE, toolchain).lo_run
    assert right.exists()
    assert not any(path.exists() for path in planted)


@as_root
@pytest.mark.parametrize("way", ["parent", "link", "link's target", "owner of a parent"])
def test_a_folder_that_others_could_exchange_is_not_used(way: str, fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir(mode=0o700)
    if way == "parent":
        parent = tmp_path / "parent"
        parent.mkdir()
        parent.chmod(0o777)
        folder = parent / "cache"
    elif way == "owner of a parent":
        parent = tmp_path / "theirs"
        parent.mkdir(mode=0o755)
        os.chown(parent, STRANGER, STRANGER)
        folder = parent / "cache"
    elif way == "link":
        folder = sticky(tmp_path / "sticky") / "cache"
        folder.symlink_to(own)
        os.lchown(folder, STRANGER, STRANGER)
    else:
        (sticky(tmp_path / "sticky") / "theirs").mkdir()
        os.chown(tmp_path / "sticky" / "theirs", STRANGER, STRANGER)
        (tmp_path / "sticky" / "theirs" / "cache").mkdir(mode=0o700)
        folder = tmp_path / "cache"
        folder.symlink_to(tmp_path / "sticky" / "theirs" / "cache")
    assert cache.private_folder(folder) != folder
    assert private.not_private(folder) is not None
    assert not libraries(folder)
    assert not libraries(own)


def test_folders_and_links_of_this_users_own_are_used(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also below a folder where others may put things, and by way of ``..``."""
    place = sticky(tmp_path / "sticky")
    for folder in (place / "mine" / "cache", place / "mine" / ".." / "mine" / "cache"):
        assert private.made_private(folder) is None
        assert cache.private_folder(folder) == folder
    link = place / "link"
    link.symlink_to("mine")
    assert private.not_private(link / "cache") is None
    link.unlink()
    link.symlink_to(link)
    assert "symbolic links" in str(private.not_private(link / "cache"))


def test_a_link_in_place_of_a_lock_is_not_followed(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("text")
    folder = tmp_path / "cache"
    assert private.made_private(folder) is None
    (folder / "k.lock").symlink_to(precious)

    def make(scratch: Path) -> Path:
        (scratch / "made").write_bytes(b"made")
        return scratch / "made"

    assert cache.cached("k", ".x", make, lambda kept: kept.content) == b"made"
    assert precious.read_text() == "text"


@needs_compiler
@pytest.mark.parametrize("what", ["cache", "the folder above", "temporary"])
def test_a_folder_that_is_deleted_while_the_process_runs_is_made_again(
    what: str, fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    above = tmp_path / "above"
    fresh.setenv(cache.CACHE_VARIABLE, str(above / "cache"))
    if what == "temporary":
        (tmp_path / "file").touch()
        fresh.setenv(cache.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    first = run()[1].engine_report()
    folder = cache.private_folder(cache.cache_folder())
    shutil.rmtree(above if what == "the folder above" else folder)
    second = run(name="lion")[1].engine_report()
    assert "foreach" not in first + second
    assert libraries(cache.private_folder(cache.cache_folder()))


@needs_compiler
def test_a_relative_folder_is_meant_from_where_the_process_was(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    fresh.chdir(tmp_path)
    fresh.setenv(cache.CACHE_VARIABLE, "kernels")
    assert "foreach" not in run()[1].engine_report()
    fresh.chdir(tmp_path / "there")
    assert "foreach" not in run(name="lion")[1].engine_report()
    assert len(libraries(tmp_path / "kernels")) == 4
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"LIGHTNING_OPTIM_CACHE": "~/kernels", "HOME": "/home/me"}, "/home/me/kernels"),
        (
            {"LIGHTNING_OPTIM_CACHE": "", "XDG_CACHE_HOME": "relative", "HOME": "/home/me"},
            "/home/me/.cache/lightning_optim",
        ),
        ({"LIGHTNING_OPTIM_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/lightning_optim"),
    ],
)
def test_where_variables_put_the_cache(variables: dict[str, str], expected: str, fresh: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        fresh.setenv(name, value)
    assert cache.cache_folder() == Path(expected)


@needs_compiler
def test_a_user_without_a_home_has_a_temporary_folder(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not one that is called ``~``, where the process happens to be."""
    fresh.delenv(cache.CACHE_VARIABLE)
    fresh.delenv("XDG_CACHE_HOME", raising=False)
    fresh.setattr(os.path, "expanduser", lambda path: path)  # as where the user is in no list
    fresh.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no home folder"):
        cache.cache_folder()
    assert "foreach" not in run()[1].engine_report()
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_a_full_disk_is_done_without(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fresh.setattr(cache, "has_room", lambda folder: False)

    def full(*args: object, **kwargs: object) -> None:
        fresh.setattr(cache._Files, "publish", whole)
        raise OSError(28, "No space left on device")

    whole = cache._Files.publish
    fresh.setattr(cache._Files, "publish", full)
    assert "foreach" not in run()[1].engine_report()
    assert len(libraries(tmp_path / "cache")) == 1
    assert private.has_room(tmp_path)
    assert not private.has_room(tmp_path / "missing")


@needs_compiler
def test_a_forked_childs_end_leaves_the_temporary_folder(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = cache._temporary()
    cache._remove(folder, os.getpid() + 1)
    assert folder.exists()
    cache._remove(folder, os.getpid())
    assert not folder.exists()


@needs_compiler
def test_this_users_umask_does_not_matter(fresh: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        fresh.setenv(cache.CACHE_VARIABLE, str(tmp_path / "a" / "b" / "cache"))
        run()
        built = libraries(tmp_path / "a" / "b" / "cache")
        stamps = [path.stat().st_mtime_ns for path in built]
        new_process(fresh)
        run()
    finally:
        os.umask(before)
    assert len(built) == 2
    assert [path.stat().st_mtime_ns for path in built] == stamps
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "a", tmp_path / "a" / "b")] == [0o700] * 2


@as_root
def test_in_a_container_without_root_the_systems_folders_are_anybodys(
    fresh: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There root's files have a number that is anybody's: good enough above a home, not in ``/tmp``."""
    fresh.setattr(private, "_system_users", lambda: frozenset({0, STRANGER}))
    folder = tmp_path / "home" / "me"
    folder.mkdir(parents=True)
    os.chown(tmp_path / "home", STRANGER, STRANGER)
    assert private.not_private(folder) is None
    (sticky(tmp_path / "sticky") / "home" / "me").mkdir(parents=True)
    os.chown(tmp_path / "sticky" / "home", STRANGER, STRANGER)
    assert private.not_private(tmp_path / "sticky" / "home" / "me") is not None
