"""A trained network as a program without this code: torch.export, and ONNX if its packages are installed; both are read
back and compared. `torch.export.load("model.pt2").module()` takes normalised float32 images (B, C, H, W), any B."""

import contextlib
import copy
import importlib.util
import io
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from launch.errors import CheckpointError, UsageError

TOLERANCE = 1e-4  # relative to the largest output; kernels of another library add in another order


def export(model: nn.Module, path: Path, *, image_shape: tuple[int, int, int]) -> list[str]:
    """Write .pt2 and, with onnxscript, .onnx, for (C, H, W) images; a line for each. UsageError, CheckpointError."""
    model = copy.deepcopy(model).cpu().eval()
    images = torch.randn(3, *image_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
    shapes = torch.export.ShapesCollection()  # by tensor, for a forward that takes *inputs too
    shapes[images] = {0: torch.export.Dim("batch")}
    program = torch.export.export(model, (images,), dynamic_shapes=shapes.dynamic_shapes(model, (images,)))
    has_onnx = importlib.util.find_spec("onnxscript") is not None  # which needs onnx
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.export.save(program, buffer := io.BytesIO())  # to a path it has no clean error, if that cannot be written
        path.with_suffix(".pt2").write_bytes(buffer.getvalue())
        loaded = torch.export.load(path.with_suffix(".pt2")).module()
        with torch.no_grad():
            outputs = torch.cat([loaded(images[:2]), loaded(images[2:])])  # other batch sizes than it was traced with
        return [compared(path.with_suffix(".pt2"), outputs, expected),
                write_onnx(program, path.with_suffix(".onnx"), images, expected) if has_onnx else
                "no ONNX: onnxscript is not installed"]
    except OSError as error:
        raise UsageError(f"--export {path}: cannot be written ({error.strerror}); choose a folder that can") from None


def write_onnx(program: torch.export.ExportedProgram, path: Path, images: Tensor, expected: Tensor) -> str:
    """Save a program as ONNX, and run the file in onnx's own reference evaluator."""
    logging.disable(logging.WARNING)  # of the exporter's messages none are shown
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(program, (), str(path), input_names=["images"], output_names=["outputs"], dynamo=True,
                              external_data=False, verbose=False)
    finally:
        logging.disable(logging.NOTSET)
    evaluator = importlib.import_module("onnx.reference").ReferenceEvaluator(str(path))
    return compared(path, torch.from_numpy(evaluator.run(None, {"images": images.numpy()})[0]), expected)


def compared(path: Path, outputs: Tensor, expected: Tensor) -> str:
    """A line about the largest difference; raises CheckpointError if it is more than rounding."""
    difference = (outputs - expected).abs().max().item()
    if difference > TOLERANCE * max(1.0, expected.abs().max().item()):
        raise CheckpointError(f"--export {path}: its outputs differ from the model's by {difference:.2g}; not usable")
    return f"{path}: {path.stat().st_size / 2**20:.1f} MiB, outputs within {difference:.1g} of the model's"
