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
            _changed(text, words, world.tasks[0])


def _changed(text: str, words: Mapping[str, str], task: str = "an episode") -> str:
    """The instruction with other words; refused where they are the same."""
    if (other := reworded(text, words)) != text:
        return other
    said = ",".join(f"{one}:{instead}" for one, instead in words.items())
    raise ConfigError(
        f"config key eval.words: got {said}, which changes nothing in “{text}” of {task}; leave the task out, or give "
        "words that all of its instructions have"
    )


class RewordedPool:
    """A pool whose observations hold other words; all else is the pool's own.

    A reset raises ConfigError at an episode whose instruction has none of them.
    """

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
            return answer[0], answer[1] and self._reworded(answer[1], reworded)
        return answer and self._reworded(answer, _changed)

    def _reworded(self, look: EnvObservation, how: Callable[[str, Mapping[str, str]], str]) -> EnvObservation:
        return dataclasses.replace(look, instruction=how(look.instruction, self._words))
