"""The kitchen as a gymnasium environment: `import envs.kitchen.gym`, then `gymnasium.make("z1/OpenDrawer-v0")`.

Also without that import, by gymnasium's own syntax: `gymnasium.make("envs.kitchen.gym:z1/OpenDrawer-v0")`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from envs.base import Episode
from envs.kitchen.env import KitchenEnv
from envs.kitchen.robot import ACTION_DIM, STATE_DIM
from envs.kitchen.tasks import TASKS

try:
    import gymnasium
except ImportError as error:
    raise ImportError("envs.kitchen.gym needs gymnasium: pip install 'z1-jax[gym]'") from error

NAMESPACE = "z1"
SEEDS = 2**31  # episodes without a seed of their own draw one below this
STATE_BOUND = 4.0  # metres, and parts of quaternions: beyond what the joints allow
_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz ")


class GymKitchen(gymnasium.Env):
    """One task. An observation holds the cameras' pictures, the robot's state and the instruction.

    An action is float32 [12] in [-1, 1]; a control step's reward is 1 when the task is solved, which ends the episode,
    else 0; the horizon truncates it. Where the simulation breaks down the episode ends without a reward.
    `info["success"]` and `info["unstable"]` say which; `info["instruction"]` repeats the instruction.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, task: str, render_mode: str | None = None, render_size: int = 256, **options: Any):
        """Builds the scene; `options` are KitchenEnv's.

        Raises:
          ValueError: an unknown task, option value or render mode.
        """
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"unknown render mode {render_mode!r}: expected None or rgb_array")
        self.kitchen = KitchenEnv(task, **options)
        self.render_mode, self._render_size = render_mode, render_size
        spec = self.kitchen.spec
        picture = gymnasium.spaces.Box(0, 255, (spec.image_size, spec.image_size, 3), np.uint8)
        self.observation_space = gymnasium.spaces.Dict(
            {
                **{camera: picture for camera in spec.cameras},
                "state": gymnasium.spaces.Box(-STATE_BOUND, STATE_BOUND, (STATE_DIM,), np.float32),
                "instruction": gymnasium.spaces.Text(128, charset=_CHARACTERS),
            }
        )
        self.action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_DIM,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Starts the kitchen's episode of `seed`; without one, of a seed drawn from the last given one's stream."""
        super().reset(seed=seed)
        self.kitchen.reset(Episode(int(self.np_random.integers(SEEDS)) if seed is None else seed))
        return self._observe()

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """One control step (1/20 s)."""
        result = self.kitchen.step_chunk(np.asarray(action)[None])
        seen, info = self._observe()
        ended = result.success or result.unstable
        return seen, float(result.success), ended, result.done and not ended, info

    def render(self) -> np.ndarray | None:
        """The picture of the right camera, uint8 [size, size, 3], in mode rgb_array."""
        return self.kitchen.render(size=self._render_size) if self.render_mode else None

    def close(self) -> None:
        """Drops the scene."""
        self.kitchen.close()

    def _observe(self) -> tuple[dict, dict]:
        seen = self.kitchen.observe()
        # The instruction twice: of observations in shared memory, AsyncVectorEnv decodes Text once, before any reset.
        broken = bool(self.kitchen.broken)
        info = {"success": self.kitchen.success, "unstable": broken, "instruction": seen.instruction}
        return {**seen.images, "state": seen.state, "instruction": seen.instruction}, info


def register() -> None:
    """Makes every task known to gymnasium as `z1/<task>-v0`; done once."""
    for task in TASKS:
        name = f"{NAMESPACE}/{task}-v0"
        if name not in gymnasium.registry:
            gymnasium.register(name, entry_point="envs.kitchen.gym:GymKitchen", kwargs={"task": task})


register()
