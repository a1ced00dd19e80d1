"""Writes a network as a model of a Triton model repository: configuration, graph, warm-up image and a self-check.

A repository is a folder of models that a server reads, so it is no bundle and lies in none: the model is written into
it as one folder that appears complete or not at all, and its neighbours stay as they are::

    REPOSITORY/NAME/config.pbtxt       what Triton needs to know: ports, batching, providers, warm-up
                    1/model.onnx       the bundle's file, byte for byte
                    warmup/image       the first golden image, with which Triton warms up
                    selfcheck.py       runs golden.npz on any execution provider of ONNX Runtime, alone
                    golden.npz         golden images and the readouts they must give

The graph holds integers in float32, which a GPU computes exactly only without TF32 and without Winograd's transform;
the configuration says so to the CUDA provider (``selfcheck.py`` tells how). Whether a GPU does keep to it, and whether
another provider does, is for ``selfcheck.py`` to find out there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from exporters import selfcheck
from hardware.errors import SpikeguardError
from hardware.files import atomic_folder, read_bytes, write_arrays, write_bytes
from hardware.formats.bundle import ONNX_FILE, Bundle
from hardware.network import IntegerNetwork
from hardware.runtimes.onnxruntime import MAX_MODEL_BYTES

CONFIG_FILE = "config.pbtxt"
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
VERSION = "1"
WARMUP_IMAGE = "image"
MAX_BATCH = 256
CUDA_OPTIONS = selfcheck.PROVIDER_OPTIONS["CUDAExecutionProvider"]
CONV_ALGO_SEARCH = {"EXHAUSTIVE": "0", "HEURISTIC": "1", "DEFAULT": "2"}
"""As Triton's older parameter, which wins over the provider's option and without which the search is exhaustive."""


def write_triton(bundle: Bundle, repository: Path, name: str) -> Path:
    """Write the model folder ``repository/name`` from a bundle's ``model.onnx``; an older one of ours is replaced.

    Raises:
        SpikeguardError: if the bundle has no such file or golden inputs that change over time, the name is none, the
            repository lies in the bundle, or something else lies where the model should.
    """
    folder = repository / name
    _check_place(bundle, repository, name)
    content, golden = read_bytes(bundle.file(ONNX_FILE), MAX_MODEL_BYTES), bundle.golden
    if golden.codes.ndim != len(bundle.network.input.shape) + 1:
        raise SpikeguardError(f"{bundle.path} has golden inputs that change over time; {ONNX_FILE} takes images")
    with atomic_folder(folder) as partial:
        write_bytes(partial / CONFIG_FILE, triton_config(bundle.network, name).encode())
        write_bytes(partial / VERSION / ONNX_FILE, content)
        write_bytes(partial / "warmup" / WARMUP_IMAGE, np.ascontiguousarray(golden.codes[0]).tobytes())
        write_arrays(partial / selfcheck.GOLDEN_FILE, {"images": golden.codes, "readouts": golden.trace.readouts})
        write_bytes(partial / "selfcheck.py", Path(selfcheck.__file__).read_bytes())
    return folder


def triton_config(network: IntegerNetwork, name: str) -> str:
    """The text of ``config.pbtxt``; shapes are without the batch axis."""
    shape, classes, search = network.input.shape, network.classes, "cudnn_conv_algo_search"
    return f"""\
# Written by spikeguard: T = {network.steps}, 'readout' is the integer sum over the steps, 'logits' are in real units.
name: "{name}"
backend: "onnxruntime"
max_batch_size: {MAX_BATCH}
input [ {{ name: "image" data_type: TYPE_UINT8 dims: {list(shape)} }} ]
output [
  {{ name: "readout" data_type: TYPE_INT32 dims: [{classes}] }},
  {{ name: "logits" data_type: TYPE_FP32 dims: [{classes}] }}
]
version_policy {{ latest {{ num_versions: 1 }} }}
instance_group [ {{ kind: KIND_AUTO count: 1 }} ]
# A batch is what has queued up while the one before it ran; nothing waits for more.
dynamic_batching {{ max_queue_delay_microseconds: 0 }}
# Exact integers in float32 on a GPU: no TF32, and convolutions that only multiply and add; see selfcheck.py.
parameters {{ key: "{search}" value {{ string_value: "{CONV_ALGO_SEARCH[CUDA_OPTIONS[search]]}" }} }}
optimization {{ execution_accelerators {{ gpu_execution_accelerator [ {{
  name: "cuda"
{_parameters(CUDA_OPTIONS)}
}} ] }} }}
model_warmup [
{_warmup("one golden image", 1, shape)},
{_warmup("a full batch of it", MAX_BATCH, shape)}
]
"""


def _parameters(options: Mapping[str, str]) -> str:
    return "\n".join(f'  parameters {{ key: "{key}" value: "{value}" }}' for key, value in options.items())


def _warmup(name: str, batch: int, shape: tuple[int, ...]) -> str:
    value = f'{{ data_type: TYPE_UINT8 dims: {list(shape)} input_data_file: "{WARMUP_IMAGE}" }}'
    return f'  {{ name: "{name}" batch_size: {batch} inputs {{ key: "image" value: {value} }} }}'


def _check_place(bundle: Bundle, repository: Path, name: str) -> None:
    if not MODEL_NAME.fullmatch(name):
        raise SpikeguardError(f"{name!r} cannot name a model; use letters, digits, dots, - and _")
    if repository.resolve().is_relative_to(bundle.path.resolve()):
        raise SpikeguardError(f"{repository} lies in the bundle {bundle.path}, which is never edited; choose another")
    folder = repository / name
    if folder.exists() and not (folder / "selfcheck.py").is_file():
        raise SpikeguardError(f"{folder} is there and is no model of this project; remove it or choose another name")
