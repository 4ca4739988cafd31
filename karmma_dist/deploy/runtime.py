"""The runtime of exported models: NumPy arrays in, logits out, on ONNX Runtime and without PyTorch.

    model = Runtime.open("student.onnx")
    model.header.modalities                          # what it takes: shapes, types, rates
    model.logits({name: array})                      # any subset; an encoder runs only where its sensor is present

Needs NumPy and onnxruntime alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from karmma_dist.deploy.model_file import ModelHeader, ModelInput, read_model_file
from karmma_dist.errors import UserError, nearest, one_line

if TYPE_CHECKING:
    import onnxruntime

_FATAL_ONLY = 4
"""Severity of what ONNX Runtime logs: it raises its errors, too."""


class Runtime:
    """A loaded model.

    Args:
        header: Its description.
        session: Its session of ONNX Runtime.
    """

    def __init__(self, header: ModelHeader, session: onnxruntime.InferenceSession) -> None:
        self.header, self._session = header, session
        self._inputs = {each.modality: each for each in header.modalities}
        self._blank = {each.modality: np.zeros(each.shape, each.dtype) for each in header.modalities}

    @classmethod
    def open(
        cls, path: str | Path, *, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)
    ) -> Self:
        """Load a file that `karmma-dist export` wrote.

        Args:
            path: The file.
            threads: Threads per operation; 0: one per core.
            providers: Execution providers of ONNX Runtime, the preferred one first.

        Raises:
            UserError: the file is missing, damaged or of another format, onnxruntime is not installed, or it cannot run
                the file.
        """
        content, header = read_model_file(Path(path))
        return cls(header, open_session(content, str(path), threads, providers))

    def logits(self, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the logits of a clip, float32 (C,) by head.

        Args:
            arrays: Arrays of the clip's present modalities, of the shapes and types in the header.

        Raises:
            UserError: no modality is present, one is not the model's, or an array has another shape or type, or values
                that the model has no row for, such as the category 7 of a box.
        """
        if not arrays:
            raise UserError(f"no sensor is present: the model needs one of {', '.join(self._inputs)}")
        feed: dict[str, Any] = {}
        for name, array in arrays.items():
            if name not in self._inputs:
                known = list(self._inputs)
                raise UserError(f"the model has no modality '{name}'{nearest(name, known)}; it has {', '.join(known)}")
            _check(self._inputs[name], array)
        for name, given in self._inputs.items():
            feed[given.name] = arrays.get(name, self._blank[name])
            feed[given.flag] = np.array(name in arrays)
        outputs = [self.header.output(head) for head in self.header.heads]
        with _refused("the arrays of the clip"):
            return dict(zip(self.header.heads, self._session.run(outputs, feed), strict=True))


def open_session(
    content: bytes, shown: str, threads: int = 0, providers: Sequence[str] = ("CPUExecutionProvider",)
) -> onnxruntime.InferenceSession:
    """Return a session of ONNX Runtime; see `Runtime.open`.

    Args:
        content: A serialised ONNX model.
        shown: Name of the model in messages.
        threads: Threads per operation; 0: one per core.
        providers: Execution providers.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            "onnxruntime is not installed: pip install 'karmma-dist[runtime]' (or 'karmma-dist[export]' to export)"
        ) from None
    known = onnxruntime.get_available_providers()
    if unknown := [name for name in providers if name not in known]:
        raise UserError(f"this onnxruntime has no {unknown[0]}; it has {', '.join(known)}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, _FATAL_ONLY
    with _refused(shown):
        return onnxruntime.InferenceSession(content, options, providers=list(providers))


@contextmanager
def _refused(shown: str) -> Iterator[None]:
    """Turn ONNX Runtime's refusal of a model, or of values that a model cannot take, into one line."""
    from onnxruntime import __version__
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    kinds = errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.InvalidProtobuf, errors.NotImplemented
    try:
        yield
    except kinds as error:
        raise UserError(f"{shown}: onnxruntime {__version__} cannot run the model: {one_line(error, 300)}") from None


def _check(given: ModelInput, array: np.ndarray) -> None:
    """Check an array's shape and type.

    Raises:
        UserError: it has another one.
    """
    if not isinstance(array, np.ndarray) or array.shape != given.shape or array.dtype != np.dtype(given.dtype):
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise UserError(f"{given.modality} is {found}, expected {given.dtype} {given.shape}: {given.axes}")
