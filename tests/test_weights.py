"""Files of tensors: who may read them."""

import os
import pickle
import stat

import pytest
import torch
from cli_toy import CONFIG, toy_model
from data_trees import tree
from engine_toy import toy_config
from engine_toy import toy_model as toy_network

from unite_fast.data.prepare import prepare
from unite_fast.data.source import open_source
from unite_fast.engine import checkpoint
from unite_fast.engine.engine import Engine
from unite_fast.engine.world import join_world
from unite_fast.errors import UserError
from unite_fast.model.io import save_model
from unite_fast.weights import read_file


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


@pytest.mark.parametrize("write", [
    lambda path: torch.save({"a": torch.ones(2)}, path, pickle_protocol=4),
    lambda path: path.write_bytes(pickle.dumps({"a": object}, protocol=4)),
], ids=["archive", "bare"])  # fmt: skip
def test_another_pickle_protocol_is_refused_without_a_warning(write, tmp_path, recwarn):
    write(tmp_path / "a.pt")
    with pytest.raises(UserError, match="a.pt is not a PyTorch weights file as torch.save writes it by default"):
        read_file(tmp_path / "a.pt")
    assert not recwarn.list
