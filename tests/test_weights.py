"""Files of tensors: who may read them."""

import os
import pickle
import stat
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_toy import CONFIG, small_disk, toy_model
from data_trees import tree
from engine_toy import toy_config
from engine_toy import toy_model as toy_network

from unite_fast.data.prepare import prepare
from unite_fast.data.source import open_source
from unite_fast.engine import checkpoint
from unite_fast.engine.engine import Engine
from unite_fast.engine.world import join_world
from unite_fast.errors import UserError
from unite_fast.importing import write_pickle
from unite_fast.model.io import save_model
from unite_fast.weights import read_file, write_arrays, write_tensors, write_text


def _checkpoint(folder):
    checkpoint.save(Engine(toy_network(), toy_config(), join_world("cpu"), steps_per_epoch=10), folder, {})


def _shards(folder):
    prepare(open_source(tree(folder / "images"), None), folder / "shards", size=None)


def _export(folder):
    save_model(toy_model().state_dict(), CONFIG, folder / "export", made_by={})


@pytest.fixture(params=[0o022, 0o077], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("write", [_checkpoint, _shards, _export])
def test_tensors_have_the_permissions_of_the_files_beside_them(write, umask, tmp_path):
    write(tmp_path)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert {".safetensors"} < {os.path.splitext(name)[1] for name in modes}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask)


WRITERS = {
    "tensors": lambda path: write_tensors({"a": torch.zeros(3000)}, path),
    "arrays": lambda path: write_arrays({"a": np.zeros(3000)}, path),
    "pickle": lambda path: write_pickle({"a": torch.zeros(3000)}, path),
    "text": lambda path: write_text(3000 * "a", path),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_is_on_the_disk_before_it_takes_the_place_of_the_former(write, tmp_path, monkeypatch):
    done, flush, replace = [], os.fsync, Path.replace

    def flushed(descriptor):
        flush(descriptor)
        done.append(os.fstat(descriptor).st_size)

    def replaced(path, target):
        done.append("replaced")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "replace", replaced)
    write(tmp_path / "file")
    assert done[-2:] == [(tmp_path / "file").stat().st_size, "replaced"]


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_disk_that_fills_up_leaves_the_former_file(write, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"former")
    with small_disk(2000), pytest.raises(UserError, match="cannot write .*file: "):
        write(path)
    assert path.read_bytes() == b"former" and list(tmp_path.iterdir()) == [path]
    write(path)
    assert path.stat().st_size >= 3000 and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("write", [
    lambda path: torch.save({"a": torch.ones(2)}, path, pickle_protocol=4),
    lambda path: path.write_bytes(pickle.dumps({"a": object}, protocol=4)),
], ids=["archive", "bare"])  # fmt: skip
def test_another_pickle_protocol_is_refused_without_a_warning(write, tmp_path, recwarn):
    write(tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt is not a PyTorch weights file as torch.save writes it by default"):
        read_file(tmp_path / "a.pt")
    assert not recwarn.list
