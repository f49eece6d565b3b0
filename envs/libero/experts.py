"""Scripted experts for libero_object, libero_spatial and libero_goal: each action is a function of the present state.

What to do follows from the task's own goal. They read privileged poses, which a policy must infer from its cameras.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from envs.libero.env import LiberoEnv
from envs.libero.tables import ACTION_DIM
from envs.libero.world import World

OPEN, CLOSE = -1.0, 1.0
POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5  # metres and radians of a full action
DOWN = np.diag([1.0, -1.0, -1.0])  # the hand's nominal rotation: fingers down, opening along y
Y, Z = np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0])

Command = tuple[np.ndarray, float]  # the wanted place [3] of the point between the finger tips, and the gripper's
Strategy = Callable[[World], Command]


class Expert:
    """Moves the hand towards what its strategy wants, fingers pointing down."""

    def __init__(self, env: LiberoEnv):
        if env.raw is None:
            raise ValueError("the expert needs an episode: call reset first")
        self._world = World(env.raw)
        self._world.update()
        self._strategy = strategy(env.raw, self._world)

    def act(self) -> np.ndarray:
        """The clean action float32 [7] for the present state."""
        world = self._world
        world.update()
        goal, gripper = self._strategy(world)
        action = np.zeros(ACTION_DIM, np.float32)
        action[:3] = np.clip(2.0 * (goal - world.eef) / POSITION_SCALE, -1.0, 1.0)
        action[3:6] = np.clip(_turn(world.hand, DOWN) / ROTATION_SCALE, -0.3, 0.3)
        action[6] = gripper
        return action


def make_expert(env: LiberoEnv) -> Expert:
    """The expert of the environment's task; it follows `reset` and `restore` by itself."""
    return Expert(env)


def _turn(present: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The small rotation vector [3] that takes one rotation [3, 3] towards another."""
    return 0.5 * sum((np.cross(present[:, i], wanted[:, i]) for i in range(3)), np.zeros(3))


def strategy(raw, world: World) -> Strategy:
    """What to do for the goal of a task.

    Raises:
        ValueError: no expert knows this goal.
    """
    goals = raw.parsed_problem["goal_state"]
    if len(goals) == 1:
        kind, thing, *place = goals[0]
        if kind in ("in", "on") and thing in raw.objects_dict:
            where = place[0]
            grip = Rim(thing) if _is_dish(thing) else Top(thing)
            if "basket" in where:
                return lambda w: carry(w, grip, _basket(w, where))
            return lambda w: carry(w, grip, _onto(w, where))
    raise ValueError(f"there is no expert for the goal {goals}")


def _is_dish(thing: str) -> bool:
    return "bowl" in thing or "plate" in thing


class Top:
    """A grip from above on something that fits between the fingers along y."""

    def __init__(self, thing: str):
        self.thing = thing

    def point(self, world: World) -> np.ndarray:
        low, high = world.box(self.thing)
        middle = 0.5 * (low + high)
        middle[2] = max(low[2] + 0.008, high[2] - 0.035)
        return middle

    def held(self, world: World, aside: float, above: float) -> bool:
        low, high = world.box(self.thing)
        return aside < 0.025 and abs(above) < 0.03 and world.gap < high[1] - low[1] + 0.008


class Rim:
    """A grip on the rim of a dish, on the side that looks along +y: one finger inside, one outside."""

    def __init__(self, thing: str):
        self.thing = thing

    def point(self, world: World) -> np.ndarray:
        low, high = world.box(self.thing)
        return np.array([0.5 * (low[0] + high[0]), high[1] - 0.010, high[2] - 0.028])

    def held(self, world: World, aside: float, above: float) -> bool:
        return aside < 0.03 and -0.03 < above < 0.022 and world.gap < 0.018


class Spot:
    """Where a thing goes: over `at`, from above `clear`, down to `low`, heights of its lowest point."""

    def __init__(self, at: np.ndarray, clear: float, low: float, size: float):
        self.at, self.clear, self.low, self.size = at, clear, low, size


def _basket(world: World, region: str) -> Spot:
    basket = region.removesuffix("_contain_region")
    low, high = world.box(basket)
    return Spot(world.position(region), high[2] + 0.03, high[2] - 0.06, 0.02)


def _onto(world: World, place: str) -> Spot:
    at = world.position(place)
    return Spot(at, at[2] + 0.08, at[2] - 0.02, 0.012)


def carry(world: World, grip, spot: Spot) -> Command:
    """Over the thing, down, close, up, across, down over the spot, open, up."""
    eef, point = world.eef, grip.point(world)
    low, high = world.box(grip.thing)
    aside, above = float(np.linalg.norm((eef - point)[:2])), float(eef[2] - point[2])
    offset = (spot.at - world.position(grip.thing)) * [1, 1, 0]
    far = float(np.linalg.norm(offset))
    if not grip.held(world, aside, above):
        return _down_on(world, point, aside, above)
    if far < spot.size and low[2] < spot.low + 0.01:
        return eef, OPEN
    if far < spot.size + 0.02:
        return eef + offset + (spot.low + min(0.1, 4.0 * max(far - spot.size, 0.0)) - low[2]) * Z, CLOSE
    rise = spot.clear - low[2]
    free = np.clip((0.02 - rise) / 0.04 + 0.5, 0.0, 1.0)
    return eef + free * offset + rise * Z, CLOSE


def _down_on(world: World, point: np.ndarray, aside: float, above: float) -> Command:
    """Down to a grip, the lower the better the hand is centred, and close."""
    if aside < 0.012 and abs(above) < 0.012:
        return point, CLOSE
    if above > 0.012 and world.gap < 0.07:  # first open, above it
        return np.array([*point[:2], max(world.eef[2], point[2] + 0.06)]), OPEN
    return point + min(0.16, 3.0 * max(aside - 0.008, 0.0)) * Z, OPEN
