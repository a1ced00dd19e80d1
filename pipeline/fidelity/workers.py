"""Processes that share the work of a check, none of whose deaths costs more than the piece it was at."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray

from hardware.errors import SpikeguardError
from hardware.network import IntegerNetwork
from pipeline.attacks.targets import FloatTarget, IntegerTarget
from pipeline.compute import use_cpu
from pipeline.interruption import listen, raise_if_interrupted
from pipeline.models.graph import LayerGraph
from pipeline.models.spiking import SpikingNetwork

SECONDS_BETWEEN_LOOKS = 0.5
GRACE_SECONDS = 10.0
"""For a process to tidy up what it was writing."""
MOST_DEATHS = 3
"""Of processes at one piece of work, before it is held to be the cause."""
Piece = TypeVar("Piece", bound=Callable[..., None])


@dataclass(frozen=True)
class _Model:
    """A target as another process is told it: what it prepared for itself stays behind."""

    network: IntegerNetwork | LayerGraph
    steps: int
    parameters: Mapping[str, NDArray[Any]]

    @staticmethod
    def of(target: FloatTarget | IntegerTarget) -> _Model:
        network = target.network
        if isinstance(network, IntegerNetwork):
            return _Model(network, network.steps, {})
        parameters = {name: value.detach().cpu().numpy() for name, value in network.state_dict().items()}
        return _Model(network.graph, network.steps, parameters)

    def target(self) -> FloatTarget | IntegerTarget:
        if isinstance(self.network, IntegerNetwork):
            return IntegerTarget(self.network)
        network = SpikingNetwork(self.network, self.steps)
        network.load_state_dict({name: torch.from_numpy(value) for name, value in self.parameters.items()})
        return FloatTarget(network)


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection


class Workers:
    """Processes that hold the models of a check; a context, at whose end they are gone.

    Args:
        jobs: how many, each with as many threads as this process.
        targets: models by name.
    """

    def __init__(self, jobs: int, targets: Mapping[str, FloatTarget | IntegerTarget]) -> None:
        self.jobs = jobs
        self._models = {name: _Model.of(target) for name, target in targets.items()}
        self._context = mp.get_context("spawn")  # threads of torch and a fork do not go together
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(GRACE_SECONDS)
            worker.process.kill()
            worker.process.join()
        self._workers.clear()

    def run(self, pieces: Sequence[Piece]) -> Iterator[Piece]:
        """Do all pieces of work, whose results are files; each is yielded when it is done.

        A piece whose process was killed is begun again by another.

        Args:
            pieces: are called with the targets, and with what they tell their progress.

        Raises:
            SpikeguardError: if a piece fails, or several processes died of it.
        """
        waiting, deaths = deque(enumerate(pieces)), Counter[int]()
        busy: dict[int, tuple[int, Piece]] = {}
        try:
            while waiting or busy:
                for place in range(self.jobs):
                    if waiting and place not in busy:
                        busy[place] = waiting.popleft()
                        self._hand_over(place, busy[place][1])
                pipes = {self._workers[place].pipe: place for place in busy}
                raise_if_interrupted()
                for pipe in wait(list(pipes), SECONDS_BETWEEN_LOOKS):
                    assert isinstance(pipe, Connection)
                    place = pipes[pipe]
                    number, piece = busy.pop(place)
                    try:
                        problem = pipe.recv()
                    except (EOFError, OSError):
                        deaths[number] += 1
                        if deaths[number] == MOST_DEATHS:
                            raise SpikeguardError(
                                f"{MOST_DEATHS} processes died at the same work; is memory short? Use fewer --jobs"
                            ) from None
                        waiting.appendleft((number, piece))
                        self._replace(place)
                        continue
                    if problem:
                        raise SpikeguardError(problem)
                    yield piece
        finally:
            if busy:  # their answers would be taken for those of other work
                self._end()

    def _hand_over(self, place: int, piece: Callable[..., None]) -> None:
        while len(self._workers) <= place:
            self._workers.append(self._start())
        try:
            self._workers[place].pipe.send(piece)
        except OSError:  # it died idle
            self._replace(place)
            self._workers[place].pipe.send(piece)

    def _replace(self, place: int) -> None:
        self._workers[place].process.join()
        self._workers[place] = self._start()

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(theirs, self._models, torch.get_num_threads()), daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, ours)


@contextmanager
def sharing(jobs: int, targets: Mapping[str, FloatTarget | IntegerTarget]) -> Iterator[Workers | None]:
    """Processes that share the work; none for a single job, which this process does itself."""
    if jobs == 1:
        yield None
        return
    with Workers(jobs, targets) as workers:
        yield workers


def _serve(pipe: Connection, models: Mapping[str, _Model], threads: int) -> None:
    """The whole life of a process: piece after piece of work, until the parent ends it or is gone."""
    listen()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    use_cpu(threads)
    try:
        targets = {name: model.target() for name, model in models.items()}
        while True:
            pipe.send(_problem(pipe.recv(), targets))
    except (KeyboardInterrupt, EOFError, OSError):
        return


def _problem(piece: Callable[..., None], targets: Mapping[str, FloatTarget | IntegerTarget]) -> str:
    """Do a piece of work, and say what went wrong; nothing if all is well."""
    try:
        piece(targets, raise_if_interrupted_at)
    except SpikeguardError as error:
        return str(error)
    except Exception:  # whatever it is, the parent has to say it
        return f"a process of --jobs failed; without --jobs it may say more\n{traceback.format_exc()}"
    return ""


def raise_if_interrupted_at(*_: object, **__: object) -> None:
    """Progress that nobody sees, at which a process may end."""
    raise_if_interrupted()


def _end_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
