"""Does this machine compute a spiking network's integers exactly? Run it where the model is going to run.

This file is complete in itself: it needs numpy and onnxruntime (or onnxruntime-gpu), and lies beside ``golden.npz``
(``images`` uint8 ``(samples, *shape)``, ``readouts`` ``(samples, classes)``) and ``1/model.onnx``::

    python selfcheck.py --provider CUDAExecutionProvider

The model holds integers in float32 and is exact in any order of addition, as long as products are products. Two things
break that on a GPU: TF32, which keeps 11 bits of every factor, and Winograd's or a Fourier transform, which convolve
through fractions. The options set here for the CUDA provider are ``use_tf32=0`` and ``cudnn_conv_algo_search=DEFAULT``:
implicit GEMM in older versions of ONNX Runtime, cuDNN's fallback engines in those that use its front end, where tensor
cores are used all the same if nothing else supports a convolution. ``NVIDIA_TF32_OVERRIDE=0``, unless set already,
keeps cuBLAS, cuDNN and TensorRT from TF32 in any case. None of this is a promise for every shape and version, which is
why it is checked. ``--option KEY=VALUE`` changes the options, to see what a faster setting costs.

Images are run one by one and all together, since providers choose their algorithms by shape. Exit status: 0 all
readouts are equal, 3 some differ, 1 the check could not be made.
"""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN_FILE = "golden.npz"
MAX_MODEL_BYTES = 2**30
MAX_GOLDEN_BYTES = 2**32
EQUAL, FAILED, DIFFERS = 0, 1, 3
PROVIDER_OPTIONS: dict[str, dict[str, str]] = {
    "CUDAExecutionProvider": {"use_tf32": "0", "cudnn_conv_algo_search": "DEFAULT"},
    "TensorrtExecutionProvider": {"trt_fp16_enable": "0", "trt_int8_enable": "0"},
}


class CheckError(Exception):
    """Why the check could not be made."""


def read_golden(path: Path) -> tuple[Any, Any]:
    """Images and readouts; sizes are checked before anything is unpacked, and pickles are not read."""
    require_size(path, MAX_GOLDEN_BYTES)
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > MAX_GOLDEN_BYTES:
            raise CheckError(f"{path} unpacks to {unpacked:,} bytes, more than {MAX_GOLDEN_BYTES:,}")
        with np.load(path, allow_pickle=False) as arrays:
            images, readouts = arrays["images"], arrays["readouts"]
    except (zipfile.BadZipFile, ValueError, EOFError, KeyError, OSError) as error:
        raise CheckError(f"{path} is no file of golden images ({error})") from error
    if images.dtype != np.uint8 or not np.issubdtype(readouts.dtype, np.integer) or not len(images):
        raise CheckError(f"{path} holds images of {images.dtype} and readouts of {readouts.dtype}, not integers")
    if readouts.ndim != 2 or len(readouts) != len(images):
        raise CheckError(f"{path} holds {images.shape} images and {readouts.shape} readouts")
    return images, readouts


def require_size(path: Path, limit: int) -> None:
    """Refuse a missing or overlarge file."""
    if not path.is_file():
        raise CheckError(f"{path} does not exist")
    if path.stat().st_size > limit:
        raise CheckError(f"{path} has more than {limit:,} bytes")


def open_session(path: Path, provider: str, options: dict[str, str]) -> Any:
    """The model on a provider, with no other to fall back on but the CPU for what the provider does not have."""
    require_size(path, MAX_MODEL_BYTES)
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    try:
        import onnxruntime
    except ImportError as error:
        raise CheckError(f"onnxruntime cannot be imported ({error}); pip install onnxruntime") from error
    available = onnxruntime.get_available_providers()
    if provider not in available:
        raise CheckError(f"onnxruntime {onnxruntime.__version__} has no {provider}; it has {', '.join(available)}")
    providers: list[Any] = [(provider, options)]
    if provider != "CPUExecutionProvider":
        providers.append("CPUExecutionProvider")
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    try:
        # From memory, so that the model cannot refer to other files.
        session = onnxruntime.InferenceSession(path.read_bytes(), settings, providers=providers, enable_fallback=False)
    except Exception as error:  # its exception types share no base class
        raise CheckError(f"{path} cannot be opened on {provider} ({error})") from error
    used = session.get_providers()[0]
    if used != provider:
        raise CheckError(f"{provider} could not be used, {used} was in its place; are its libraries installed?")
    return session


def count_mismatches(session: Any, images: Any, readouts: Any, batch: int) -> int:
    """Readouts that differ, ``batch`` images at a time."""
    mismatches = 0
    for start in range(0, len(images), batch):
        try:
            (found,) = session.run(["readout"], {"image": images[start : start + batch]})
        except Exception as error:  # its exception types share no base class
            raise CheckError(f"the model cannot be run ({error})") from error
        expected = readouts[start : start + batch]
        if found.shape != expected.shape:
            raise CheckError(f"the model gives readouts of shape {found.shape}, not {expected.shape}")
        mismatches += int((found != expected).sum())
    return mismatches


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, tell, and return the exit status."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--provider", default="CPUExecutionProvider", help="execution provider of ONNX Runtime")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the provider")
    parser.add_argument("--model", type=Path, default=here / "1" / "model.onnx")
    parser.add_argument("--golden", type=Path, default=here / GOLDEN_FILE)
    chosen = parser.parse_args(arguments)
    options = dict(PROVIDER_OPTIONS.get(chosen.provider, {}))
    for option in chosen.option:
        key, equals, value = option.partition("=")
        if not equals:
            parser.error(f"--option {option} is not KEY=VALUE")
        options[key] = value
    try:
        images, readouts = read_golden(chosen.golden)
        session = open_session(chosen.model, chosen.provider, options)
        total = 0
        for batch in sorted({1, len(images)}):
            mismatches = count_mismatches(session, images, readouts, batch)
            total += mismatches
            print(f"{chosen.provider} {options}: batch {batch}: {mismatches} of {readouts.size} readouts differ")
    except CheckError as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED
    print("OK: exact" if not total else "FAIL: this provider does not compute the network that was checked")
    return DIFFERS if total else EQUAL


if __name__ == "__main__":
    sys.exit(main())
