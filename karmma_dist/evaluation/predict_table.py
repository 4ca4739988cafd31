"""Predictions for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from karmma_dist.evaluation.predict import Action, Prediction
from karmma_dist.modality import MODALITIES, letters


def print_predictions(predictions: list[Prediction]) -> None:
    """Print what was found in each clip, and the likeliest actions by each modality and by all."""
    for prediction in predictions:
        print_prediction(prediction, Console())


def print_prediction(prediction: Prediction, console: Console) -> None:
    """Print one clip's."""
    console.print(Text(f"{prediction.clip} ({prediction.seconds:g} s): {_found(prediction)}"), soft_wrap=True)
    if prediction.labels and None not in prediction.labels.values():
        console.print(Text(f"labelled: {' '.join(str(name) for name in prediction.labels.values())}"))
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for guess in prediction.guesses:
        table.add_column("%", justify="right")
        table.add_column(f"{letters(guess.modalities)} says", overflow="fold")
    for place in range(max(len(guess.actions) for guess in prediction.guesses)):
        cells = []
        for guess in prediction.guesses:
            there = place < len(guess.actions)
            cells += _cells(guess.actions[place]) if there else ["", ""]
        table.add_row(*map(Text, cells))
    console.print(table)
    console.print()


def _found(prediction: Prediction) -> str:
    """`found video (V), audio (A); no flow; switched off: detections`."""
    found = ", ".join(f"{name} ({MODALITIES[name].letter})" for name in prediction.found)
    parts = [f"found {found}", *(f"no {name}" for name in prediction.absent)]
    if prediction.switched_off:
        parts.append(f"switched off: {', '.join(prediction.switched_off)}")
    return "; ".join(parts)


def _cells(action: Action) -> list[str]:
    return [f"{100 * action.probability:.1f}", " ".join(action.names.values())]
