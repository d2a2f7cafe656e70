"""`--init-from`: files as torchvision's references, timm, pytorch/examples and we write them, and what is refused."""

import argparse
import datetime
import os
import pickle
import random
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from launch.errors import CheckpointError
from tests.helpers import server
from tests.helpers.checkpoints import state_of
from tests.helpers.processes import TINY, read_json
from trainers import models
from trainers.engine.checkpoints.weights import load_weights


def network(seed: int = 0, num_classes: int = 3) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, num_classes))


def torchvision_reference(model: nn.Module) -> dict[str, Any]:
    """As references/classification/train.py saves."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rates = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "lr_scheduler": rates.state_dict(),
            "epoch": 3, "args": argparse.Namespace(data_path="imagenet", lr=0.1, opt="sgd", clip_grad_norm=None)}


def torchvision_with_average(model: nn.Module) -> dict[str, Any]:
    return {**torchvision_reference(network(seed=1)), "model_ema": AveragedModel(model).state_dict()}


def timm(model: nn.Module) -> dict[str, Any]:
    """As timm.utils.CheckpointSaver saves."""
    return {"epoch": 3, "arch": "resnet18", "state_dict": model.state_dict(), "optimizer": {"state": {}}, "version": 2,
            "args": argparse.Namespace(model="resnet18", img_size=None, mean=(0.5, 0.5)), "metric": 71.5}


def pytorch_examples(model: nn.Module) -> dict[str, Any]:
    """As examples/imagenet/main.py saves, whose model is wrapped."""
    return {"epoch": 3, "arch": "resnet18", "state_dict": nn.DataParallel(model).state_dict(),
            "best_acc1": torch.tensor(71.5), "optimizer": {"state": {}}, "scheduler": {"last_epoch": 3}}


def ours(model: nn.Module) -> dict[str, Any]:
    return {**state_of(1), "model": model.state_dict()}


def eight_bit(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model is rounded to what they hold."""
    small = {name: value.to(torch.float8_e4m3fn) if value.is_floating_point() else value
             for name, value in model.state_dict().items()}
    model.load_state_dict(small)
    return small


FILES: dict[str, Callable[[nn.Module], Any]] = {
    "a plain state_dict": lambda model: model.state_dict(),
    "torchvision's references": torchvision_reference,
    "torchvision's references, with a moving average": torchvision_with_average,
    "timm": timm,
    "timm, with a moving average": lambda model: {**timm(network(seed=1)), "state_dict_ema": model.state_dict()},
    "pytorch/examples": pytorch_examples,
    "pytorch/examples, elastic": lambda model: {"MODEL_STATE": model.state_dict(), "EPOCHS_RUN": 3},
    "compiled": lambda model: torch.compile(model).state_dict(),
    "compiled, then wrapped": lambda model: nn.DataParallel(torch.compile(model)).state_dict(),
    "wrapped, then compiled": lambda model: torch.compile(nn.DataParallel(model)).state_dict(),
    "a compiled part": lambda model: nn.Sequential(torch.compile(model[0]), *model[1:]).state_dict(),
    "ours": ours,
    "ours, with a moving average": lambda model: {**ours(network(seed=1)), "ema": model.state_dict()},
    "Lightning": lambda model: {"state_dict": {f"model.{name}": value for name, value in model.state_dict().items()},
                                "hyper_parameters": {"lr": 0.1}, "callbacks": {}},
    "a backbone": lambda model: {f"encoder.trunk_{name}": value for name, value in model.state_dict().items()},
    "a prefix twice": lambda model: nn.DataParallel(nn.DataParallel(model)).state_dict(),
    "net": lambda model: {"net": model.state_dict(), "acc": 93.1, "epoch": 7},
    "net, wrapped": lambda model: {"net": nn.DataParallel(model).state_dict(), "acc": torch.tensor(93.1)},
    "an average with its decay": lambda model: {"model": network(seed=1).state_dict(),
                                                "ema": {"module": model.state_dict(), "decay": 0.999}},
    "two wrappers": lambda model: {"state": {"model": model.state_dict(), "epoch": 3}, "config": {}},
    "three wrappers": lambda model: {"checkpoint": {"ema": {"state_dict": model.state_dict()}}},
    "an empty average": lambda model: {"ema": {}, "model": model.state_dict(), "optimizer": {"state": {}}},
    "BasicSR": lambda model: {"params": network(seed=1).state_dict(), "params_ema": model.state_dict()},
    "numpy's scalars": lambda model: {"model": model.state_dict(), "best": np.float64(0.5), "epoch": np.int64(3),
                                      "done": np.bool_(True), "loss": np.float32(0.1), "name": np.str_("a")},
    "eight-bit floats": eight_bit,
    "half precision": lambda model: model.half().state_dict(),
    "before batches were counted": lambda model: OrderedDict(
        (name, value) for name, value in model.state_dict().items() if "num_batches" not in name),
}


@pytest.mark.parametrize("kind", FILES)
def test_weights_are_found_in_files_of(tmp_path: Path, kind: str):
    source, target = network(seed=7), network(seed=8)
    torch.save(FILES[kind](source), tmp_path / "weights.pt")
    load_weights(target, tmp_path / "weights.pt", flag="--init-from")
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value.to(target.state_dict()[name].dtype)), name


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_safetensors_are_read_whatever_their_name(tmp_path: Path, suffix: str, prefix: str):
    source, target = network(seed=7), network(seed=8)
    path = tmp_path / f"model{suffix}"
    safetensors.torch.save_file({prefix + name: value for name, value in source.state_dict().items()}, path)
    said = load_weights(target, path, flag="--init-from")
    assert all(torch.equal(target.state_dict()[name], value) for name, value in source.state_dict().items())
    assert (", names without backbone." in said) == bool(prefix)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match=r"--init-from .*: cannot be read \(.*\); get it again"):
        load_weights(target, path, flag="--init-from")


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1",)


REFUSED: dict[str, tuple[Any, str]] = {
    "an object that would run code": ({"model": network().state_dict(), "extra": Code()}, "more than tensors"),
    "a whole model": (network(), "more than tensors and plain values (torch.nn.modules.container.Sequential)"),
    "a date": ({"model": network().state_dict(), "saved": datetime.date(2026, 1, 1)},
               "more than tensors and plain values (datetime.date); save its state_dict() alone"),
    "an array": ({"0.weight": np.ones((5, 4))}, "plain values (numpy._core.multiarray._reconstruct)"),
    "a meta tensor": ({**network().state_dict(), "0.bias": torch.empty(5, device="meta")},
                      "0.bias is a meta tensor (torch.float32)"),
    "a complex tensor": ({**network().state_dict(), "0.bias": torch.zeros(5, dtype=torch.complex64)},
                         "0.bias is a complex tensor (torch.complex64)"),
    "an expanded tensor": ({**network().state_dict(), "0.weight": torch.ones(1).expand(10**5, 10**6)},
                           "0.weight is expanded: 400,000,000,000 bytes from 4"),
    "no weights": ({"epoch": 3, "loss": 0.5}, "holds no weights by name: epoch (int); loss (float); save"),
    "layers that torch.ao has quantized": (
        {**network().state_dict(), "2._packed_params.dtype": torch.qint8},
        "2._packed_params.dtype (dtype); save the model's state_dict(), of plain tensors"),
    "whole numbers": ({**network().state_dict(), "0.weight": torch.ones(5, 4, dtype=torch.int8)},
                      "0.weight is torch.int8 in the checkpoint and torch.float32 here"),
    "truth values": ({**network().state_dict(), "0.bias": torch.ones(5) > 0}, "0.bias is torch.bool in the checkpoint"),
    "a list": ([torch.ones(3)], "holds no weights by name: the content (list)"),
    "an empty dict": ({}, "holds no weights by name: it is empty"),
    "weights that are not finite": ({**network().state_dict(), "0.bias": torch.full((5,), float("nan"))},
                                    "0.bias is not dense and finite"),
    "another network": ({"a": torch.ones(1), "b": torch.ones(1)},
                        "0.weight is not in the checkpoint; 0.bias is not in the checkpoint; 1.weight is not in the "
                        "checkpoint and 7 more"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_are_refused_with(tmp_path: Path, kind: str):
    content, message = REFUSED[kind]
    path, model = tmp_path / "weights.pt", network(seed=8)
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"--init-from {path}: .*{re.escape(message)}"):
        load_weights(model, path, flag="--init-from")
    assert all(torch.equal(value, network(seed=8).state_dict()[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("spoil", [lambda data: data[:200], lambda data: b"", lambda data: b"<html>" + data,
                                   lambda data: data[:-30]], ids=["cut off", "empty", "a web page", "without its end"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, spoil: Callable[[bytes], bytes]):
    path = tmp_path / "weights.pt"
    torch.save(network().state_dict(), path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CheckpointError, match=f"--init-from {path}: "):
        load_weights(network(), path, flag="--init-from")


def quantized() -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about a type that it is to lose
        return {**network().state_dict(), "0.bias": torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint8)}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantized_tensor_is_refused_by_name(tmp_path: Path):
    torch.save(quantized(), tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"0.bias is a quantized tensor \(torch.qint8\)"):
        load_weights(network(), tmp_path / "weights.pt", flag="--init-from")


def test_of_300_bit_flips_none_is_taken_for_weights(tmp_path: Path):
    path, rng = tmp_path / "weights.pt", random.Random(0)
    torch.save(network(seed=7).state_dict(), path)
    good = path.read_bytes()
    records = [record for record in zipfile.ZipFile(path).infolist() if "/data/" in record.filename]
    for _ in range(300):
        record = rng.choice(records)
        target = record.header_offset + rng.randrange(30, 60 + len(record.filename) + record.file_size)
        path.write_bytes(good[:target] + bytes([good[target] ^ 1 << rng.randrange(8)]) + good[target + 1 :])
        model = network(seed=8)
        try:
            load_weights(model, path, flag="--init-from")
            expected = network(seed=7)
        except CheckpointError:
            expected = network(seed=8)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in expected.state_dict().items())


def test_a_record_that_one_bit_marks_as_a_folder_is_not_read_from_memory(tmp_path: Path):
    path = tmp_path / "weights.pt"
    torch.save(network(seed=7).state_dict(), path)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"weights/data/0"))
    data[entry + 38] ^= 0x10  # its attributes, of which no CRC is kept
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="its record weights/data/0 is damaged"):
        load_weights(network(), path, flag="--init-from")


def test_a_flipped_number_names_its_record(tmp_path: Path):
    path = tmp_path / "weights.pt"
    torch.save(network(seed=7).state_dict(), path)
    data = path.read_bytes()
    place = data.index(network(seed=7)[0].weight.detach().numpy().tobytes())
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    with pytest.raises(CheckpointError, match=r"its record weights/data/0 is damaged \(CRC\); get it again"):
        load_weights(network(), path, flag="--init-from")


def test_an_archive_that_inflates_is_refused_in_little_memory(tmp_path: Path):
    path = tmp_path / "weights.pt"
    torch.save(network().state_dict(), path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("weights/data/99", "w") as record:
        for _ in range(100):
            record.write(bytes(2**20))
    with pytest.raises(CheckpointError, match="claim to be larger than the file"):
        load_weights(network(), path, flag="--init-from")


@pytest.mark.parametrize(("content", "message"), [
    (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is an HTML page"),
    (b"\xef\xbb\xbf\n <!-- cached --><HTML lang='en'>", "is an HTML page"),
    (b'<?xml version="1.0"?>\n<!DOCTYPE HTML PUBLIC "-//W3C//DTD XHTML 1.0">', "is an HTML page"),
    (b"<head><title>Sign in</title></head>", "is an HTML page"),
    (b"<!-- " + b"cached " * 200 + b"--><html>", "is an HTML page"),
    (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is an HTML page, or XML"),
    (b'{"error": "Repository not found"}', "cannot be read .it begins with b'{\"error\": \"Repos'"),
    (b"\x1f\x8b\x08" + bytes(20), "cannot be read .it begins with"),
    (pickle.dumps({"a": 1}, 4), r"cannot be read \(Unsupported operand 149\)"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "cannot be read .it begins with b'version https://'"),
    (b"weights", "cannot be read"), (b"", "cannot be read"), (bytes(100), "cannot be read"),
    (b"\x80\x02" + b"(" * 10**5, "cannot be read"),
], ids=["page", "page with a comment", "XHTML", "head", "page with a long comment", "XML", "JSON", "gzip", "pickle",
        "LFS", "text", "empty", "zeros", "pickle of marks"])
def test_what_a_download_leaves_in_the_place_of_weights_is_called_by_its_name(tmp_path: Path, content: bytes,
                                                                             message: str):
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"--init-from {path}: {message}") as refused:
        load_weights(network(), path, flag="--init-from")
    assert "\n" not in str(refused.value)
    assert "weights_only" not in str(refused.value), "a remedy of torch's that runs whatever code the file holds"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [
    lambda path: torch.jit.script(network().eval()).save(str(path)),
    lambda path: zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED).writestr("net.pt", bytes(1000)),
    lambda path: np.savez(path.open("wb"), a=np.ones(3)),
], ids=["TorchScript", "a file of weights in a zip", "npz"])
def test_an_archive_of_something_else_is_called_one(tmp_path: Path, make: Callable[[Path], object]):
    make(tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"weights.pt: is an archive of .*, not what torch.save makes of a state"):
        load_weights(network(), tmp_path / "weights.pt", flag="--init-from")


@pytest.mark.timeout(20)
def test_a_folder_or_a_pipe_is_no_file_of_weights(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match="is no regular file"):
            load_weights(network(), path, flag="--init-from")


def test_a_missing_file_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no such file"):
        load_weights(network(), tmp_path / "weights.pt", flag="--init-from")


def test_a_head_of_another_size_is_an_error_before_training(tmp_path: Path):
    torch.save(models.build("net", num_classes=7, width=None).state_dict(), tmp_path / "seven.pt")
    finished = server.run("cifar", *TINY, "--output-dir", tmp_path, "--run-name", "run", "--init-from",
                          tmp_path / "seven.pt")
    assert finished.code == 4
    assert len(finished.errors) == 1
    assert "fc3.weight is (7, 84) in the checkpoint and (10, 84) in the model; fc3.bias is (7,)" in finished.errors[0]
    assert "Traceback" not in finished.err


def test_a_run_starts_from_the_weights_and_nothing_else_of_a_file(tmp_path: Path):
    def run(name: str, *flags: object) -> dict[str, Any]:
        finished = server.run("cifar", *TINY, "--output-dir", tmp_path, "--run-name", name, *flags)
        assert finished.code == 0, finished.err
        return read_json(tmp_path / name / "result.json")

    first = run("first", "--max-steps", 3)
    best = tmp_path / "first" / "checkpoints" / "best.pt"
    started = run("started", "--max-steps", 1, "--lr", 0, "--init-from", best)
    assert started["steps"] == 1
    assert started["weights_sha256"] == first["weights_sha256"]
