"""Tests of starting weights at a URL: downloaded once per node, checked, kept, without secrets in messages."""

from __future__ import annotations

import fcntl
import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from karmma_dist.errors import UserError
from karmma_dist.io import download
from karmma_dist.io.files import sha256_of
from karmma_dist.models.encoders.encoder import Encoder
from karmma_dist.models.encoders.table import build_encoder
from karmma_dist.models.model_card import ModelCard, save_model
from karmma_dist.models.weights import build_model, load_encoder_weights
from karmma_dist.recipe import EncoderRecipe, InputRecipe, Recipe, read_run_recipe, save_recipe
from karmma_dist.training.checkpoint.resume import refuse_other_recipe
from kits.web_server import Fault, Handler, Server, cut, serving, short, status

INPUTS = InputRecipe.model_validate(
    {"video": {"num_frames": 4, "crop": 32, "short_side": 32}, "audio": {"num_windows": 4, "window_s": 0.3}}
)

pytestmark = pytest.mark.usefixtures("downloads_at_once")

busy = status(503)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    with serving(tmp_path / "served") as running:
        yield running


def encoder_of(seed: int) -> Encoder:
    torch.manual_seed(seed)
    return build_encoder("video", EncoderRecipe(name="small_video", options={"width": 4}), INPUTS)


def same(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def published(server: Server, name: str = "start.pth", seed: int = 1) -> Encoder:
    encoder = encoder_of(seed)
    torch.save(encoder.state_dict(), server.folder / name)
    return encoder


def loaded(url: str, folder: Path, **options: Any) -> Encoder:
    encoder = encoder_of(9)
    load_encoder_weights(encoder, "video", url, cache_dir=str(folder), **options)
    return encoder


def entries(folder: Path) -> list[str]:
    """Whole files in the cache of weights, and anything left of a download."""
    return sorted(path.name for path in (folder / "weights").iterdir() if path.name != ".lock")


def test_weights_from_a_url_are_downloaded_once_and_equal(server: Server, tmp_path: Path) -> None:
    start = published(server)
    for _ in range(3):
        assert same(loaded(server.url_of("start.pth"), tmp_path), start)
    assert server.asked.total() == 1
    assert len(entries(tmp_path)) == 1


def test_a_runs_safetensors_load_from_a_url_without_suffix(
    server: Server, tmp_path: Path
) -> None:
    model = build_model(recipe_with(None, tmp_path), {"verb": ["a", "b"]})
    save_model(model, server.folder)
    encoder = loaded(server.url_of("weights.safetensors"), tmp_path)
    assert same(encoder, model.encoders["video"])


@pytest.mark.parametrize("scheme", ["file", "memory"])
def test_any_url_that_fsspec_opens_is_accepted(server: Server, tmp_path: Path, scheme: str) -> None:
    start = published(server)
    url = f"file://{server.folder}/start.pth"
    if scheme == "memory":
        import fsspec

        url = "memory://somewhere/start.pth"
        fsspec.filesystem("memory").pipe("/somewhere/start.pth", (server.folder / "start.pth").read_bytes())
    assert same(loaded(url, tmp_path), start)


def test_ranks_of_a_node_download_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers the first of them when all others have asked for the lock that the first one holds."""
    start, num_ranks = published(server), 4
    flock, all_ask = fcntl.flock, threading.Event()
    asking: set[int] = set()

    def tell(file: Any, kind: int) -> None:
        if Path(file.name).name != ".lock":
            asking.add(threading.get_ident())
        if len(asking) == num_ranks:
            all_ask.set()
        flock(file, kind)

    def when_all_ask(handler: Handler, body: bytes) -> None:
        assert all_ask.wait(60)
        handler.answer(200, body)

    monkeypatch.setattr(fcntl, "flock", tell)
    server.faults["start.pth"] = [when_all_ask]
    with ThreadPoolExecutor(num_ranks) as ranks:
        states = list(ranks.map(lambda _: loaded(server.url_of("start.pth"), tmp_path), range(num_ranks)))
    assert all(same(state, start) for state in states)
    assert server.asked.total() == 1


@pytest.mark.parametrize("answer", [busy, cut])
def test_an_interrupted_download_is_repeated(server: Server, tmp_path: Path, answer: Fault) -> None:
    start = published(server)
    server.faults["start.pth"] = [answer] * (download.TRIES - 1)
    assert same(loaded(server.url_of("start.pth"), tmp_path), start)
    assert server.asked.total() == download.TRIES


def test_a_truncated_file_does_not_stay_in_the_cache(server: Server, tmp_path: Path) -> None:
    start = published(server)
    server.faults["start.pth"] = [short]
    with pytest.raises(UserError, match=r"start.pth: cannot be read as weights: .* \(removed from the cache\)"):
        loaded(server.url_of("start.pth"), tmp_path)
    assert entries(tmp_path) == []
    assert same(loaded(server.url_of("start.pth"), tmp_path), start)


def test_the_sha256_selects_the_file(server: Server, tmp_path: Path) -> None:
    start = published(server)
    right, wrong = sha256_of(server.folder / "start.pth"), "0" * 64
    with pytest.raises(UserError, match=f"its sha256 is {right}, weights_sha256 says {wrong}: removed") as caught:
        loaded(server.url_of("start.pth"), tmp_path, sha256=wrong)
    assert "\n" not in str(caught.value)
    assert (server.asked.total(), entries(tmp_path)) == (1, [])
    assert same(loaded(server.url_of("start.pth"), tmp_path, sha256=right), start)
    newer = published(server, seed=2)
    newest = sha256_of(server.folder / "start.pth")
    assert same(loaded(server.url_of("start.pth"), tmp_path, sha256=right), start)
    assert same(loaded(server.url_of("start.pth"), tmp_path, sha256=newest), newer)
    assert entries(tmp_path) == sorted([right, newest])


def test_a_changed_file_in_the_cache_is_downloaded_again(server: Server, tmp_path: Path) -> None:
    start = published(server)
    right = sha256_of(server.folder / "start.pth")
    loaded(server.url_of("start.pth"), tmp_path, sha256=right)
    content = bytearray((tmp_path / "weights" / right).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "weights" / right).write_bytes(content)
    assert same(loaded(server.url_of("start.pth"), tmp_path, sha256=right), start)
    assert server.asked.total() == 2


def test_a_local_file_of_another_sha256_is_refused_and_stays(server: Server, tmp_path: Path) -> None:
    start = published(server)
    path = server.folder / "start.pth"
    assert same(loaded(str(path), tmp_path, sha256=hashlib.sha256(path.read_bytes()).hexdigest()), start)
    with pytest.raises(UserError, match=r"start.pth: its sha256 is \w+, weights_sha256 says 0{64}: correct one"):
        loaded(str(path), tmp_path, sha256="0" * 64)
    assert path.is_file()


def test_a_url_without_weights_is_one_line(server: Server, tmp_path: Path) -> None:
    (server.folder / "page.pth").write_text("<html>moved</html>")

    def refused(url: str, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            loaded(url, tmp_path)
        assert "\n" not in str(caught.value)

    refused(server.url_of("none.pth"), "none.pth: not found on the server")
    refused(server.url_of("page.pth"), r"page.pth: cannot be read as weights: .* \(removed from the cache\)")
    refused("nowhere://host/start.pth", "'nowhere' is not a protocol")
    refused(f"file://{server.folder}", "is a folder")
    server.faults["start.pth"] = [busy] * download.TRIES
    refused(server.url_of("start.pth"), r"HTTP 503\), after 5 tries: check URL, network and password")
    assert entries(tmp_path) == []


def test_secrets_in_a_url_are_never_shown(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published(server)
    secret = {"user": "anna:hush1234@", "query": "?signature=hush5678"}
    url = server.url_of("start.pth", **secret)
    recipe = recipe_with(url, tmp_path)
    model = build_model(recipe, {"verb": ["a", "b"]})
    save_model(model, tmp_path / "run", recipe=recipe)
    messages = [caplog.text, (tmp_path / "run" / "model.yaml").read_text()]
    assert "downloading into" in caplog.text
    server.faults["other.pth"] = [busy] * download.TRIES
    for failing in (server.url_of("none.pth", **secret), server.url_of("other.pth", **secret)):
        with pytest.raises(UserError) as caught:
            loaded(failing, tmp_path)
        messages.append(str(caught.value))
    with pytest.raises(UserError) as caught:
        loaded(url, tmp_path, sha256="0" * 64)
    messages.append(str(caught.value))
    torch.save({"layer": torch.ones(1)}, server.folder / "start.pth")
    swin = build_encoder("video", EncoderRecipe(name="swin3d_small"), INPUTS)
    with pytest.raises(UserError, match=r"keys are missing") as caught:
        load_encoder_weights(swin, "video", url, cache_dir=str(tmp_path / "second"))
    messages.append(str(caught.value))
    assert all("hush" not in message and "anna" not in message for message in messages), messages
    assert all("***@127.0.0.1" in message for message in messages), messages


def recipe_with(weights: str | None, folder: Path) -> Recipe:
    video = {"name": "small_video", "options": {"width": 4}, "weights": weights}
    return Recipe.model_validate(
        {
            "name": "n",
            "stage": "supervised",
            "data": {"shards": "x", "modalities": ["video"], "cache_dir": str(folder)},
            "inputs": INPUTS.model_dump(),
            "model": {"encoders": {"video": video}, "width": 8, "num_heads": 2, "feedforward": 8, "fc_width": 8},
        }
    )


def test_a_recipe_resumes_with_a_new_password_in_its_url(server: Server, tmp_path: Path) -> None:
    start = published(server)
    model = build_model(recipe_with(server.url_of("start.pth"), tmp_path), {"verb": ["a", "b"]})
    assert same(model.encoders["video"], start)
    saved = recipe_with(server.url_of("start.pth", user="anna:hush1@"), tmp_path)
    save_recipe(saved, tmp_path / "recipe.yaml")
    saved = read_run_recipe(tmp_path)
    refuse_other_recipe(saved, recipe_with(server.url_of("start.pth", user="ben:hush2@"), tmp_path))
    with pytest.raises(UserError, match=r"model.encoders.video.weights: .*start.pth -> .*other.pth") as caught:
        refuse_other_recipe(saved, recipe_with(server.url_of("other.pth", user="ben:hush2@"), tmp_path))
    assert "hush" not in str(caught.value)


def test_only_the_main_rank_logs_randomly_started_weights(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = encoder_of(1).state_dict()
    gone = next(iter(state))
    torch.save({key: tensor for key, tensor in state.items() if key != gone}, server.folder / "hole.pth")
    recipe = recipe_with(str(server.folder / "hole.pth"), tmp_path)
    recipe.model.encoders["video"].weights_ignore = [gone]
    for is_main in (False, True):
        build_model(recipe, {"verb": ["a", "b"]}, is_main=is_main)
        assert (f"these start at random: {gone}" in caplog.text) is is_main


def test_missing_public_weights_are_refused_with_their_source(
    tmp_path: Path,
) -> None:
    name = "swin_tiny_patch244_window877_kinetics400_1k.pth"
    recipe = recipe_with(f"public/{name}", tmp_path).model_copy(update={"runs_dir": str(tmp_path / "runs")})
    with pytest.raises(UserError, match=rf"video\.weights: public/{name}.*download {name}"):
        build_model(recipe, {"verb": ["a", "b"]})
    start = encoder_of(1)
    (tmp_path / "runs/public").mkdir(parents=True)
    torch.save(start.state_dict(), tmp_path / "runs/public" / name)
    assert same(build_model(recipe, {"verb": ["a", "b"]}).encoders["video"], start)


@pytest.mark.parametrize("wrong", ["", "abc", "A" * 64, "0" * 63 + "g"])
def test_an_invalid_sha256_is_refused_by_the_recipe(wrong: str) -> None:
    with pytest.raises(ValueError, match="weights_sha256"):
        EncoderRecipe(name="small_video", weights_sha256=wrong)


def test_cards_without_the_newer_fields_are_still_read() -> None:
    tree = {
        "modalities": ["video"],
        "heads": {"verb": 2},
        "model": {"encoders": {"video": {"name": "small_video"}}},
        "inputs": {},
    }
    assert ModelCard.model_validate(tree).model.encoders["video"].weights_ignore == []


def test_progress_of_a_download_is_reported_in_megabytes(server: Server, tmp_path: Path) -> None:
    torch.save(encoder_of(1).state_dict() | {"ballast": torch.zeros(3 * 10**6)}, server.folder / "large.pth")
    told: list[tuple[str, int, int, str]] = []
    loaded(
        server.url_of("large.pth"), tmp_path, ignore=["ballast"], log=lambda _: None,
        report=lambda stage, done, total, note="": told.append((stage, done, total, note)),
    )  # fmt: skip
    assert {(stage, note) for stage, _, _, note in told} == {("download large.pth", "MB")}
    assert [done for _, done, _, _ in told] == sorted(done for _, done, _, _ in told)
    assert told[-1][1:3] == (12, 12)


@pytest.mark.parametrize("setting", [{"weights_ignore": ["x.*"]}, {"weights_sha256": "0" * 64}])
def test_settings_without_weights_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, setting: dict[str, Any]
) -> None:
    recipe = recipe_with(None, tmp_path)
    (modality,) = recipe.data.modalities
    changed = recipe.model.encoders[modality].model_copy(update=setting)
    model = recipe.model.model_copy(update={"encoders": {modality: changed}})
    build_model(recipe.model_copy(update={"model": model}), {"verb": ["a", "b"]})
    assert f"model.encoders.{modality}: weights_ignore and weights_sha256 have no effect without weights" in caplog.text
