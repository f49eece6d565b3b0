"""A ray-casting renderer on mj_multiRay and NumPy: needs no OpenGL, and shows the same picture on every machine.

MuJoCo returns the normals of what its rays meet from 3.5 on; for older ones (RoboCasa pins 3.3.1) they are computed
from the geom's type and the hit point.
"""

from __future__ import annotations

import dataclasses
import functools

import mujoco
import numpy as np

from envs.kitchen.scene import GEOM, VISIBLE_GROUPS

_GROUPS = np.array([group in VISIBLE_GROUPS for group in range(6)], np.uint8)
RETURNS_NORMALS = "normal" in (mujoco.mj_multiRay.__doc__ or "")
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
    normals = np.zeros((count, 3)) if RETURNS_NORMALS else None
    mujoco.mj_multiRay(
        m=model, d=data, pnt=eye, vec=rays.ravel(), geomgroup=_GROUPS, flg_static=1, bodyexclude=-1,
        geomid=geom, dist=distance, nray=count, cutoff=20.0, **({} if normals is None else {"normal": normals.ravel()}),
    )  # fmt: skip
    hit = np.flatnonzero(geom >= 0)
    if normals is None:
        normals = np.zeros((count, 3))
        normals[hit] = _normals(model, data, eye + rays[hit] * distance[hit, None], geom[hit])
    bright = _brightness(rays, normals, light)
    floor = np.flatnonzero((geom >= 0) & (model.geom_type[geom] == int(GEOM.mjGEOM_PLANE)))  # the enum itself is slow
    if floor.size:
        tiles = np.floor((eye[:2] + rays[floor, :2] * distance[floor, None] - data.geom_xpos[geom[floor], :2]) / TILE)
        bright[floor] *= 0.8 + 0.2 * (tiles.sum(axis=1) % 2)
    # Colours by geom, the sky's last: where a ray meets nothing its geom is -1.
    palette = np.vstack([model.geom_rgba[:, :3], np.array(_SKY, np.float32)]) * np.float32(255.0 * light.intensity)
    bright[geom < 0] = 1.0
    image = palette[geom] * bright[:, None]
    return np.minimum(image + np.float32(0.5), 255.0).astype(np.uint8).reshape(size, size, 3)


def _brightness(rays: np.ndarray, normals: np.ndarray, light: Light) -> np.ndarray:
    """Lambertian brightness float32 [N] of surfaces with world `normals` [N, 3], seen along `rays` [N, 3]."""
    towards = np.asarray(light.direction) / np.linalg.norm(light.direction)
    lambert = np.maximum(np.einsum("ni,i->n", normals, towards), 0.0)
    facing = np.abs(np.einsum("ni,ni->n", normals, rays))
    return (light.ambient + light.diffuse * lambert + light.head * facing).astype(np.float32)


def _normals(model: mujoco.MjModel, data: mujoco.MjData, points: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Outward unit normals [N, 3] at world `points` [N, 3] on geoms `ids` [N]."""
    frames = data.geom_xmat.reshape(-1, 3, 3)[ids]
    local = np.einsum("nji,nj->ni", frames, points - data.geom_xpos[ids])
    return np.einsum("nij,nj->ni", frames, _local_normals(model, ids, local))


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
