"""Megatron-Energon on our own tars: a crude dataset, cooked and decoded in a task encoder.

After its pages "Programmatic Data Preparation", "Crude Datasets" (a cooker), "Task Encoder" (`encode_sample`, `batch`)
and "Save and Restore" (`save_state_rank`). Its automatic decoding is off: the clips are decoded as everywhere here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron.energon import (
    Cooker,
    DefaultTaskEncoder,
    Sample,
    WorkerConfig,
    basic_sample_keys,
    edataclass,
    get_savable_loader,
    get_train_dataset,
    stateless,
)
from megatron.energon.flavors import BaseWebdatasetFactory

from karmma_dist.streaming import batch as streaming_batch
from karmma_dist.streaming.batch import Batch
from loaders.work import StoredClip, Work, collate_clips, decode_webdataset

PACKAGE = "megatron-energon"
CAN_RESUME = True


@edataclass
class _CookedClip(Sample):  # type: ignore[misc]
    crude: dict[str, Any]


@stateless
def _cook(sample: dict[str, Any]) -> _CookedClip:
    return _CookedClip(**basic_sample_keys(sample), crude=sample)


class _Clips(DefaultTaskEncoder):  # type: ignore[misc]
    decoder = None
    cookers = [Cooker(_cook)]

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.work = work

    @stateless
    def encode_sample(self, sample: _CookedClip) -> streaming_batch.Sample:
        return decode_webdataset(self.work, sample.crude)

    @stateless
    def batch(self, samples: list[streaming_batch.Sample]) -> Batch:
        return collate_clips(self.work, samples)


def convert(clips: Sequence[StoredClip], shards: Path, out: Path, clips_per_file: int) -> None:  # noqa: ARG001
    """Link the tars and write Energon's index beside them."""
    out.mkdir()
    tars = [tar.name for tar in sorted(shards.glob("train-*.tar"))]
    for name in tars:
        (out / name).symlink_to((shards / name).resolve())
    BaseWebdatasetFactory.prepare_dataset(
        out, tars, split_parts_ratio=[("train", 1), ("val", 0), ("test", 0)], shuffle_seed=None, workers=1
    )
    (out / ".nv-meta" / "dataset.yaml").write_text("__module__: megatron.energon\n__class__: CrudeWebdataset\n")


def open_loader(folder: Path, work: Work, position: Any = None) -> Iterable[Batch]:
    """Its stream has no end: epochs of as many batches as ours. Buffers of 100 clips, as its quickstart has them."""
    dataset = get_train_dataset(
        str(folder),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=work.num_workers, seed_offset=work.seed),
        batch_size=work.batch_size,
        shuffle_buffer_size=100,
        max_samples_per_sequence=100,
        virtual_epoch_length=work.num_clips // work.batch_size,
        task_encoder=_Clips(work),
    )
    loader: Any = get_savable_loader(dataset)
    if position is not None:
        loader.restore_state_rank(position)
    iterable: Iterable[Batch] = loader
    return iterable


def position(loader: Any) -> Any:
    """`SavableDataLoader.save_state_rank`."""
    return loader.save_state_rank()
