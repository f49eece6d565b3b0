"""A ray-casting renderer on mj_multiRay and NumPy: needs no OpenGL, and shows the same picture on every machine.

Normals are computed from the geom's type and the hit point, because MuJoCo before 3.5 does not return them.
"""

from __future__ import annotations

import dataclasses
import functools

import mujoco
import numpy as np

from envs.kitchen.scene import GEOM, VISIBLE_GROUPS

_GROUPS = np.array([group in VISIBLE_GROUPS for group in range(6)], np.uint8)
_NORMAL_ARGUMENT = {"normal": None} if "normal" in (mujoco.mj_multiRay.__doc__ or "") else {}
TILE = 0.3  # metres, side of the floor's tiles
_SKY = np.array([0.75, 0.82, 0.90])


@dataclasses.dataclass(frozen=True)
class Light:
    """One directional light, an ambient term and a weak headlight."""

    direction: tuple[float, float, float] = (-0.45, 0.40, 0.80)  # towards the light; normalised when used
    ambient: float = 0.38
    diffuse: float = 0.50
    head: float = 0.18
    intensity: float = 1.0


@functools.lru_cache(maxsize=32)
def _rays(size: int, fov_degrees: float) -> np.ndarray:
    """Unit ray directions [size * size, 3] in the camera's frame, row by row from the top left."""
    half = np.tan(np.radians(fov_degrees) / 2.0)
    ticks = (np.arange(size) + 0.5) / size * 2.0 - 1.0
    x, y = np.meshgrid(ticks * half, -ticks * half)
    rays = np.stack([x, y, -np.ones_like(x)], axis=-1).reshape(-1, 3)
    rays /= np.linalg.norm(rays, axis=1, keepdims=True)
    rays.setflags(write=False)
    return rays


def render(model: mujoco.MjModel, data: mujoco.MjData, camera: int, size: int, light: Light) -> np.ndarray:
    """Renders a camera.

    Args:
      model: the model.
      data: with positions up to date (mj_kinematics, mj_camlight); not changed.
      camera: camera id.
      size: pixels; the picture is square.
      light: the light.

    Returns:
      uint8 [size, size, 3], RGB, upright.
    """
    eye = data.cam_xpos[camera]
    # einsum throughout: BLAS would start threads for these small products, and wait for them on a busy machine.
    rays = np.einsum("ij,nj->ni", data.cam_xmat[camera].reshape(3, 3), _rays(size, float(model.cam_fovy[camera])))
    count = size * size
    geom, distance = np.empty(count, np.int32), np.empty(count)
    mujoco.mj_multiRay(
        m=model, d=data, pnt=eye, vec=rays.ravel(), geomgroup=_GROUPS, flg_static=1, bodyexclude=-1,
        geomid=geom, dist=distance, nray=count, cutoff=20.0, **_NORMAL_ARGUMENT,
    )  # fmt: skip
    image = np.empty((count, 3))
    image[:] = _SKY * light.intensity
    hit = np.flatnonzero(geom >= 0)
    image[hit] = _shade(model, data, eye, rays[hit], geom[hit], distance[hit], light)
    return (np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8).reshape(size, size, 3)


def _shade(
    model: mujoco.MjModel,
    data: mujoco.MjData,
    eye: np.ndarray,
    rays: np.ndarray,
    ids: np.ndarray,
    distance: np.ndarray,
    light: Light,
) -> np.ndarray:
    """Lambertian colour [N, 3] where `rays` [N, 3] meet geoms `ids` [N] at `distance` [N]; planes get a checker.

    Works in each geom's own frame, where normals are simple: only the rays are turned there pixel by pixel.
    """
    frames = data.geom_xmat.reshape(-1, 3, 3)
    towards = np.asarray(light.direction) / np.linalg.norm(light.direction)
    local_light = np.einsum("gji,j->gi", frames, towards)
    local_eye = np.einsum("gji,gj->gi", frames, eye - data.geom_xpos)
    local_rays = np.einsum("nji,nj->ni", frames[ids], rays)
    points = local_eye[ids] + local_rays * distance[:, None]
    normals = _local_normals(model, ids, points)
    lambert = np.maximum(np.einsum("ni,ni->n", normals, local_light[ids]), 0.0)
    facing = np.abs(np.einsum("ni,ni->n", normals, local_rays))
    bright = light.ambient + light.diffuse * lambert + light.head * facing
    plane = np.flatnonzero(model.geom_type[ids] == int(GEOM.mjGEOM_PLANE))  # comparing with the enum itself is slow
    if plane.size:
        bright[plane] *= 0.8 + 0.2 * (np.floor(points[plane, :2] / TILE).sum(axis=1) % 2)
    return model.geom_rgba[ids, :3] * (light.intensity * bright)[:, None]


def _local_normals(model: mujoco.MjModel, ids: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Outward unit normals [N, 3] in the geoms' frames, from each geom's type and the hit point in its frame."""
    size, kinds = model.geom_size[ids], model.geom_type[ids]
    normals = np.zeros_like(points)
    for kind, function in _LOCAL_NORMALS.items():
        chosen = np.flatnonzero(kinds == kind)
        if chosen.size:
            normals[chosen] = function(points[chosen], size[chosen])
    return normals


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.sqrt(np.einsum("ni,ni->n", vectors, vectors)), 1e-12)[:, None]


def _box_normal(local: np.ndarray, size: np.ndarray) -> np.ndarray:
    axis = np.argmax(np.abs(local) - size, axis=1)
    rows = np.arange(len(local))
    normal = np.zeros_like(local)
    normal[rows, axis] = np.sign(local[rows, axis])
    return normal


def _cylinder_normal(local: np.ndarray, size: np.ndarray) -> np.ndarray:
    radius, height = size[:, 0], size[:, 1]
    cap = np.abs(local[:, 2]) - height > np.hypot(local[:, 0], local[:, 1]) - radius
    normal = local * np.array([1.0, 1.0, 0.0])
    normal[cap] = np.sign(local[cap, 2:]) * np.array([[0.0, 0.0, 1.0]])
    return _unit(normal)


def _capsule_normal(local: np.ndarray, size: np.ndarray) -> np.ndarray:
    normal = local.copy()
    normal[:, 2] -= np.clip(local[:, 2], -size[:, 1], size[:, 1])
    return _unit(normal)


_LOCAL_NORMALS = {
    int(GEOM.mjGEOM_PLANE): lambda local, size: np.broadcast_to([0.0, 0.0, 1.0], local.shape),
    int(GEOM.mjGEOM_BOX): _box_normal,
    int(GEOM.mjGEOM_CYLINDER): _cylinder_normal,
    int(GEOM.mjGEOM_CAPSULE): _capsule_normal,
    int(GEOM.mjGEOM_SPHERE): lambda local, size: _unit(local),
    int(GEOM.mjGEOM_ELLIPSOID): lambda local, size: _unit(local / size**2),
}
