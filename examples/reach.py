"""A 2-D world of one's own: a dot is to be moved into a square, seen from above in a picture of 64 pixels.

python -m z1_jax.train --config=configs/grpo.py:small_world --config.env.suite=examples.reach:Reach
"""

import numpy as np

from envs.base import ChunkResult, EnvObservation, EnvSpec, Episode, Snapshot, checked_actions

SPEC = EnvSpec(task="Reach", cameras=("top",), image_size=64, action_dim=2, state_dim=2, control_hz=10.0, horizon=20)
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 80, 220)}
PLACES = ((-0.7, 0.0), (0.7, 0.0))
NEAR, SPEED = 0.07, 0.1  # the world is the square [-1, 1]; one step moves the dot by at most SPEED along each axis


class Reach:
    """Two squares of different colours; the instruction names one. Success: the dot lies in the middle of it."""

    spec = SPEC

    def reset(self, episode: Episode) -> None:
        rng = np.random.default_rng(episode.seed)
        self.colours = rng.permutation(list(COLOURS))[:2].tolist()
        self.wanted, self.dot = int(rng.integers(2)), rng.uniform(-0.8, 0.8, 2)
        self.square, self.steps, self.won = np.array(PLACES[self.wanted]), 0, False

    def observe(self) -> EnvObservation:
        picture = np.full((64, 64, 3), 245, np.uint8)
        squares = [(place, COLOURS[colour], 8) for place, colour in zip(PLACES, self.colours, strict=True)]
        for (x, y), colour, half in (*squares, (self.dot, (0, 0, 0), 2)):
            row, column = round(31.5 - 30 * y), round(31.5 + 30 * x)
            picture[max(0, row - half) : row + half, max(0, column - half) : column + half] = colour
        wanted = self.colours[self.wanted]
        return EnvObservation({"top": picture}, self.dot.astype(np.float32), f"reach the {wanted} square")

    def step_chunk(self, actions: np.ndarray) -> ChunkResult:
        executed = 0
        for action in np.clip(checked_actions(actions, SPEC.action_dim), -1, 1):
            if self.won or self.steps == SPEC.horizon:
                break
            self.dot = np.clip(self.dot + SPEED * action, -1, 1)
            self.steps, executed = self.steps + 1, executed + 1
            self.won = bool(np.abs(self.dot - self.square).max() < NEAR)
        return ChunkResult(executed, self.won, self.won or self.steps == SPEC.horizon)

    def snapshot(self) -> Snapshot:
        return Snapshot("reach", self.dot.copy(), {key: value for key, value in vars(self).items() if key != "dot"})

    def restore(self, snapshot: Snapshot) -> None:
        vars(self).update(snapshot.extra, dot=snapshot.physics.copy())

    def act(self) -> np.ndarray:  # the expert: straight towards the square
        return np.clip((self.square - self.dot) / SPEED, -1, 1).astype(np.float32)

    @staticmethod
    def expert(env: "Reach") -> "Reach":  # who demonstrates: anything with `act()`, here the environment itself
        return env

    def close(self) -> None: ...
