"""Recipes: every file in recipes/ loads, and contradictory settings are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from karmma_dist.errors import UserError
from karmma_dist.recipe import Recipe, load_chain, load_recipe, read_run_recipe, save_recipe

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted(p for p in (ROOT / "recipes").glob("*/*.yaml") if p.stem not in ("base", "expert"))

MINIMAL = """
name: t/x
stage: supervised
data: {shards: somewhere, modalities: [audio]}
model: {encoders: {audio: {name: small_audio}}}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> str:
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return str(path)


def test_a_recipe_holds_all_inputs_of_its_modalities_and_of_no_others(minimal: str, tmp_path: Path) -> None:
    encoders = "model.encoders={signal: {name: signal_cnn}}"
    for written in ([], ["inputs.signal.rate_hz=50"]):
        recipe = load_recipe(minimal, ["data.modalities=[signal]", encoders, *written])
        assert recipe.inputs.model_dump()["signal"] == recipe.inputs.section("signal").model_dump()
        assert recipe.inputs.section("signal").rate_hz == (50 if written else 100)
        save_recipe(recipe, tmp_path / "recipe.yaml")
        assert read_run_recipe(tmp_path) == recipe
    assert "signal" not in load_recipe(minimal).inputs.model_dump()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_recipe_is_valid_and_named_after_its_file(path: Path) -> None:
    assert load_recipe(str(path)).name == f"{path.parent.name}/{path.stem}"


def test_a_saved_recipe_is_read_back_unchanged(minimal: str, tmp_path: Path) -> None:
    recipe = load_recipe(minimal)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert read_run_recipe(tmp_path) == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epoch=3", r"unknown key 'training\.epoch' \(did you mean 'epochs'\?\)"),
        ("stage=distill", "needs a section 'distill'"),
        ("distill.teacher=x", "stage supervised .*'distill'"),
        ("stage=teacher", r"set model\.encoders\.audio\.frozen: true"),
        ("data.modalities=[video]", "no entry for modality 'video'"),
        ("data.modalities=[sound]", "unknown modality 'sound'"),
        ("data.modalities=[audio, audio]", "once each"),
        ("data.order.lanes=4", "lanes 4 with window 0: set both"),
        ("data.modality_dropout.probability=1.5", r"data\.modality_dropout\.probability"),
        ("model.modalities=[video]", "list some of data.modalities, in order: audio"),
        ("model.modalities=[]", "model.modalities is empty: list some of data.modalities"),
        ("data.hold_out=1", r"data\.hold_out"),
        ("model.num_heads=7", "not a multiple of num_heads 7"),
        ("inputs.video.crop=512", "larger than short_side"),
        ("optimizer.warmup_epochs=101", "exceeds training.epochs 100"),
        ("name=../x", "must stay inside runs_dir"),
    ],
)
def test_contradictory_setting_is_refused_in_one_line(minimal: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(minimal, [override])
    assert "\n" not in str(caught.value)


def test_only_a_student_may_use_fewer_modalities_than_its_clips(minimal: str) -> None:
    several = ["data.modalities=[video, audio]", "model.modalities=[audio]"]
    with pytest.raises(UserError, match="stage supervised has no teacher that uses video"):
        load_recipe(minimal, several)
    student = load_recipe(minimal, [*several, "stage=distill", "distill.teacher=t"])
    assert student.modalities == ["audio"]
    assert load_recipe(minimal).modalities == ["audio"]
    with pytest.raises(UserError, match=r"model\.fusion mean is for one modality, not for video, audio"):
        load_recipe(minimal, [several[0], "model.encoders.video.name=small_video", "model.fusion=mean"])


def test_run_is_found_by_name_or_by_path(minimal: str, tmp_path: Path) -> None:
    recipe = load_recipe(minimal, [f"runs_dir={tmp_path}/runs"])
    assert recipe.find_run("t/teacher") == tmp_path / "runs" / "t" / "teacher"
    (tmp_path / "elsewhere").mkdir()
    assert recipe.find_run(str(tmp_path / "elsewhere")) == tmp_path / "elsewhere"


def test_chain_contains_each_earlier_recipe_once_and_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name, after in {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}.items():
        (folder / f"{name}.yaml").write_text(MINIMAL.replace("t/x", name) + f"after: {after}\n")
    chain = load_chain("d", ["data.shards=here", "training.epochs=20"])
    assert [recipe.name for recipe in chain] == ["a", "b", "c", "d"]
    assert {recipe.data.shards for recipe in chain} == {"here"}
    assert [recipe.training.epochs for recipe in chain] == [100, 100, 100, 20]


def test_recipes_that_wait_for_each_other_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for name, after in {"a": "b", "b": "a"}.items():
        (tmp_path / "recipes" / f"{name}.yaml").write_text(MINIMAL.replace("t/x", name) + f"after: [{after}]\n")
    with pytest.raises(UserError, match="wait for each other: a -> b -> a"):
        load_chain("a")


def test_epic_kitchens_recipes_have_the_published_settings() -> None:
    teacher, student = load_recipe("epic_kitchens/teacher"), load_recipe("epic_kitchens/distill")
    assert (teacher.model.width, teacher.model.num_layers, teacher.model.feedforward) == (768, 2, 768)
    assert (student.model.width, student.model.num_layers, student.model.feedforward) == (384, 1, 384)
    assert (teacher.model.fc_width, student.model.fc_width) == (1536, 768)
    assert (teacher.model.attention_dropout, student.model.attention_dropout) == (0.3, 0.0)
    assert (teacher.model.missing, student.model.missing) == ("leave_out", "stand_in")
    assert (teacher.training.batch_size, student.training.batch_size) == (32, 6 * 16)  # 6 on each of 16 GPUs
    assert (teacher.optimizer.weight_decay, student.optimizer.weight_decay) == (0.05, 0.01)
    assert (teacher.optimizer.clip, student.optimizer.clip) == (1.0, 2.0)
    assert student.distill is not None
    assert (student.distill.alpha, student.distill.temperature) == (0.7, 1.0)
    assert student.data.modality_dropout.probability == 0.5
    assert student.data.drop_nouns == [205, 240, 288, 295]


def test_teacher_and_student_share_inputs_in_every_folder() -> None:
    for folder in sorted({path.parent.name for path in RECIPES}):
        runs: dict[str, Recipe] = {r.name: r for r in load_chain(f"{folder}/distill")}
        assert runs[f"{folder}/teacher"].inputs == runs[f"{folder}/distill"].inputs


def test_compiled_encoder_with_sharded_parameters_is_refused(minimal: str) -> None:
    compiled = "model.encoders.audio.compile=true"
    assert load_recipe(minimal, [compiled, "training.zero_stage=2"]).model.encoders["audio"].compile
    with pytest.raises(UserError, match=r"model\.encoders\.audio\.compile .*training\.zero_stage 3"):
        load_recipe(minimal, [compiled, "training.zero_stage=3"])


def test_an_earlier_recipe_is_found_in_the_folder_of_the_one_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine" / "base").mkdir(parents=True)
    (tmp_path / "elsewhere" / "recipes").mkdir(parents=True)
    for name, after in {"a": "b.yaml", "b": "c", "c": "base/d.yaml", "base/e": "../c"}.items():
        (tmp_path / "mine" / f"{name}.yaml").write_text(MINIMAL.replace("t/x", name[-1]) + f"after: [{after}]\n")
    (tmp_path / "mine" / "base" / "d.yaml").write_text(MINIMAL.replace("t/x", "d"))
    (tmp_path / "mine" / "f.yaml").write_text("extends: base/e.yaml\nname: f\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    chain = load_chain("../mine/a.yaml", ["runs_dir=runs"])
    assert [recipe.name for recipe in chain] == ["d", "c", "b", "a"]
    assert [recipe.name for recipe in load_chain("../mine/f.yaml")] == ["d", "c", "f"]
    copy = chain[-1].run_dir / "recipe.yaml"
    copy.parent.mkdir(parents=True)
    save_recipe(chain[-1], copy)
    monkeypatch.chdir(tmp_path / "mine")
    assert [recipe.name for recipe in load_chain(f"../elsewhere/{copy}")] == ["d", "c", "b", "a"]
    assert chain[-1].after == [str(tmp_path / "mine" / "b.yaml")]


def test_a_name_under_recipes_stays_the_name_of_an_earlier_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes" / "t").mkdir(parents=True)
    for name, after in {"first": "", "t/second": "first", "t/first": ""}.items():
        text = MINIMAL.replace("t/x", name.replace("/", "-"))
        (tmp_path / "recipes" / f"{name}.yaml").write_text(text + f"after: [{after}]\n")
    assert load_recipe("epic_kitchens/distill").after == ["epic_kitchens/teacher"]
    assert [recipe.name for recipe in load_chain("t/second")] == ["t-first", "t-second"]
    (tmp_path / "recipes" / "t" / "first.yaml").unlink()
    assert load_recipe("t/second").after == ["first"]
    assert [recipe.name for recipe in load_chain("t/second")] == ["first", "t-second"]


def test_a_chain_of_many_recipes_ends_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(40):
        others = ", ".join(f"r{number - step}.yaml" for step in (1, 2, 3) if number >= step)
        (tmp_path / f"r{number}.yaml").write_text(MINIMAL.replace("t/x", f"r{number}") + f"after: [{others}]\n")
    assert len(load_chain("r39.yaml")) == 40


@pytest.mark.parametrize(
    "override",
    [
        "data.modalities=[{}]", "model.modalities=[{}]", "model.encoders={{{}: {{name: a}}}}", "stage={}", "{}=1",
        "training.epochs={}", "name={}", "model.encoders.audio.weights_sha256={}", "runs_dir={}", "data.{}=1",
        "inputs.{}.x=1", "training.{}.x=1", "distill.teachers=[{}, {}]",
    ],
)  # fmt: skip
def test_a_long_value_is_quoted_in_part(minimal: str, override: str) -> None:
    for text in ("q" * 9_000, "qq " * 3_000):
        with pytest.raises(UserError) as caught:
            load_recipe(minimal, [override.format(text, text) if "}, {" in override else override.format(text)])
        assert str(caught.value).count("q") < 200
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("encoders", ["vidoe", "Video", "", "1"])
def test_an_encoder_of_an_unknown_modality_is_refused(minimal: str, encoders: str) -> None:
    message = r"encoders: unknown modality '.*'(.*did you mean 'video'.*)?; known are video"
    with pytest.raises(UserError, match=message) as caught:
        load_recipe(minimal, [f'model.encoders={{audio: {{name: a}}, "{encoders}": {{name: b}}}}'])
    assert "\n" not in str(caught.value)
    unused = load_recipe(minimal, ["model.encoders.video.name=small_video"])  # of a modality that a parent recipe has
    assert list(unused.model.encoders) == ["audio", "video"]
