"""Training state on disk: saved while training goes on, restored exactly, on any mesh."""

import hashlib
import json
import signal
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from jaxrm import processes, sharding, tree
from jaxrm.train import State


class Preempted(SystemExit):
    """The run was told to stop and is saved; the process ends with SIGTERM's exit status, 143."""

    def __init__(self, step: int):
        super().__init__(f'stopped at step {step}; run again to go on')
        self.code = 128 + signal.SIGTERM


def digest(arrays: Any) -> str:
    """A hash of a tree of arrays, such as `tokens.Tokens`: names, types, shapes, contents."""
    h = hashlib.sha256()
    for path, x in jax.tree_util.tree_leaves_with_path(arrays):
        x = np.ascontiguousarray(processes.fetch(x))
        h.update(f'{sharding.leaf_name(path)} {x.dtype} {x.shape} '.encode())
        h.update(x.data.cast('B') if x.size else b'')
    return h.hexdigest()


def _handler() -> ocp.PyTreeCheckpointHandler:
    # By default orbax has each replica write a slice of every array, which takes a compiled
    # program a shape: the first save would wait for dozens of them to share a few megabytes.
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=2**26)
    handlers = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)


def _path(directory: epath.PathLike) -> epath.Path:
    """An absolute path, which orbax wants; gs://... is one, where its client is installed."""
    path = epath.Path(directory)
    if '://' not in str(directory):
        return path.absolute()
    try:
        path.exists()
    except ImportError as error:
        raise ValueError(f'{directory}: {error} (pip install "jaxrm[gcs]")') from error
    return path


def steps(directory: epath.PathLike) -> list[int]:
    """The steps of the complete checkpoints, as the first process finds them."""
    path = _path(directory)
    found = lambda: sorted(ocp.utils.checkpoint_steps(path)) if path.exists() else []  # noqa: E731
    return processes.alone(found)


def latest(directory: epath.PathLike) -> int | None:
    """The step of the latest of them."""
    return max(steps(directory), default=None)


def _named(state: State) -> dict[str, jax.Array]:
    """{name: leaf}, so that what is saved does not depend on the optimiser's classes."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {sharding.leaf_name(path): x for path, x in leaves}


def _check_equal(where: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ValueError naming the first field in which two flat mappings differ."""
    for name in sorted(found.keys() | expected.keys()):
        was, now = (repr(m[name]) if name in m else 'nothing' for m in (found, expected))
        if was != now:
            raise ValueError(f'{where}: {name}: found {was}, expected {now}')


def _check_run(directory: epath.Path, run: Mapping[str, Any]) -> None:
    path = directory / 'run.json'
    found = processes.alone(lambda: json.loads(path.read_text()))
    _check_equal(str(path), tree.flatten(found), tree.flatten(json.loads(json.dumps(run))))


def _check_leaves(where: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    kind = lambda leaves: {n: f'{x.dtype}{list(x.shape)}' for n, x in leaves.items()}  # noqa: E731
    _check_equal(where, kind(found), kind(expected))


def restore(
    directory: epath.PathLike,
    state: State,
    *,
    run: Mapping[str, Any] | None = None,
    step: int | None = None,
) -> State:
    """The latest complete checkpoint, placed like `state`, which is donated; without one, `state`.

    Or that of a `step`, such as `logs.best` finds. Raises ValueError naming the first leaf, or
    field of `run` (see `Saver`), that differs, and a step that is not kept.
    """
    kept = steps(directory)
    if step is not None and step not in kept:
        raise ValueError(f'{directory}: found checkpoints of the steps {kept}, expected {step}')
    step = max(kept, default=None) if step is None else step
    if step is None:
        return state
    if run is not None:
        _check_run(_path(directory), run)
    path = _path(directory) / str(step)
    reader = _handler()
    item = path / 'default'  # as CheckpointManager calls the only one
    saved, wanted = tree.flatten(reader.metadata(item).tree), _named(state)
    _check_leaves(str(path), saved, wanted)
    target = tree.unflatten({name: jax.ShapeDtypeStruct.like(x) for name, x in wanted.items()})
    for x in wanted.values():
        x.delete()  # its place is needed
    how = ocp.checkpoint_utils.construct_restore_args(target)
    args = ocp.args.PyTreeRestore(target, restore_args=how)
    leaves = tree.flatten(reader.restore(item, args=args))
    return jax.tree.unflatten(jax.tree.structure(state), [leaves[name] for name in wanted])


class Saver:
    """A hook for every step, the last of the hooks, to be entered as a context.

    Saves the state every `every` steps and at step `steps`, the last, while training goes on, and
    keeps the latest `keep`. On SIGTERM (where jax.distributed runs: to any of the processes) the
    step in progress is saved and `Preempted` raised. `directory` is a local one or gs://..., the
    same for all processes. `run` is what must be the same when the run goes on, such as its
    configuration and `digest(tokens)`; it stands in run.json. `before` is called before each save.

    Raises ValueError when the directory holds checkpoints of another run.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        steps: int,
        every: int,
        run: Mapping[str, Any],
        keep: int = 2,
        before: Callable[[], None] | None = None,
    ):
        self._directory = _path(directory)
        self._steps, self._every, self._keep, self._run = steps, every, keep, run
        self._before = before or (lambda: None)
        self._told = False

    def __enter__(self) -> Self:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            cleanup_tmp_directories=True,  # what killed runs left half-written
        )
        self._manager = ocp.CheckpointManager(
            self._directory, options=options, item_handlers=_handler()
        )
        if self._manager.latest_step() is not None:
            _check_run(self._directory, self._run)
        else:
            processes.alone(self._write_run)
        # jax.distributed has a handler of its own, which tells all processes.
        self._distributed = jax.distributed.is_initialized()
        if not self._distributed:
            self._handler = signal.signal(signal.SIGTERM, self._tell)
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self._manager.close()
        finally:
            if not self._distributed:
                signal.signal(signal.SIGTERM, self._handler)

    def __call__(self, done: int, state: State, metrics: Any) -> None:
        """Saves if it is time to, or if the run was told to stop."""
        stop = self._stopped(done)
        if stop or done % self._every == 0 or done == self._steps:
            self._before()
            args = ocp.args.PyTreeSave(tree.unflatten(_named(state)))
            self._manager.save(done, args=args, force=True)
        if stop:
            self._manager.wait_until_finished()
            raise Preempted(done)

    def _write_run(self) -> None:
        path, text = self._directory / 'run.json', json.dumps(self._run, indent=1)
        if '://' in str(path):
            path.write_text(text)  # whole or not at all, by itself
            return
        part = self._directory / 'run.json.part'
        part.write_text(text)
        part.replace(path)

    def _tell(self, number: int, frame: Any) -> None:
        self._told = True

    def _stopped(self, done: int) -> bool:
        if self._distributed:
            return multihost_utils.reached_preemption_sync_point(done)
        return self._told
