"""Tars as they are written: webdataset's own bytes, without its cost in memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from karmma_dist.modalities import MODALITIES
from karmma_dist.packing.tars.writer import write_tar

keys = st.text("abcXYZ019_-", min_size=1, max_size=120)
members = st.dictionaries(st.sampled_from([*MODALITIES, "json"]), st.binary(max_size=2000), min_size=1)


@given(st.dictionaries(keys, members, max_size=5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_tar_is_byte_for_byte_what_webdataset_writes(tmp_path: Path, clips: dict[str, dict[str, bytes]]) -> None:
    suffixes = {name: modality.member for name, modality in MODALITIES.items()} | {"json": "json"}
    ours, theirs = tmp_path / "ours.tar", tmp_path / "theirs.tar"
    assert write_tar(ours, clips.items()) == len(clips)
    with (
        open(theirs, "wb") as file,
        wds.TarWriter(file, user="karmma", group="karmma", mtime=0, encoder=False) as tar,
    ):
        for key, found in clips.items():
            tar.write({"__key__": key, **{suffixes[name]: data for name, data in found.items()}})
    assert ours.read_bytes() == theirs.read_bytes()


def test_packing_processes_do_not_load_the_training_libraries() -> None:
    code = "import sys, karmma_dist.packing.pack; print(*({'torch', 'webdataset', 'deepspeed'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
