"""Names of runs are paths below runs_dir: each is safe to create, fill and empty, and none is inside of another run."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from karmma_dist.errors import UserError
from karmma_dist.recipe import load_chain, load_recipe
from karmma_dist.recipe.name import OWN_NAMES, check_run_name, job_name

MINIMAL = """
name: {name}
stage: supervised
data: {{shards: somewhere, modalities: [audio]}}
model: {{encoders: {{audio: {{name: small_audio}}}}}}
"""

UNSAFE = {
    "", ".", "..", "./", "a/", "/a", "a//b", "a/./b", "a/../b", "../a", "a/..", "~", "~/a", "a/~b", "-x", "--set",
    "a/-x", ".a", "a/.b", ".lock", ".study.lock", "a\n", "a\nb", "a\tb", "a\0b", "a\x1bb", "a\x7f", "a\x85b",
    "a\u2028b", "a\u202eb", "a\ud800", "b\udc80", " a", "a ",
    "a/ b", "a /b", "\u3000a", "x" * 201, "a/" + "x" * 201, "/".join(["x" * 100] * 10), "\u00fc" * 101,
    "studies", "studies/a", "comparison", "memories", "memories/a", "events.out.tfevents.1", "a/best", "best/a",
    "a/checkpoints/b", "a/recipe.yaml",
    *OWN_NAMES,
}  # fmt: skip
SAFE = [
    "epic_kitchens/distill", "grid_epic/teacher+epochs50-1f3a@seed1", "demo/teacher", "exp", "a b", "K\u00fcche/1",
    "2024-01-01", "a.b", "x" * 200, "best2", "bests/a", "a/studies", "a-b", "lr=1e-3", "a/b/c/d", "x:y", "a#b", "[1]",
]  # fmt: skip


@pytest.mark.parametrize("name", sorted(UNSAFE), ids=ascii)
def test_an_unsafe_name_is_refused_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        check_run_name(name)
    assert len(str(caught.value)) < 200
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", SAFE)
def test_a_safe_name_stays_as_it_is(name: str) -> None:
    assert check_run_name(name) == name


@given(st.text(max_size=12) | st.text(st.sampled_from("a./~- \n\0b"), max_size=6))
def test_an_accepted_name_is_a_folder_of_its_own_below_the_runs(name: str) -> None:
    try:
        check_run_name(name)
    except ValueError:
        return
    assert os.path.normpath(name) == name
    assert Path(name).parts == tuple(name.split("/"))
    assert not os.path.isabs(name)
    assert not set(Path(name).parts) & OWN_NAMES
    os.fsencode(name)


def test_a_jobs_name_leaves_room_for_the_rest_of_its_logs_name() -> None:
    assert job_name("epic_kitchens/distill") == "epic_kitchens-distill"
    for name in ("/".join(["x" * 199] * 5), "/".join(["\u00fc" * 99] * 5)):
        assert len(job_name(check_run_name(name)).encode()) <= 200


@pytest.mark.parametrize("given_name", ["", "''", '""', "~", "null", ".", "a//b", '"a\\nb"', '"a\\0b"', "' a'", "best"])
def test_a_recipe_with_such_a_name_is_refused(tmp_path: Path, given_name: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(MINIMAL.format(name="r"))
    with pytest.raises(UserError, match=r"r\.yaml: 'name': "):
        load_recipe(str(path), [f"name={given_name}"])


def test_runs_of_a_chain_are_not_inside_each_other(tmp_path: Path) -> None:
    for name, first, second in (("a", "exp", "exp/fine"), ("b", "exp/fine", "exp"), ("c", "exp", "exp2/fine")):
        (tmp_path / "first.yaml").write_text(MINIMAL.format(name=first))
        path = tmp_path / f"{name}.yaml"
        path.write_text(MINIMAL.format(name=second) + "after: [first]\n")
        if name == "c":
            assert [recipe.name for recipe in load_chain(str(path))] == [first, second]
            continue
        with pytest.raises(UserError, match="would be inside each other"):
            load_chain(str(path))
