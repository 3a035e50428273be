"""The weights of a run read back: the average from any of its files, the others from its checkpoints."""

import json

import numpy as np
import pytest
import torch
from trainer_helpers import CPU, advance, cut, flat, tiny

from fm_fast.cli import main
from fm_fast.train.data import digits
from fm_fast.train.step import new_state
from fm_fast.train.storage.run_folder import RunFolder
from fm_fast.train.storage.weights import FORMAT, VERSION, load_model, save_weights

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def state_and_config():
    config = tiny(objective="score", label_drop=0.25)
    state = new_state(config, CPU)
    advance(state, config, digits(), 2)
    return state, config


def test_load_model_gives_the_averaged_network(tmp_path, state_and_config):
    pytest.importorskip("safetensors")
    state, config = state_and_config
    folder = RunFolder(tmp_path)
    save_weights(folder.weights, state.average.state_dict(), config, 2)
    alone = load_model(tmp_path)
    folder.save(state.state_dict(), config)
    for model, stored in (alone, load_model(folder.weights), load_model(folder.checkpoint(2)), load_model(str(tmp_path))):
        assert stored == config and not model.training
        assert torch.equal(flat(model), flat(state.average)) and not any(p.requires_grad for p in model.parameters())


def test_any_program_can_read_the_weights(tmp_path, state_and_config):
    """The format read by hand: an 8-byte length, a JSON header, the numbers."""
    pytest.importorskip("safetensors")
    state, config = state_and_config
    save_weights(tmp_path / "w.safetensors", state.average.state_dict(), config, 2)
    content = (tmp_path / "w.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header.pop("__metadata__")["step"] == "2"
    expected = state.average.state_dict()
    assert set(header) == set(expected)
    for name, entry in header.items():
        first, last = (8 + length + offset for offset in entry["data_offsets"])
        values = torch.frombuffer(bytearray(content[first:last]), dtype=torch.float32).reshape(entry["shape"])
        assert entry["dtype"] == "F32" and torch.equal(values, expected[name])


def test_damaged_and_foreign_weights(tmp_path, state_and_config):
    safetensors = pytest.importorskip("safetensors.torch")
    state, config = state_and_config
    file = tmp_path / "w.safetensors"
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_model(file)
    save_weights(file, state.average.state_dict(), config, 2)
    cut(file)
    with pytest.raises(ValueError, match=r"w.safetensors: expected a complete safetensors file"):
        load_model(file)
    safetensors.save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"w.safetensors: expected weights of fm_fast .*got \(None, None\)"):
        load_model(file)
    save_weights(file, {"a": torch.zeros(2)}, config, 2)
    with pytest.raises(ValueError, match=r"w.safetensors: expected the settings and weights of a network, got others"):
        load_model(file)


def test_weights_for_which_there_is_no_room(tmp_path, state_and_config, monkeypatch):
    safetensors = pytest.importorskip("safetensors")
    state, config = state_and_config

    def full(tensors, file, metadata):
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match=r"w.safetensors: expected room for the weights, .*No space left on device"):
        save_weights(tmp_path / "w.safetensors", state.average.state_dict(), config, 2)


def test_metadata_that_are_not_settings(tmp_path, state_and_config):
    safetensors = pytest.importorskip("safetensors.torch")
    for others in ({}, {"config": "xx"}):
        safetensors.save_file({"a": torch.zeros(2)}, tmp_path / "w.safetensors", {"format": FORMAT, "version": VERSION} | others)
        with pytest.raises(ValueError, match=r"w.safetensors: expected the settings of a run in its metadata, got others"):
            load_model(tmp_path / "w.safetensors")


def test_weights_that_changed_are_found(tmp_path, state_and_config):
    safetensors = pytest.importorskip("safetensors")
    state, config = state_and_config
    file = tmp_path / "w.safetensors"
    save_weights(file, state.average.state_dict(), config, 2)
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"w.safetensors: expected the weights as they were written, but their checksum differs"):
        load_model(file)
    with safetensors.safe_open(file, framework="pt") as opened:
        metadata = {name: value for name, value in opened.metadata().items() if name != "sha256"}
        weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    safetensors.torch.save_file(weights, file, {"format": FORMAT, "version": VERSION, "sha256": "of settings whose name has changed"})
    with pytest.raises(ValueError, match=r"w.safetensors: expected the weights as they were written, but their checksum differs"):
        load_model(file)
    safetensors.torch.save_file(weights, file, metadata)
    assert load_model(file)[1] == config, "files from before there was a checksum can be read"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_of_every_kind(precision, tmp_path):
    config = tiny(ema_widths=(0.05, 0.2), objective="ddpm", precision=precision, learning_rate=0.01)
    state = new_state(config, CPU)
    advance(state, config, digits(), 4)
    folder = RunFolder(tmp_path)
    folder.save(state.state_dict(), config)
    kinds = {"last": state.model, **{name: state.optimiser.average(state.model, i) for i, name in enumerate(["average", 0.05, 0.2])}}
    for name, expected in kinds.items():
        model, stored = load_model(tmp_path, name)
        assert torch.equal(flat(model), flat(expected).float()) and stored == config and not model.training
    assert len({float(flat(model).sum()) for model in kinds.values()}) == 4, "they differ, so that a wrong one is noticed"


def test_weights_that_a_run_has_not(tmp_path, state_and_config):
    pytest.importorskip("safetensors")
    state, config = state_and_config
    folder = RunFolder(tmp_path)
    folder.save(state.state_dict(), config)
    save_weights(folder.weights, state.average.state_dict(), config, 2)
    with pytest.raises(ValueError, match=r"weights: expected average or last, which .*checkpoint-00000002.pt holds, got 0.1"):
        load_model(tmp_path, 0.1)
    with pytest.raises(ValueError, match=r"weights: expected average, which .*weights.safetensors holds, got last"):
        load_model(folder.weights, "last")


def test_commands_take_the_weights_that_were_asked_for(tmp_path, capsys):
    config = tiny(ema_widths=(0.1,), learning_rate=0.05, sample_steps=2, sample_method="euler")
    state = new_state(config, CPU)
    advance(state, config, digits(), 4)
    RunFolder(tmp_path).save(state.state_dict(), config)
    likelihood = ["likelihood", str(tmp_path), "--limit", "4", "--steps", "2", "--device", "cpu", "--json", str(tmp_path / "bits.json")]
    pictures, bits = set(), set()
    for name in ("average", "last", "0.1"):
        main(["sample", str(tmp_path), "--weights", name, "--count", "1", "--device", "cpu", "--out", str(tmp_path / "samples.npz")])
        pictures.add(np.load(tmp_path / "samples.npz")["images"].tobytes())
        main([*likelihood, "--weights", name])
        record = json.loads((tmp_path / "bits.json").read_text())
        bits.add(record["bits_per_dim"])
        assert str(record["weights"]) == name
    assert len(pictures) == len(bits) == 3
    assert main(["sample", str(tmp_path), "--weights", "0.2"]) == 1
    assert "weights: expected average or last or 0.1" in capsys.readouterr().err
