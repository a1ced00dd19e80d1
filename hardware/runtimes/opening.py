"""Opening a bundle on a runtime, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hardware.errors import SpikeguardError
from hardware.formats.bundle import NETX_FILE, NIR_FILE, ONNX_FILE, ONNX_STEP_FILE, Bundle
from hardware.runtimes.protocol import Runtime
from hardware.runtimes.remote import RemoteRuntime, is_service


def _reference(bundle: Bundle) -> Runtime:
    from hardware.runtimes.reference import ReferenceRuntime

    return ReferenceRuntime(bundle.network)


def _emulator(bundle: Bundle, threads: int = 1) -> Runtime:
    from hardware.runtimes.emulator import EmulatorRuntime

    return EmulatorRuntime(bundle.network, threads)


def _lava(bundle: Bundle) -> Runtime:
    from hardware.formats.nir_file import read_nir
    from hardware.runtimes.lava import LavaRuntime

    return LavaRuntime(read_nir(bundle.file(NIR_FILE)))


def _netx(bundle: Bundle) -> Runtime:
    from hardware.runtimes.lava import NetxRuntime

    return NetxRuntime(bundle.file(NETX_FILE), bundle.network)


def _onnxruntime(bundle: Bundle, threads: int = 1) -> Runtime:
    from hardware.runtimes.onnxruntime import OnnxRuntime

    return OnnxRuntime(bundle.file(ONNX_FILE), bundle.file(ONNX_STEP_FILE), threads)


# Imports happen on opening, so that a runtime's software is needed only by those who use it.
RUNTIMES: Mapping[str, Callable[[Bundle], Runtime]] = {
    "reference": _reference,
    "emulator": _emulator,
    "lava": _lava,
    "netx": _netx,
    "onnxruntime": _onnxruntime,
}
ALIASES = {"onnx": "onnxruntime"}
WITH_THREADS: Mapping[str, Callable[[Bundle, int], Runtime]] = {"emulator": _emulator, "onnxruntime": _onnxruntime}


FILES: Mapping[str, tuple[str, ...]] = {
    "lava": (NIR_FILE,),
    "netx": (NETX_FILE,),
    "onnxruntime": (ONNX_FILE, ONNX_STEP_FILE),
}
"""What a runtime reads of a bundle besides the integer network."""


def open_runtime(name: str, bundle: Bundle, threads: int = 1) -> Runtime:
    """The bundle's file for a runtime, loaded there.

    Args:
        name: a key of ``RUNTIMES``, or the address of a service that runs the bundle (``http://host:port``). Lava
            runs what it finds in ``model.nir``, netx ``model.net``, ONNX Runtime ``model.onnx``; reference and
            emulator the integer network.
        bundle: whose files are loaded.
        threads: of ONNX Runtime and the emulator; other runtimes have no such setting.

    Raises:
        SpikeguardError: if there is no such runtime, or its software or file is missing.
    """
    if is_service(name):
        return RemoteRuntime(name, bundle.network)
    name = ALIASES.get(name, name)
    if name not in RUNTIMES:
        raise SpikeguardError(f"there is no runtime {name!r}; choose among {', '.join(RUNTIMES)} and http://host:port")
    if threads == 1:
        return RUNTIMES[name](bundle)
    if name not in WITH_THREADS:
        raise SpikeguardError(f"the runtime {name} has no threads to set; leave them at 1")
    return WITH_THREADS[name](bundle, threads)
