"""Commands that use a bundle: run it, serve it, look into it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from hardware.errors import SpikeguardError
from pipeline.bundle_tables import population_table
from pipeline.commands import terminal
from pipeline.commands.settings import BundlePath


def emulate(
    path: BundlePath,
    images: Annotated[
        Path | None,
        typer.Option(help=".npz with images (uint8 codes) and perhaps labels; default: golden inputs"),
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="reference, emulator, lava, netx, onnxruntime or http://host:port")
    ] = "emulator",
    trace: Annotated[Path | None, typer.Option(help="save spikes, membranes and readouts to this .npz")] = None,
) -> None:
    """Run images through a deployed model and show its answers."""
    from hardware.files import read_arrays, write_arrays
    from hardware.formats.bundle import open_bundle
    from hardware.runtimes.opening import open_runtime
    from hardware.trace import pack_trace

    bundle = open_bundle(path)
    arrays = {"images": bundle.golden.codes} if images is None else read_arrays(images)
    if "images" not in arrays:
        raise SpikeguardError(f"{images} holds no array 'images'; save it with numpy.savez(path, images=…)")
    if "labels" in arrays and arrays["labels"].shape != arrays["images"].shape[:1]:
        raise SpikeguardError(f"{images} has labels of shape {arrays['labels'].shape}; save one label per image")
    if arrays["images"].shape[:1] in ((), (0,)):
        raise SpikeguardError(f"{images} holds no images; save at least one")
    model = open_runtime(runtime, bundle)
    start = time.perf_counter()
    result = model.run(arrays["images"], record="traces" if trace else "readouts")
    seconds = time.perf_counter() - start
    answers = result.readouts.argmax(1)
    counts = {str(label): int((answers == label).sum()) for label in range(bundle.network.classes)}
    terminal.out.print(terminal.table("answers", ("class", "images"), counts.items()))
    if "labels" in arrays:
        right = int((answers == arrays["labels"]).sum())
        terminal.out.print(f"accuracy {right / len(answers):.1%} ({right} of {len(answers)})")
    terminal.out.print(f"{len(answers)} images on {model.name} ({model.version}) in {seconds:.2f} s")
    if trace:
        write_arrays(trace, pack_trace(result))
        terminal.out.print(f"trace written to {escape(str(trace))}", soft_wrap=True)


def serve(
    path: BundlePath,
    runtime: Annotated[str, typer.Option(help="emulator, onnx, lava, netx or reference")] = "emulator",
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one; the log says which")] = 8000,
    name: Annotated[str, typer.Option(help="of the model, in the paths")] = "model",
    batch: Annotated[int, typer.Option(min=1, help="images the runtime gets at once, from what is queued")] = 64,
    queue: Annotated[int, typer.Option(min=1, help="images that may wait; more are refused with 503")] = 1024,
    concurrency: Annotated[int, typer.Option(min=1, help="batches that run at the same time")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="of one batch, in ONNX Runtime and the emulator")] = 1,
    body_mib: Annotated[int, typer.Option("--body-mib", min=1, max=64, help="of one request; more gets 413")] = 8,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds for a body to arrive, and for its answer")] = 30.0,
    drain: Annotated[float, typer.Option(min=0, help="seconds between SIGTERM and the end of listening")] = 1.0,
    log_level: Annotated[str, typer.Option("--log-level", help="debug (each request), info or warning")] = "info",
) -> None:
    """Answer the Open Inference Protocol over HTTP, once the golden traces are verified; needs no torch."""
    if log_level not in ("debug", "info", "warning"):
        terminal.usage(f"there is no log level {log_level!r}; choose debug, info or warning")
    from hardware.files import MIB
    from hardware.server.model import load_verified
    from hardware.server.service import Settings
    from hardware.server.serving import serve as serve_model

    settings = Settings(
        name=name,
        batch=batch,
        queue=queue,
        concurrency=concurrency,
        body_bytes=body_mib * MIB,
        timeout=timeout,
        drain_seconds=drain,
    )
    serve_model(lambda: load_verified(path, runtime, threads), settings, host, port, log_level)


def info(path: BundlePath) -> None:
    """Show what a bundle holds: semantics, populations, proofs, files."""
    from hardware.bounds import prove
    from hardware.formats.bundle import open_bundle

    bundle = open_bundle(path)
    network = bundle.network
    title = f"{path}: T = {network.steps}, input {network.input.shape}"
    terminal.out.print(terminal.table(*population_table(title, network, prove(network))))
    card = network.semantics_card()
    terminal.out.print(terminal.table("semantics", ("", ""), ((key, str(value)) for key, value in card.items())))
    terminal.show_files(bundle)
