"""Evaluations in which the robot is told other words (`eval.words`): whether a policy listens to its instruction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from envs.base import ChunkResult, EnvObservation, Episode, Pool, SlotsLost
from z1_jax.config.schema import ConfigError
from z1_jax.worlds import World


def reworded(text: str, words: Mapping[str, str]) -> str:
    """An instruction with whole words replaced, all at once: {"left": "right", "right": "left"} exchanges the two."""
    return " ".join(words.get(word, word) for word in text.split(" "))


def check_words(words: Mapping[str, str], seen: Sequence[World]) -> None:
    """Refuses words that leave what a task's robot is told as it is: such episodes would show nothing.

    Args:
        seen: what the environments of each task show.

    Raises:
        ConfigError: one line.
    """
    for world in seen if words else ():
        for text in world.instructions:
            if reworded(text, words) == text:
                said = ",".join(f"{one}:{other}" for one, other in words.items())
                raise ConfigError(
                    f"config key eval.words: got {said}, which changes nothing in “{text}” of {world.tasks[0]}; leave "
                    "the task out, or give words that all of its instructions have"
                )


class RewordedPool:
    """A pool whose observations hold other words; all else is the pool's own."""

    def __init__(self, pool: Pool, words: Mapping[str, str]):
        """Args: `words`: as of `reworded`."""
        self._pool, self._words = pool, dict(words)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def reset(self, slots: Sequence[int], episodes: Sequence[Episode]) -> list[EnvObservation]:
        return self._told(self._pool.reset, slots, episodes)

    def step(self, slots: Sequence[int], actions: Any) -> tuple[list[ChunkResult], list[EnvObservation | None]]:
        results, seen = zip(*self.finish(self._pool.begin_step(slots, actions)), strict=True)
        return list(results), list(seen)

    def finish(self, call: Any) -> list[Any]:
        return self._told(self._pool.finish, call)

    def _told(self, ask: Callable[..., list[Any]], *given: Any) -> list[Any]:
        try:
            return list(map(self._one, ask(*given)))
        except SlotsLost as error:
            error.answers = list(map(self._one, error.answers))
            raise

    def _one(self, answer: Any) -> Any:
        """Of a reset an observation, of a step a result and an observation; None where there is none."""
        if isinstance(answer, tuple):
            return answer[0], self._one(answer[1])
        return answer and dataclasses.replace(answer, instruction=reworded(answer.instruction, self._words))
