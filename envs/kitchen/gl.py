"""Pictures for people through MuJoCo's OpenGL renderer, which needs a GL library; policies never see these."""

from __future__ import annotations

import copy

import mujoco
import numpy as np

from envs.kitchen.render import Light
from envs.kitchen.scene import VISIBLE_GROUPS

_INSTALL = (
    "OpenGL is not there: install it (Debian: apt-get install libegl1 libgl1) and set MUJOCO_GL=egl, or use backend "
    "'rays', which needs nothing"
)


def render(model: mujoco.MjModel, data: mujoco.MjData, camera: int, size: int, light: Light) -> np.ndarray:
    """As envs.kitchen.render.render, with shadows.

    Raises:
      RuntimeError: no OpenGL; the message says what to install.
    """
    model = copy.copy(model)  # the lights and the buffer's size below are only for this picture
    model.vis.global_.offwidth = model.vis.global_.offheight = size
    model.vis.headlight.ambient[:] = light.ambient * light.intensity
    model.vis.headlight.diffuse[:] = light.diffuse * light.intensity
    model.vis.headlight.specular[:] = 0.1
    option = mujoco.MjvOption()
    option.geomgroup[:] = [group in VISIBLE_GROUPS for group in range(len(option.geomgroup))]
    try:
        renderer = mujoco.Renderer(model, size, size)
    except Exception as error:  # each platform's loader raises an error of its own
        raise RuntimeError(f"{_INSTALL} ({type(error).__name__}: {error})") from error
    try:
        renderer.update_scene(data, camera, option)
        return renderer.render().copy()
    finally:
        renderer.close()
