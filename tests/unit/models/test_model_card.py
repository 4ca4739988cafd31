"""The description of a model: read however many classes it names, and refused where it describes none."""

from __future__ import annotations

from pathlib import Path

import pytest

from karmma_dist.errors import UserError
from karmma_dist.models.model_card import ModelCard, read_card
from karmma_dist.recipe import InputRecipe, ModelRecipe
from karmma_dist.settings import dump


def test_a_card_with_many_classes_is_read(tmp_path: Path) -> None:
    names = [f"class {number}: '010', \u00fc" for number in range(12_000)]
    heads, classes = {"action": len(names)}, {"action": names}
    card = ModelCard(modalities=[], heads=heads, classes=classes, model=ModelRecipe(), inputs=InputRecipe())
    (tmp_path / "model.yaml").write_bytes(dump(card).encode())
    assert (tmp_path / "model.yaml").stat().st_size > 300_000
    assert read_card(tmp_path / "model.yaml") == card


@pytest.mark.parametrize("heads", ["{verb: -1}", "{verb: 0}", "{verb: 1e30}", "{verb: true}", "{verb: 010}", "{1: 2}"])
def test_a_card_with_an_absurd_number_of_classes_is_refused(tmp_path: Path, heads: str) -> None:
    path = tmp_path / "model.yaml"
    path.write_text(f"modalities: []\nheads: {heads}\nmodel: {{}}\ninputs: {{}}\n")
    with pytest.raises(UserError, match=r"model\.yaml: "):
        read_card(path)


def test_class_names_are_the_texts_that_are_written(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    text = "modalities: []\nheads: {a: 4}\nclasses: {a: [NO, 12:00:00, 7, 2024-13-45]}\n"
    path.write_text(f"{text}model: {{}}\ninputs: {{}}\n")
    assert read_card(path).classes == {"a": ["NO", "12:00:00", "7", "2024-13-45"]}
