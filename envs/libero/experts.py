"""Scripted experts for libero_object, libero_spatial and libero_goal: each action is a function of the present state.

What to do follows from the task's own goal. They read privileged poses, which a policy must infer from its cameras.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from envs.libero.env import LiberoEnv
from envs.libero.tables import ACTION_DIM
from envs.libero.world import World

OPEN, CLOSE = -1.0, 1.0
POSITION_SCALE, ROTATION_SCALE = 0.05, 0.5  # metres and radians of a full action
DOWN = np.diag([1.0, -1.0, -1.0])  # the hand's nominal rotation: fingers down, opening along y
LEVEL = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])  # fingers along -y, opening along z
Y, Z = np.array([0.0, 1.0, 0.0]), np.array([0.0, 0.0, 1.0])

Strategy = Callable[[World], "Command"]


@dataclasses.dataclass(frozen=True)
class Command:
    """What the hand is to do next."""

    goal: np.ndarray  # [3], the wanted place of the point between the finger tips
    gripper: float  # OPEN or CLOSE
    turn: np.ndarray  # [3, 3], the wanted rotation of the hand


class Expert:
    """Moves the hand towards the pose that its strategy asks for, fingers pointing down."""

    def __init__(self, env: LiberoEnv):
        if env.raw is None:
            raise ValueError("the expert needs an episode: call reset first")
        self._world = World(env.raw)
        self._strategy = strategy(env.raw)

    def act(self) -> np.ndarray:
        """The clean action float32 [7] for the present state."""
        world = self._world
        world.update()
        command = self._strategy(world)
        action = np.zeros(ACTION_DIM, np.float32)
        action[:3] = np.clip(2.0 * (command.goal - world.eef) / POSITION_SCALE, -1.0, 1.0)
        action[3:6] = np.clip(_turn(world.hand, command.turn) / ROTATION_SCALE, -0.5, 0.5)
        action[6] = command.gripper
        return action


def make_expert(env: LiberoEnv) -> Expert:
    """The expert of the environment's task; it follows `reset` and `restore` by itself."""
    return Expert(env)


def _turn(present: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The small rotation vector [3] that takes one rotation [3, 3] towards another."""
    return 0.5 * sum((np.cross(present[:, i], wanted[:, i]) for i in range(3)), np.zeros(3))


def _about_z(angle: float) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])


def strategy(raw: Any) -> Strategy:
    """What to do for the goal of a task; `raw` is its robosuite environment.

    Raises:
        ValueError: no expert knows this goal.
    """
    goals = raw.parsed_problem["goal_state"]
    kind, thing, *where = goals[0]
    if len(goals) > 1 or kind not in ("in", "on", "open", "turnon"):
        raise ValueError(f"there is no expert for the goal {goals}")
    if kind == "open":
        return lambda w: open_drawer(w, thing)
    if kind == "turnon":
        return lambda w: turn_knob(w, thing)
    if "table" in where[0]:
        return lambda w: push(w, thing, where[0])
    grip, place = _grip(raw, thing), where[0]
    if kind == "in" and "cabinet" in place:
        return lambda w: into_drawer(w, grip, place)
    if kind == "in":
        return lambda w: carry(w, grip, _into_basket(w, place))
    return lambda w: carry(w, grip, _onto(w, place))


def _grip(raw: Any, thing: str) -> Top | Rim:
    if not any(dish in thing for dish in ("bowl", "plate")):
        return Top(thing)
    starts = [state[2] for state in raw.parsed_problem["initial_state"] if state[1] == thing and len(state) == 3]
    if any("cabinet" in place for place in starts):
        # High up and far away: on the side that the arm reaches best. In an open drawer there is room along x alone.
        return Rim(thing, (-0.9, 0.44), outwards=-0.015)
    return Rim(thing)


class Top:
    """A grip from above on something that fits between the fingers along y."""

    turn = DOWN

    def __init__(self, thing: str):
        self.thing = thing
        self._neck = 0.034 if "wine_bottle" in thing else np.inf  # metres: at its top it is thinner than elsewhere

    def point(self, world: World) -> np.ndarray:
        low, high = world.box(self.thing)
        middle = 0.5 * (low + high)
        middle[2] = max(low[2] + 0.008, high[2] - 0.035)
        middle[0] = world.free_x(self.thing, middle, 0.5 * (high - low)[0] - 0.012)
        return middle

    def held(self, world: World) -> bool:
        (low, high), eef = world.box(self.thing), world.eef
        between = low[0] < eef[0] < high[0] and abs(eef[1] - 0.5 * (low + high)[1]) < 0.025
        deep = abs(eef[2] - self.point(world)[2]) < 0.03
        return between and deep and world.gap < min(high[1] - low[1] + 0.008, self._neck)


class Rim:
    """A grip on the rim of a dish, one finger inside and one outside, on the side that looks along `direction`."""

    def __init__(self, thing: str, direction: tuple[float, float] = (0.0, 1.0), outwards: float = -0.010):
        self.thing = thing
        self._direction = np.array([*direction, 0.0])
        self._outwards = outwards  # metres from the rim to between the fingers: less room inside, or less outside
        self.turn = _about_z(np.arctan2(-direction[0], direction[1])) @ DOWN

    def point(self, world: World) -> np.ndarray:
        rim = world.rim(self.thing)
        edge = rim[np.argmax(rim @ self._direction)]
        return edge + self._outwards * self._direction - 0.028 * Z

    def held(self, world: World) -> bool:
        off = world.eef - self.point(world)
        return bool(np.hypot(*off[:2]) < 0.03 and -0.03 < off[2] < 0.022 and world.gap < 0.018)


@dataclasses.dataclass(frozen=True)
class Spot:
    """Where a thing goes. Heights are of its lowest point."""

    at: np.ndarray  # [3]
    clear: float  # the height to come at
    low: float  # the height to let go at, or to press down to where the check holds before
    size: float  # metres that it may be beside it
    around: float = 0.06  # metres around the thing within which fixtures are cleared


def _into_basket(world: World, region: str) -> Spot:
    _, high = world.box(region.removesuffix("_contain_region"))
    return Spot(world.position(region), high[2] + 0.03, high[2] - 0.06, 0.02)


def _onto(world: World, place: str) -> Spot:
    at = world.position(place)
    if "rack" in place:  # a slope that ends in a lip, which the region starts from
        at = at + np.array([0.0, -0.045, 0.03])
    return Spot(at, at[2] + 0.08, at[2] - 0.02, 0.012)


def carry(world: World, grip: Top | Rim, spot: Spot) -> Command:
    """Over the thing, down, close, up, across, down over the spot, open, up."""
    eef, low = world.eef, world.box(grip.thing)[0]
    offset = (spot.at - world.position(grip.thing)) * [1, 1, 0]
    far = float(np.linalg.norm(offset))
    if not grip.held(world):
        return _down_on(world, grip.point(world), grip.turn)
    if far < spot.size and low[2] < spot.low + 0.01:
        return Command(eef, OPEN, grip.turn)
    if far < spot.size + 0.02:
        down = spot.low + min(0.1, 4.0 * max(far - spot.size, 0.0)) - low[2]
        return Command(eef + offset + down * Z, CLOSE, grip.turn)
    rise = max(spot.clear, world.tops_below(grip.thing, spot.around) + 0.03) - low[2]
    free = np.clip((0.02 - rise) / 0.04 + 0.5, 0.0, 1.0)
    return Command(eef + free * offset + rise * Z, CLOSE, grip.turn)


def _down_on(world: World, point: np.ndarray, turn: np.ndarray) -> Command:
    """Down to a grip, the lower the better the hand is centred, and close."""
    off = world.eef - point
    aside, above = float(np.hypot(*off[:2])), float(off[2])
    if aside < 0.012 and abs(above) < 0.012:
        return Command(point, CLOSE, turn)
    askew = float(np.linalg.norm(_turn(world.hand, turn)))
    if above > 0.012 and (world.gap < 0.07 or askew > 0.15):  # first open and turn, above it
        return Command(np.array([*point[:2], max(world.eef[2], point[2] + 0.06)]), OPEN, turn)
    return Command(point + min(0.16, 3.0 * max(aside - 0.008, 0.0)) * Z, OPEN, turn)


def open_drawer(world: World, drawer: str) -> Command:
    """Before the handle, fingers level, one above and one below; close, and pull."""
    low, high = world.handle(drawer)
    handle, eef = 0.5 * (low + high), world.eef
    beside = eef - handle
    aside = float(np.hypot(beside[0], beside[2]))
    if aside < 0.02 and abs(beside[1]) < 0.02 and world.gap < high[2] - low[2] + 0.012:
        return Command(handle + 0.08 * Y, CLOSE, LEVEL)
    askew = float(np.linalg.norm(_turn(world.hand, LEVEL)))
    if aside < 0.012 and abs(beside[1]) < 0.012 and askew < 0.2:
        return Command(handle, CLOSE, LEVEL)
    back = 0.12 if askew > 0.3 or world.gap < 0.07 else min(0.12, 5.0 * max(aside - 0.006, 0.0))
    return Command(handle + back * Y, OPEN, LEVEL)


def into_drawer(world: World, grip: Top | Rim, drawer: str) -> Command:
    """Moves the thing aside, opens the drawer, lets the handle go, and carries the thing into it."""
    low, high = world.handle(drawer)
    handle, eef, opened = 0.5 * (low + high), world.eef, -world.joint(drawer)
    askew = float(np.linalg.norm(_turn(world.hand, DOWN)))
    at_handle = askew > 0.5 and bool((np.abs(eef - handle) < [0.05, 0.11, 0.05]).all())
    left = world.box(drawer.partition("_1_")[0] + "_1")[0][0]
    thing, top = world.position(grip.thing), world.box(grip.thing)[1][2]
    if opened < 0.02 and thing[0] > left - 0.035:  # first out of where the open drawer will be over it
        clear = np.array([left - 0.05, handle[1] + 0.14, 0.0])
        return carry(world, grip, Spot(clear, world.table + 0.025, world.table + 0.015, 0.010, 0.0))
    if opened < 0.02 and askew < 0.3 and eef[2] < top + 0.05 and np.linalg.norm((eef - thing)[:2]) < 0.1:
        return Command(eef + 0.06 * Z, OPEN, DOWN)
    if opened < 0.11 or (at_handle and eef[1] < handle[1] + 0.03 and opened < 0.147):
        return open_drawer(world, drawer)
    if at_handle:
        return Command(np.array([eef[0], handle[1] + 0.16, handle[2]]), OPEN, LEVEL)
    if askew > 0.4:  # turned here, where nothing is in the way
        return Command(handle + [-0.2, 0.17, 0.05], OPEN, DOWN)
    at = world.position(drawer)
    return carry(world, grip, Spot(at, at[2] + 0.07, at[2] + 0.01, 0.02))


def push(world: World, dish: str, place: str) -> Command:
    """Closed fingers down into the dish, and against its edge towards the place: behind it there is no room."""
    low, high = world.box(dish)
    middle, eef, radius = 0.5 * (low + high), world.eef, 0.5 * float(high[1] - low[1])
    way = (world.position(place) - world.position(dish)) * [1, 1, 0]
    way /= max(float(np.linalg.norm(way)), 1e-9)
    inside = (eef - middle) * [1, 1, 0]
    ahead = float(inside @ way)
    beside = inside - ahead * way
    if np.linalg.norm(inside) < radius - 0.005 and eef[2] < high[2] + 0.012:
        return Command(np.array([*(eef + 0.04 * way - beside)[:2], low[2] + 0.01]), CLOSE, DOWN)
    start = middle + 0.02 * way
    aside = float(np.linalg.norm((eef - start)[:2]))
    return Command(np.array([*start[:2], low[2] + 0.01 + min(0.12, 4.0 * max(aside - 0.01, 0.0))]), CLOSE, DOWN)


def turn_knob(world: World, stove: str) -> Command:
    """Takes the knob's fin from above and turns it."""
    point, _ = world.joint_axis(stove)
    _, high = world.handle(stove)
    point[2] = high[2] - 0.02
    angle, off = world.joint(stove), world.eef - point
    if np.hypot(*off[:2]) < 0.025 and abs(off[2]) < 0.02 and world.gap < 0.034:
        return Command(point, CLOSE, _about_z(angle + 0.5) @ DOWN)
    return _down_on(world, point, _about_z(angle) @ DOWN)
