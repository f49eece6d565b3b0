"""MuJoCo's OpenGL renderer for environments whose pictures need meshes and textures, in software or on a card."""

from __future__ import annotations

import atexit
import ctypes
import functools
import importlib
import os
import sys
import weakref
from typing import Any

import mujoco
import numpy as np

_GEOMS = 10_000  # that a scene may hold
_OPEN: weakref.WeakSet[Renderer] = weakref.WeakSet()


def check(name: str) -> None:
    """Refuses a machine without the OpenGL library, before a worker fails on it.

    Args:
        name: whose pictures these are.
    Raises:
        ValueError: the library is not there; one line that says what to install.
    """
    if not sys.platform.startswith("linux"):
        return
    software = os.environ.get("MUJOCO_GL") == "osmesa"
    library, packages = ("libOSMesa.so.8", "libosmesa6") if software else ("libEGL.so.1", "libegl1 libgl1-mesa-dri")
    try:
        ctypes.CDLL(library)
    except OSError as error:
        raise ValueError(f"{name} draws with OpenGL, and {library} is not there: apt-get install {packages}") from error


def _context(width: int, height: int) -> Any:
    """An OpenGL context of the kind that MUJOCO_GL names: egl, osmesa or glfw. Where it names none, EGL on Linux.

    MuJoCo itself looks at MUJOCO_GL once, when it is imported, and then takes GLFW, which needs a screen.
    """
    named = os.environ.get("MUJOCO_GL", "").lower() or ("egl" if sys.platform.startswith("linux") else "")
    module = f"mujoco.{named}" if named in ("egl", "osmesa", "glfw") else "mujoco.gl_context"
    return importlib.import_module(module).GLContext(width, height)


class Renderer:
    """Draws data of one model, or of others compiled from the same file; many environments can share one.

    It draws the state as MuJoCo last derived it, and changes nothing of it.
    """

    def __init__(
        self, model: mujoco.MjModel, size: int, shadows: bool = True, reflections: bool = True, averaged: int = 0
    ):
        """Opens a context.

        Args:
          model: what is drawn.
          size: pixels of the square pictures.
          shadows, reflections: whether they are drawn.
          averaged: 0 smooths edges by as many samples a pixel as the model says; N draws N times as large without them
            and averages over N × N pixels. In software N = 2 costs half of four samples, for each of which every
            triangle is set up anew.
        """
        self._context: Any = None
        self._averaged = max(1, averaged)
        large = size * self._averaged
        self._rectangle = mujoco.MjrRect(0, 0, large, large)
        model.vis.global_.offwidth = max(model.vis.global_.offwidth, large)
        model.vis.global_.offheight = max(model.vis.global_.offheight, large)
        context = _context(large, large)
        context.make_current()
        samples = model.vis.quality.offsamples
        model.vis.quality.offsamples = 0 if averaged else samples
        try:
            self._drawn = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150.value)
        finally:
            model.vis.quality.offsamples = samples
        mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._drawn)
        self._drawn.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        self._scene = mujoco.MjvScene(model, _GEOMS)
        self._scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = shadows
        self._scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = reflections
        self._option, self._camera = mujoco.MjvOption(), mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED
        self._context = context
        _OPEN.add(self)
        _close_at_exit()

    def render(self, model: mujoco.MjModel, data: mujoco.MjData, camera: int) -> np.ndarray:
        """The picture of a camera, uint8 [size, size, 3], RGB, as that camera is turned."""
        self._context.make_current()  # another renderer of this process may have drawn last
        self._camera.fixedcamid = camera
        everything = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(model, data, self._option, None, self._camera, everything, self._scene)
        mujoco.mjr_render(self._rectangle, self._scene, self._drawn)
        image = np.empty((self._rectangle.height, self._rectangle.width, 3), np.uint8)
        mujoco.mjr_readPixels(image, None, self._rectangle, self._drawn)
        return _averaged(image[::-1], self._averaged)  # OpenGL's rows start below

    def close(self) -> None:
        """Frees the context; the renderer draws no more."""
        if self._context is not None:
            self._context.make_current()
            self._drawn.free()
            self._context.free()
            self._context = None

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()


def _averaged(image: np.ndarray, by: int) -> np.ndarray:
    """The means, rounded to whole numbers, of squares of by × by pixels: uint8 [by·n, by·m, 3] → [n, m, 3]."""
    if by == 1:
        return image
    parts = [image[row::by, column::by] for row in range(by) for column in range(by)]
    sums = functools.reduce(np.add, parts, np.full(parts[0].shape, by * by // 2, np.uint32))
    return (sums // (by * by)).astype(np.uint8)


@functools.cache
def _close_at_exit() -> None:
    """Has renderers closed at the interpreter's end before MuJoCo closes OpenGL, which it registered before this."""

    @atexit.register
    def close() -> None:
        for renderer in list(_OPEN):
            renderer.close()
