"""How others evaluate LIBERO for their published numbers. Each protocol is data, and every result names its own.

All three turn pictures by 180 degrees. LIBERO's frames come upside down, so what their policies see is upright and
mirrored; a policy trained on such pictures must be shown such pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from envs.base import Episode

TRAIN_ON = ("placements", "initial_states")  # what training episodes start from
ON_INITIAL_STATES = "trained on the evaluation's own initial states"  # label of the latter


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What an evaluation fixes besides the policy. Steps are control steps of 50 ms."""

    name: str
    source: str  # where it was read
    settle_steps: int  # no-ops (arm still, gripper opening) before the policy first looks; they do not count
    max_steps: Mapping[str, int]  # suite -> control steps of an episode; a perturbed suite has those of its base
    executed: int  # actions of a predicted chunk that are executed before the next look
    image_size: int  # pixels of the rendered square frames
    model_image_size: int  # pixels of the frames that the policy gets, resized with padding
    mirrored: bool  # pictures are turned by 180 degrees as they come, so that they are upright and mirrored
    episodes: int  # initial states 0, 1, … of each task that are evaluated
    seed: int  # draws the fixtures' poses, which initial states do not hold

    def evaluation(self, task: str) -> list[Episode]:
        """The episodes that a task is evaluated on."""
        return [Episode(self.seed, task, init_state=number) for number in range(self.episodes)]

    def horizon(self, suite: str) -> int:
        """Control steps of an episode in a suite, or in the base of a perturbed one.

        Raises:
            ValueError: the protocol does not cover this suite.
        """
        base = next((name for name in (suite, suite.rpartition("_")[0]) if name in self.max_steps), None)
        if base is None:
            raise ValueError(
                f"protocol {self.name} sets no number of steps for {suite}, only for {', '.join(self.max_steps)}: "
                "give a horizon"
            )
        return self.max_steps[base]


_SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")

PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="openpi",
            source="openpi, examples/libero/main.py",
            settle_steps=10,
            max_steps=dict(zip(_SUITES, (220, 280, 300, 520, 400), strict=True)),
            executed=5,
            image_size=256,
            model_image_size=224,
            mirrored=True,
            episodes=50,
            seed=7,
        ),
        Protocol(
            name="rlinf",
            source="RLinf, rlinf/envs/libero and the π0.5 configs of examples/embodiment",
            settle_steps=15,
            max_steps=dict(zip(_SUITES[:4], (240, 240, 320, 480), strict=True)),
            executed=5,
            image_size=256,
            model_image_size=224,
            mirrored=True,
            episodes=50,
            seed=0,
        ),
        Protocol(
            name="lerobot",
            source="LeRobot, lerobot/envs/libero.py and its page on LIBERO",
            settle_steps=10,
            max_steps=dict(zip(_SUITES, (280, 280, 300, 520, 400), strict=True)),
            executed=10,
            image_size=360,
            model_image_size=224,
            mirrored=True,
            episodes=10,
            seed=1000,
        ),
    )
}


def protocol(name: str) -> Protocol:
    """The protocol of a name. Raises ValueError for an unknown one."""
    if name not in PROTOCOLS:
        raise ValueError(f"unknown LIBERO protocol {name!r}: expected one of {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
