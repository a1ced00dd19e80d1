"""The catalogue of deployment errors that the check is scored on, each planted in one layer of the self-test network.

An error of an exporter is written into ONNX files, which ONNX Runtime then runs as they are; an error of a runtime
runs the right network wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from exporters.onnx import write_onnx, write_step_onnx
from hardware.errors import SpikeguardError
from hardware.formats.bundle import ONNX_FILE, ONNX_STEP_FILE, Bundle
from hardware.network import IntegerNetwork
from hardware.planted.networks import NETWORK_ERRORS
from hardware.planted.runtimes import INTEGRATION_ERRORS, PROPAGATION_ERRORS, PlantedRuntime
from hardware.runtimes.onnxruntime import OnnxRuntime
from hardware.runtimes.protocol import Runtime


@dataclass(frozen=True)
class Bug:
    """A deployment error.

    Attributes:
        name: in the words of those who make it.
        error: its key in the tables of planted errors.
        layer: the population that it is planted in.
    """

    name: str
    error: str
    layer: str

    @property
    def is_exported(self) -> bool:
        """Whether it is in a file, rather than in what runs the file."""
        return self.error in NETWORK_ERRORS

    def open(self, bundle: Bundle) -> Runtime:
        """The bundle deployed with this error.

        Raises:
            SpikeguardError: if the bundle's network has nothing that the error changes.
        """
        if self.is_exported:
            return _exported_wrongly(NETWORK_ERRORS[self.error](bundle.network, self.layer), bundle.network, self)
        plant = partial(PlantedRuntime, bundle.network, self.layer)
        if self.error in PROPAGATION_ERRORS:
            return plant(wrong_propagation=PROPAGATION_ERRORS[self.error])
        return plant(wrong_integration=INTEGRATION_ERRORS[self.error])


def _exported_wrongly(wrong: IntegerNetwork, right: IntegerNetwork, bug: Bug) -> Runtime:
    if _same_numbers(wrong, right):
        raise SpikeguardError(f"{bug.error} changes nothing in {bug.layer}; plant it in another layer")
    with TemporaryDirectory(prefix="spikeguard-") as folder:
        files = Path(folder) / ONNX_FILE, Path(folder) / ONNX_STEP_FILE
        writers: tuple[Callable[[IntegerNetwork, Path], None], ...] = (write_onnx, write_step_onnx)
        for write, file in zip(writers, files, strict=True):
            write(wrong, file)
        return OnnxRuntime(*files)


def _same_numbers(one: IntegerNetwork, other: IntegerNetwork) -> bool:
    return len(one.synapses) == len(other.synapses) and all(
        [
            *((a.weight == b.weight).all() for a, b in zip(one.synapses, other.synapses, strict=True)),
            *(
                (a.threshold, a.reset) == (b.threshold, b.reset) and (a.bias == b.bias).all()
                for a, b in zip(one.populations, other.populations, strict=True)
            ),
        ]
    )


FIRST, INNER, SUM, READOUT = "neurons1", "neurons2", "neurons3", "readout"
"""Populations of the self-test network: after the first convolution, in the residual branch, after the residual sum."""

BUGS: tuple[Bug, ...] = (
    Bug("scale of another layer", "scale_of_a_neighbour", INNER),
    Bug("threshold subtracted instead of reset to zero", "other_reset", INNER),
    Bug("≥ exported for >", "raised_threshold", SUM),
    Bug("fires at the threshold, ≥ for >", "fires_at_the_threshold", INNER),
    Bug("delay one step too long", "one_step_late", SUM),
    Bug("delay one step too short", "one_step_early", SUM),
    Bug("kernel transposed", "transposed_kernels", FIRST),
    Bug("kernel flipped, true convolution", "flipped_kernels", INNER),
    Bug("input channels swapped", "swapped_source_channels", INNER),
    Bug("output channels swapped", "swapped_output_channels", FIRST),
    Bug("flattened channels last, NHWC for NCHW", "channels_last_flattening", READOUT),
    Bug("bias dropped", "dropped_bias", SUM),
    Bug("bias running ahead of the spikes", "bias_one_step_early", INNER),
    Bug("bias one step late", "bias_one_step_late", READOUT),
    Bug("bias wrapped at 8 bits", "wrapped_bias", SUM),
    Bug("odd weights truncated to even ones", "even_weights", FIRST),
    Bug("residual lost", "lost_skip", SUM),
    Bug("pool averages instead of adding up", "average_pooling", INNER),
    Bug("state not reset between samples", "states_kept_between_samples", FIRST),
    Bug("normalisation skipped", "skipped_normalization", FIRST),
    Bug("padded with ones instead of zeros", "padded_with_ones", INNER),
    Bug("padded on one side only", "padded_behind", FIRST),
    Bug("stride off by one pixel", "strides_from_the_second_pixel", SUM),
)
