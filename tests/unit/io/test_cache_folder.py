"""A cache is its user's alone: what others own or may change is refused in one line, and nothing leads out of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from karmma_dist.errors import UserError
from karmma_dist.io import cache as cache_module
from karmma_dist.io.cache import Cache, Content, cache_root

DATA = b"data"
CONTENT = Content(hashlib.sha256(DATA).hexdigest(), len(DATA))
ANOTHER_USER = 54321

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files to another user")


@pytest.fixture(autouse=True)
def _looked_at_anew() -> None:
    cache_module._is_shared.cache_clear()


def put(path: Path) -> None:
    path.write_bytes(DATA)


def read(root: Path) -> bytes:
    descriptor = Cache(root).open(CONTENT, put)
    try:
        return os.read(descriptor, 100)
    finally:
        os.close(descriptor)


def test_every_folder_that_is_made_is_its_users_alone(tmp_path: Path) -> None:
    before = os.umask(0o000)
    try:
        assert read(tmp_path / "a" / "b") == DATA
    finally:
        os.umask(before)
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        assert folder.stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a" / "b" / CONTENT.name).stat().st_mode & 0o022 == 0


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o775, 0o707])
@pytest.mark.parametrize("is_filled", [True, False])
def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, mode: int, is_filled: bool) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    if is_filled:
        put(root / CONTENT.name)
    root.chmod(mode)
    with pytest.raises(UserError) as caught:
        read(root)
    assert str(caught.value) == (
        f"cache folder {root}: others may write to it (mode 0{mode:o}): chmod go-w {root}, or name another one "
        "(data.cache_dir or KARMMA_DIST_CACHE)"
    )
    root.chmod(mode & ~0o022)
    assert read(root) == DATA


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o750, 0o1777, 0o1770])
def test_a_folder_where_others_cannot_change_what_is_ours_is_taken(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    root.chmod(mode)
    assert read(root) == DATA
    assert read(root) == DATA


@as_root
def test_a_folder_of_another_user_is_refused(tmp_path: Path) -> None:
    root = tmp_path / "cache"
    root.mkdir(mode=0o700)
    put(root / CONTENT.name)
    os.chown(root, ANOTHER_USER, ANOTHER_USER)
    with pytest.raises(UserError, match=r"belongs to another user: name one of your own \(data.cache_dir or KARMMA"):
        read(root)


@as_root
def test_an_entry_of_another_user_in_a_shared_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    entry = tmp_path / CONTENT.name
    put(entry)
    os.chown(entry, ANOTHER_USER, ANOTHER_USER)
    with pytest.raises(UserError, match=r"in the hands of another user: name another cache folder"):
        read(tmp_path)


def test_an_entry_that_others_may_write_to_in_a_shared_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o1777)
    put(tmp_path / CONTENT.name)
    (tmp_path / CONTENT.name).chmod(0o666)
    with pytest.raises(UserError, match=r"in the hands of another user: name another cache folder"):
        read(tmp_path)


def test_links_in_the_folder_are_neither_read_nor_written_through(tmp_path: Path) -> None:
    root, victim = tmp_path / "cache", tmp_path / "victim"
    root.mkdir()
    victim.write_bytes(b"kept")  # as long as the entry
    for name in (CONTENT.name, f".{CONTENT.name}.partial", f".{CONTENT.name}.0123abcd.partial"):
        (root / name).symlink_to(victim)
    assert read(root) == DATA
    assert victim.read_bytes() == b"kept"
    assert {path.name for path in root.iterdir()} == {CONTENT.name, ".lock"}
    assert not (root / CONTENT.name).is_symlink()


def test_a_download_has_a_folder_of_its_own(tmp_path: Path) -> None:
    places = []

    def look(path: Path) -> None:
        places.append(path)
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert list(path.parent.iterdir()) == []
        put(path)

    for _ in range(2):
        os.close(Cache(tmp_path).open(CONTENT, look))
        (tmp_path / CONTENT.name).unlink()
    assert places[0] != places[1]
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_home_folder_that_nobody_has_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KARMMA_DIST_CACHE", "~nobody-has-this-name/cache")
    with pytest.raises(UserError, match="~nobody-has-this-name/cache: no such home folder is known"):
        cache_root(None)
