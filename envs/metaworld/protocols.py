"""How others evaluate vision policies on Meta-World. Each protocol is data, and every result names its own.

All draw an episode's placements anew from the task's own regions; there are no fixed initial states.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What an evaluation fixes besides the policy. Steps are control steps of 12.5 ms."""

    name: str
    source: str  # where it was read
    settle_steps: int  # actions of zeros before the policy first looks; they do not count
    max_steps: int  # control steps of an episode, of every task
    executed: int  # actions of a predicted chunk that are executed before the next look; 0: the policy's own
    image_size: int  # pixels of the rendered square frames
    episodes: int  # of each task
    first_seed: int | None  # of those episodes, one seed after the other; None: the seeds are not fixed
    shadows: bool = True  # and reflections
    averaged: int = 0  # drawn so many times as large and averaged; 0: smoothed by the model's samples a pixel


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="lerobot",
            source="LeRobot, lerobot/envs/metaworld.py and lerobot-eval",
            settle_steps=0,
            max_steps=500,
            executed=0,
            image_size=480,
            episodes=10,
            first_seed=1000,
        ),
        Protocol(
            name="rlinf",
            source="RLinf, rlinf/envs/metaworld and examples/embodiment/config/env/metaworld_50.yaml",
            settle_steps=16,  # 15, and one more whose observation is the first that the policy gets
            max_steps=100,
            executed=5,
            image_size=480,
            episodes=10,
            first_seed=None,
        ),
        Protocol(
            name="quick",
            source="this project's, for experiments on a CPU",
            settle_steps=16,
            max_steps=200,
            executed=8,
            image_size=64,
            episodes=50,
            first_seed=None,
            shadows=False,  # five sixths of a frame's time
            averaged=2,  # half of what is left
        ),
    )
}


def protocol(name: str) -> Protocol:
    """The protocol of a name. Raises ValueError for an unknown one."""
    if name not in PROTOCOLS:
        raise ValueError(f"unknown Meta-World protocol {name!r}: expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
