"""SFT's loss on episodes that it is not trained on, beside that on episodes that it is.

Their difference is what the policy knows by heart. Closed-loop success is what counts in the end; this is what tells
before, and without a simulator, whether more demonstrations would help.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int, Shaped

from z1_jax import distributed
from z1_jax.data.dataset import Dataset
from z1_jax.data.loader import Batch, Loader, batch_observation
from z1_jax.errors import UserError
from z1_jax.rl import flow
from z1_jax.sharding import replicated
from z1_jax.types import Observation

HELD_OUT, TRAINED = "validation/held_out", "validation/trained"  # names of the two losses in metrics.jsonl
MOST = 512  # records of either kind that are looked at
BY_HEART = 1.5  # times the loss of what was trained on: above it, more demonstrations are worth naming


@dataclasses.dataclass(frozen=True)
class Split:
    """A dataset's records by what becomes of them, ascending."""

    trained: Int[np.ndarray, " n"]
    held_out: Int[np.ndarray, " m"]
    episodes: int = 0  # that are held out


def split(dataset: Dataset, share: float, seed: int, records: Int[np.ndarray, " n"] | None = None) -> Split:
    """Holds out whole episodes: of each task a random `share`, at least one and never the last.

    Args:
        records: whole episodes' that are split, ascending; None: all.

    Raises:
        UserError: no task has two episodes.
    """
    by_task: dict[str, list[Any]] = {}
    own = np.arange(len(dataset)) if records is None else records
    mine = np.isin([row.first_record for row in dataset.episodes], own)
    for row in itertools.compress(dataset.episodes, mine):
        by_task.setdefault(row.task, []).append(row)
    rng, held = np.random.default_rng([seed, 0x5A11D]), []
    for rows in by_task.values():
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held += [rows[number] for number in rng.permutation(len(rows))[:count]]
    if not held:
        raise UserError(
            f"config key sft.validation: no task of {dataset.path} has two episodes, so none can be held out; "
            "set 0, or bring more demonstrations"
        )
    apart = np.sort(np.concatenate([row.span for row in held]))
    return Split(np.setdiff1d(own, apart), apart, len(held))


def records_to_train(
    dataset: Dataset, tasks: Sequence[Sequence[str]], share: float, seed: int
) -> tuple[Int[np.ndarray, " n"] | None, Split | None]:
    """The records that SFT is trained on, None for all, and the split that they come from, where one is held out.

    Args:
        tasks: the run's, as in `Dataset.episodes_of`; `share`: `sft.validation`.

    Raises:
        UserError: as `split`.
    """
    own = dataset.records_of(tasks)
    parts = split(dataset, share, seed, own) if share else None
    return (parts.trained if parts else own), parts


class Validation:
    """The losses of a policy under training. Flow times and noise of a record are the same at each call."""

    def __init__(
        self,
        graphdef: nnx.GraphDef,
        loader: Loader,
        dataset: Dataset,
        parts: Split,
        flows: int,
        counted: Shaped[jax.Array, " A"],
        mesh: Mesh,
        batch_size: int,
    ):
        """Args: `loader`: where records come from; `flows`, `counted`: of the loss, as SFT has them."""
        self._loader, self._mesh, self._batch_size = loader, mesh, batch_size
        tasks = np.array([row.task for row in dataset.episodes]).repeat([row.records for row in dataset.episodes])
        alike = parts.trained[np.isin(tasks[parts.trained], tasks[parts.held_out])]  # of tasks with held-out episodes
        count = min(MOST, len(parts.held_out), len(alike))
        self._records = np.concatenate([_some(records, count) for records in (parts.held_out, alike)])
        self._held, self._tasks = count, tasks[self._records]

        def losses(
            acting: Any, frozen: Any, observation: Observation, actions: jax.Array, record: jax.Array
        ) -> Float[jax.Array, " B"]:
            model = nnx.merge(graphdef, acting, frozen)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0x5A11D), record)
            t = jax.vmap(lambda key: flow.training_times(key, (flows,)))(keys)
            shape = (flows, *actions.shape[1:])
            noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 1), shape))(keys)
            x_t, target = flow.training_pair(actions[:, None], noise, t)
            error = jnp.square(model.velocity(model.encode_prefix(observation), x_t, t) - target)
            return jnp.sum(error * counted, (1, 2, 3)) / (jnp.sum(counted) * flows * actions.shape[1])

        self._losses = jax.jit(losses, out_shardings=replicated(mesh))

    def __call__(self, acting: Any, frozen: Any) -> dict[str, float]:
        """Mean losses, tasks alike: of held-out episodes, of trained ones, and `tasks/NAME/…` where there are several.

        A task without held-out episodes tells nothing of what is known by heart and is in neither.

        Args:
            acting, frozen: the parameters that the policy acts with, split as SFT splits them.
        """
        out = np.concatenate([self._batch(acting, frozen, rows) for rows in self._batches()])[: len(self._records)]
        held = np.arange(len(out)) < self._held
        by_task = {
            task: {
                name: float(np.mean(out[part & (self._tasks == task)]))
                for name, part in ((HELD_OUT, held), (TRAINED, ~held))
                if (part & (self._tasks == task)).any()
            }
            for task in dict.fromkeys(self._tasks.tolist())
        }
        means = {
            name: float(np.mean([losses[name] for losses in by_task.values() if name in losses]))
            for name in (HELD_OUT, TRAINED)
        }
        several = {f"tasks/{task}/{name}": value for task, losses in by_task.items() for name, value in losses.items()}
        return {**means, **(several if len(by_task) > 1 else {})}

    def _batches(self) -> Iterable[Int[np.ndarray, " B"]]:
        missing = -len(self._records) % self._batch_size
        padded = np.concatenate([self._records, np.repeat(self._records[-1:], missing)])
        return padded.reshape(-1, self._batch_size)

    def _batch(self, acting: Any, frozen: Any, records: Int[np.ndarray, " B"]) -> Float[np.ndarray, " B"]:
        batch: Batch = self._loader.rows(records)
        observation, actions, number = distributed.put_batch(
            (batch_observation(batch), batch["actions"], batch["index"].astype(np.uint32)), self._mesh
        )
        return distributed.whole(self._losses(acting, frozen, observation, actions, number))


def _some(records: Int[np.ndarray, " n"], count: int) -> Int[np.ndarray, " count"]:
    """So many of them, evenly spread."""
    return records[np.arange(count) * len(records) // count]


def sentence(losses: dict[str, float], collected: bool) -> str:
    """What the losses say, in a line. Args: `collected`: the run collected its demonstrations itself."""
    held, trained = losses[HELD_OUT], losses[TRAINED]
    line = f"loss on held-out episodes: {held:.4f}, on trained ones {trained:.4f}"
    if held <= BY_HEART * trained:
        return line
    which = " (demos.episodes)" if collected else ""
    return f"{line}: much of it is known by heart, so more demonstrations{which} help more than more steps"
