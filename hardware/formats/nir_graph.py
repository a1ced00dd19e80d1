"""NIR files of other software: one flat graph without cycles, every node of a known kind with sane parameters.

Subgraphs are inlined. Nothing is said of what the nodes mean, for NIR leaves much of that open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import nir
import numpy as np
from numpy.typing import NDArray

from hardware.errors import RuleViolations, SpikeguardError, Violation
from hardware.formats.hdf5_guard import REMEDY, require_plain_hdf5
from hardware.network import Shape

NUMBERS: Mapping[str, tuple[str, ...]] = {
    "Affine": ("weight", "bias"),
    "Linear": ("weight",),
    "Conv1d": ("weight", "bias"),
    "Conv2d": ("weight", "bias"),
    "Scale": ("scale",),
    "IF": ("r", "v_threshold", "v_reset"),
    "LIF": ("tau", "r", "v_leak", "v_threshold", "v_reset"),
    "CubaLIF": ("tau_syn", "tau_mem", "r", "v_leak", "v_threshold", "v_reset", "w_in"),
    "LI": ("tau", "r", "v_leak"),
    "CubaLI": ("tau_syn", "tau_mem", "r", "v_leak", "w_in"),
}
"""Real parameters by kind of node."""
WHOLE: Mapping[str, tuple[str, ...]] = {
    "Conv1d": ("stride", "dilation", "groups"),
    "Conv2d": ("stride", "dilation", "groups"),
    "SumPool2d": ("kernel_size", "stride"),
    "AvgPool2d": ("kernel_size", "stride"),
}
"""Parameters that are positive whole numbers."""
KINDS = (*NUMBERS, "SumPool2d", "AvgPool2d", "Flatten", "Input", "Output")
MAX_NODES, MAX_SIZE = 10_000, 2**24
KNOWN = ", ".join(sorted(KINDS))
RECURRENT = "recurrent connections cannot be deployed: unroll them, or train without"


@dataclass(frozen=True)
class NirNode:
    """One node.

    Attributes:
        name: within the file, subgraphs before it.
        kind: its type in NIR.
        numbers: parameters by NIR's name, real ones as float64; ``padding`` as whole numbers, or "same" or "valid".
        sources: names of the nodes that it reads; their values add up.
    """

    name: str
    kind: str
    numbers: Mapping[str, Any]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class NirFile:
    """A graph from outside.

    Attributes:
        input_shape: of one sample at one step, without axes of one before the image.
        nodes: in an order in which each comes after what it reads; the input is first, the output last.
        metadata: of the graph; numbers and strings only.
    """

    input_shape: Shape
    nodes: tuple[NirNode, ...]
    metadata: Mapping[str, Any]


def read_nir_graph(path: Path) -> NirFile:
    """Read a NIR file of any software that writes nir 1.0.

    Raises:
        SpikeguardError: if the file is unsafe or damaged; ``RuleViolations`` names every node at fault.
    """
    require_plain_hdf5(path)
    try:
        graph = nir.read(str(path), type_check=False)
        flat = _Flat()
        ends = flat.add(graph, "")
    except RuleViolations:
        raise
    except Exception as error:  # the reader raises whatever its asserts, dictionaries and arrays raise
        raise SpikeguardError(f"{path} is not a well-formed NIR graph ({error!r}); {REMEDY}") from error
    problems = [*flat.problems, *_ends(flat, ends)]
    if problems:
        raise RuleViolations(str(path), problems)
    order = flat.order(*ends)
    if isinstance(order, Violation):
        raise RuleViolations(str(path), [order])
    read: dict[str, NirNode] = {}
    for name in order:
        node, sources = flat.nodes[name], tuple(sorted(flat.sources[name]))
        numbers = dict(_numbers(node, name, problems))
        read[name] = NirNode(name, type(node).__name__, numbers, sources)
    shape = _shape(flat.nodes[ends[0]].input_type.get("input"), ends[0], problems)
    if problems:
        raise RuleViolations(str(path), problems)
    metadata = {str(key): _plain(value) for key, value in graph.metadata.items()}
    return NirFile(shape, tuple(read.values()), metadata)


class _Flat:
    """Nodes and edges of a graph and its subgraphs."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}
        self.sources: dict[str, set[str]] = {}
        self.problems: list[Violation] = []

    def add(self, graph: Any, prefix: str) -> tuple[str, str]:
        """Add a graph; the names of its input and its output."""
        if not isinstance(graph, nir.NIRGraph):
            graph = nir.NIRGraph.from_list(graph)
        inner: dict[str, tuple[str, str]] = {}
        ends: dict[str, list[str]] = {"Input": [], "Output": []}
        for key, node in graph.nodes.items():
            name = f"{prefix}{key}"
            kind = type(node).__name__
            if isinstance(node, nir.NIRGraph):
                inner[key] = self.add(node, f"{name}.")
                continue
            inner[key] = (name, name)
            self.nodes[name], self.sources[name] = node, set()
            if kind not in KINDS:
                remedy = "a maximum or delay has no integer synapse; train without" if kind == "Delay" else REMEDY
                self.problems.append(Violation(name, "node is known", kind, KNOWN, remedy))
            if kind in ends:
                ends[kind].append(name)
        if len(self.nodes) > MAX_NODES:
            raise RuleViolations(
                "NIR graph", [Violation(prefix or "graph", "has few nodes", "more", f"{MAX_NODES:,}", REMEDY)]
            )
        for source, target in dict.fromkeys((str(a), str(b)) for a, b in graph.edges):
            unknown = [end for end in (source, target) if end not in inner]
            if unknown:
                edge = f"{prefix}{source}->{target}"
                self.problems.append(Violation(edge, "edge joins nodes", ", ".join(unknown), "known nodes", REMEDY))
                continue
            self.sources[inner[target][0]].add(inner[source][1])
        for kind, found in ends.items():
            if len(found) != 1:
                where = prefix.rstrip(".") or "graph"
                actual = ", ".join(found) or "none"
                self.problems.append(Violation(where, f"has one {kind.lower()}", actual, "one", "join them"))
        first, last = ((names or ["?"])[0] for names in ends.values())
        return first, last

    def order(self, first: str, last: str) -> list[str] | Violation:
        """Names of the nodes on the way from the input to the output, each after what it reads."""
        needed: set[str] = set()
        pending = [last]
        while pending:
            name = pending.pop()
            if name not in needed:
                needed.add(name)
                pending += self.sources[name]
        try:
            ordered = list(TopologicalSorter({name: self.sources[name] for name in sorted(needed)}).static_order())
        except CycleError as error:
            cycle = " -> ".join(error.args[1])
            return Violation(cycle, "edges form no cycle", "recurrent", "feed-forward", RECURRENT)
        return [first, *(name for name in ordered if name not in (first, last)), last]


def _ends(flat: _Flat, ends: tuple[str, str]) -> Iterator[Violation]:
    """What reads nothing, and what nothing may read."""
    if flat.problems:
        return
    first, last = ends
    if flat.sources[first]:
        remedy = RECURRENT
        yield Violation(first, "the input reads nothing", ", ".join(sorted(flat.sources[first])), "none", remedy)
    for name, sources in flat.sources.items():
        if not sources and name != first:
            yield Violation(name, "reads something", "nothing", "an edge into it", REMEDY)
        if last in sources:
            yield Violation(name, "nothing reads the output", last, "other nodes", RECURRENT)


def _numbers(node: Any, name: str, problems: list[Violation]) -> Iterator[tuple[str, Any]]:
    """A node's parameters; what is wrong with them goes into ``problems``."""
    kind = type(node).__name__
    for key in NUMBERS.get(kind, ()):
        values = np.asarray(getattr(node, key))
        if values.dtype.kind not in "fiub" or not values.size or not np.isfinite(values).all():
            actual = "NaN or infinite values" if values.dtype.kind == "f" else f"{values.dtype} {values.shape}"
            problems.append(Violation(name, f"{key} is finite", actual, "numbers", REMEDY))
        yield key, values.astype(np.float64) if values.dtype.kind in "fiub" else np.zeros(1)
    for key in WHOLE.get(kind, ()):
        yield key, _whole(getattr(node, key), 1, name, key, problems)
    if kind in ("Conv1d", "Conv2d", "SumPool2d", "AvgPool2d"):
        padding = node.padding.decode() if isinstance(node.padding, bytes) else node.padding
        if isinstance(padding, str):
            if padding not in ("same", "valid"):
                problems.append(Violation(name, "padding is known", repr(padding), "numbers, same, valid", REMEDY))
            yield "padding", padding
        else:
            yield "padding", _whole(padding, 0, name, "padding", problems)


def _whole(values: Any, smallest: int, name: str, key: str, problems: list[Violation]) -> NDArray[np.int64]:
    found = np.atleast_1d(np.asarray(values))
    sane = found.dtype.kind in "iuf" and 0 < found.size <= 2
    if not (sane and (found == np.rint(found)).all() and (found >= smallest).all() and (found <= MAX_SIZE).all()):
        problems.append(Violation(name, f"{key} is whole", str(found)[:60], f"{smallest} or more", REMEDY))
        return np.full(1, max(smallest, 1))
    return found.astype(np.int64)


def _shape(values: Any, name: str, problems: list[Violation]) -> Shape:
    """Of the input; batch axes of one that exporters left in front are dropped."""
    found = [] if values is None else np.atleast_1d(np.asarray(values)).tolist()
    while len(found) > 3 and found[0] == 1:
        found = found[1:]
    size = 1
    for axis in found:
        whole = isinstance(axis, int | float) and 1 <= axis <= MAX_SIZE and axis == int(axis)
        size *= int(axis) if whole else MAX_SIZE + 1
    if not 1 <= len(found) <= 3 or size > MAX_SIZE:
        actual = str(found)[:60]
        problems.append(Violation(name, "input has 1 to 3 axes", actual, f"up to {MAX_SIZE:,} values", REMEDY))
        return (1,)
    return tuple(int(axis) for axis in found)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if isinstance(value, np.generic) else value
