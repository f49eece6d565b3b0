"""The robot: a mobile base with a torso lift and a two-finger hand on a six-joint gantry, and its controller.

The hand's frame has its origin at the tool point between the fingertips; x is the approach direction and y the
direction in which the fingers open. At zero rotation the hand points forward; pitch +90 degrees points it down.
"""

from __future__ import annotations

import dataclasses

import mujoco
import numpy as np

from envs.kitchen.scene import SceneBuilder

ACTION_DIM = 12
STATE_DIM = 16
CONTROL_HZ = 20.0
SUBSTEPS = 10
PHYSICS = 2  # raised by changes after which the same actions give other results; 2: the wrist has an armature

POSITION_SCALE = 0.05  # metres a unit of action[0:3], in the base's frame
ROTATION_SCALE = 0.5  # radians a unit of action[3:6], axis-angle in the base's frame
BASE_SCALE = np.array([0.025, 0.025, 0.05, 0.01])  # base x, y (m), yaw (rad), torso (m) a unit and control step
GRIPPER_SCALE = 0.5  # of the way from -1 (open) to +1 (closed) a unit and control step
FINGER_OPEN = 0.045  # metres of travel of each finger

ARM_JOINTS = ("arm_x", "arm_y", "arm_z", "arm_pitch", "arm_yaw", "arm_roll")
BASE_JOINTS = ("base_x", "base_y", "base_yaw", "torso")
FINGER_JOINTS = ("finger_left", "finger_right")

ARM_LOW = np.array([0.05, -0.75, 0.20, -1.0, -1.3, -3.0])
ARM_HIGH = np.array([1.10, 0.75, 1.90, 2.2, 1.3, 3.0])
ARM_LEASH = np.array([0.06, 0.06, 0.06, 0.5, 0.5, 0.5])  # how far the target may lead the measured joints
BASE_LOW = np.array([-1.0, -1.5, -3.1, -0.20])
BASE_HIGH = np.array([1.0, 1.5, 3.1, 0.30])
BASE_LEASH = np.array([0.05, 0.05, 0.1, 0.02])

_HAND_MASS, _HAND_INERTIA, _OMEGA = 1.0, 0.004, 60.0
# kg m^2 on the wrist's hinges: at a yaw of 90 degrees the axes of pitch and roll fall together, and without armature
# the inertia is singular there; see docs/kitchen-tasks.md, "When physics breaks down".
_WRIST_ARMATURE = 0.002


def add_robot(scene: SceneBuilder, focus: np.ndarray, left_eye: np.ndarray) -> None:
    """Adds the robot and its three cameras.

    Args:
      scene: the scene.
      focus: the point, in the base's frame, that the two agent views look at.
      left_eye: offset from `focus` to the left camera.
    """
    base = scene.body("base", [0, 0, 0])
    base.gravcomp = 1
    for name, axis, limits in (("base_x", [1, 0, 0], 0), ("base_y", [0, 1, 0], 1)):
        scene.slide(base, name, axis, [BASE_LOW[limits] - 0.1, BASE_HIGH[limits] + 0.1])
    scene.hinge(base, "base_yaw", [0, 0, 1], [BASE_LOW[2] - 0.1, BASE_HIGH[2] + 0.1])
    scene.box(base, "hand", [-0.12, 0, 0.20], [0.25, 0.22, 0.16], contact="robot", mass=80.0)
    scene.camera(base, "robot0_agentview_left", focus + left_eye, focus, 54.0)
    scene.camera(base, "robot0_agentview_right", focus + np.array([-0.75, -0.60, 0.50]), focus, 60.0)
    torso = scene.body("torso", [0, 0, 0], base)
    torso.gravcomp = 1
    scene.slide(torso, "torso", [0, 0, 1], [BASE_LOW[3] - 0.05, BASE_HIGH[3] + 0.05])
    scene.box(torso, "arm", [-0.20, 0, 0.75], [0.06, 0.08, 0.45], contact="none", mass=20.0)
    _add_hand(scene, torso)
    _add_servos(scene)


def _add_hand(scene: SceneBuilder, torso: object) -> None:
    hand = scene.body("hand", [0, 0, 0], torso)
    hand.gravcomp = 1
    hand.explicitinertial = True
    hand.mass, hand.ipos, hand.inertia = _HAND_MASS, [0, 0, 0], [_HAND_INERTIA] * 3
    for i, axis in enumerate(([1, 0, 0], [0, 1, 0], [0, 0, 1])):
        scene.slide(hand, ARM_JOINTS[i], axis, [ARM_LOW[i] - 0.1, ARM_HIGH[i] + 0.1])
    for i, axis in enumerate(([0, 1, 0], [0, 0, 1], [1, 0, 0]), start=3):
        limits = [ARM_LOW[i] - 0.1, ARM_HIGH[i] + 0.1]
        scene.hinge(hand, ARM_JOINTS[i], axis, limits, armature=_WRIST_ARMATURE)
    scene.box(hand, "hand", [-0.09, 0, 0], [0.025, 0.050, 0.018], contact="robot")
    scene.capsule(hand, "arm", [-0.13, 0, 0], [-0.32, 0, 0.0], 0.03, contact="none")
    hand.add_site(name="eef", pos=[0, 0, 0])
    scene.camera(hand, "robot0_eye_in_hand", [-0.15, 0, 0.12], [0.10, 0, 0.0], 75.0)
    for name, side in zip(FINGER_JOINTS, (1, -1), strict=True):
        finger = scene.body(name, [0, 0, 0], hand)
        finger.gravcomp = 1
        scene.slide(finger, name, [0, side, 0], [0, FINGER_OPEN], armature=0.15, solref_limit=[0.01, 1])
        scene.box(
            finger, "finger", [-0.026, side * 0.006, 0], [0.036, 0.006, 0.011], contact="robot",
            mass=0.05, friction=[1.5, 0.02, 0.001], condim=4, solref=[0.01, 1],
        )  # fmt: skip


def _add_servos(scene: SceneBuilder) -> None:
    for i, joint in enumerate(ARM_JOINTS):
        mass, force = (_HAND_MASS + 0.1, 80.0) if i < 3 else (_HAND_INERTIA + 0.001, 8.0)
        scene.servo(joint, mass * _OMEGA**2, 2 * mass * _OMEGA, force, [ARM_LOW[i], ARM_HIGH[i]])
    for i, joint in enumerate(BASE_JOINTS):
        mass, force = (100.0, 5000.0) if i != 2 else (20.0, 2000.0)
        scene.servo(joint, mass * 40.0**2, 2 * mass * 40.0, force, [BASE_LOW[i], BASE_HIGH[i]])
    for joint in FINGER_JOINTS:
        scene.servo(joint, 800.0, 26.0, 25.0, [-0.02, FINGER_OPEN])


def rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] of the hand for joint angles (pitch, yaw, roll): Ry(pitch) Rz(yaw) Rx(roll)."""
    (cp, cy, cr), (sp, sy, sr) = np.cos(angles), np.sin(angles)
    outer = np.array([[cp * cy, -cp * sy, sp], [sy, cy, 0.0], [-sp * cy, sp * sy, cp]])
    return outer @ np.array([[1.0, 0.0, 0.0], [0.0, cr, -sr], [0.0, sr, cr]])


def angles_of(matrix: np.ndarray) -> np.ndarray:
    """Inverse of `rotation` [3]; unique for |yaw| < pi/2."""
    yaw = np.arcsin(np.clip(matrix[1, 0], -1.0, 1.0))
    return np.array([np.arctan2(-matrix[2, 0], matrix[0, 0]), yaw, np.arctan2(-matrix[1, 2], matrix[1, 1])])


def exponential(vector: np.ndarray) -> np.ndarray:
    """Rotation matrix [3, 3] of an axis-angle vector [3], radians (Rodrigues' formula)."""
    angle = float(np.linalg.norm(vector))
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = vector / angle
    cross = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + np.sin(angle) * cross + (1.0 - np.cos(angle)) * (cross @ cross)


def logarithm(matrix: np.ndarray) -> np.ndarray:
    """Axis-angle vector [3] of a rotation matrix; for angles below pi."""
    quat, vector = np.empty(4), np.empty(3)
    mujoco.mju_mat2Quat(quat, np.ascontiguousarray(matrix).ravel())
    mujoco.mju_quat2Vel(vector, quat, 1.0)
    return vector


def _addresses(model: mujoco.MjModel, joints: tuple[str, ...]) -> np.ndarray:
    return np.array([model.joint(name).qposadr[0] for name in joints])


@dataclasses.dataclass
class Controller:
    """Turns actions into servo targets. Its targets are state: a snapshot must hold them."""

    model: mujoco.MjModel
    data: mujoco.MjData

    def __post_init__(self) -> None:
        self.arm_qpos = _addresses(self.model, ARM_JOINTS)
        self.base_qpos = _addresses(self.model, BASE_JOINTS)
        self.finger_qpos = _addresses(self.model, FINGER_JOINTS)
        self._actuators = [
            np.array([self.model.actuator(name).id for name in names])
            for names in (ARM_JOINTS, BASE_JOINTS, FINGER_JOINTS)
        ]
        self.arm = np.zeros(6)  # target of the arm's joints: metres, radians
        self.base = np.zeros(4)  # target of the base's joints
        self.gripper = -1.0  # -1 open, +1 closed

    def start(self, arm: np.ndarray) -> None:
        """Puts the hand at joint values `arm` [6], gripper open, base at the origin; writes qpos and targets."""
        self.arm, self.base, self.gripper = np.clip(arm, ARM_LOW, ARM_HIGH), np.zeros(4), -1.0
        self.data.qpos[self.arm_qpos] = self.arm
        self.data.qpos[self.base_qpos] = 0.0
        self.data.qpos[self.finger_qpos] = FINGER_OPEN
        self._write()

    def apply(self, action: np.ndarray) -> None:
        """Moves the targets by one action [12], already checked; values beyond +-1 are clipped."""
        action = np.clip(action, -1.0, 1.0)
        if action[11] > 0:
            self._move_base(action[7:11])
        else:
            self._move_arm(action[:6])
        self.gripper = float(np.clip(self.gripper + GRIPPER_SCALE * action[6], -1.0, 1.0))
        self._write()

    def _move_arm(self, delta: np.ndarray) -> None:
        self.arm = self.arm.copy()
        self.arm[:3] += POSITION_SCALE * delta[:3]
        if delta[3:].any():
            self.arm[3:] = angles_of(exponential(ROTATION_SCALE * delta[3:]) @ rotation(self.arm[3:]))
        measured = self.data.qpos[self.arm_qpos]
        self.arm = np.clip(np.clip(self.arm, measured - ARM_LEASH, measured + ARM_LEASH), ARM_LOW, ARM_HIGH)

    def _move_base(self, velocity: np.ndarray) -> None:
        yaw = self.data.qpos[self.base_qpos[2]]
        step = BASE_SCALE * velocity
        forward, left = step[0], step[1]
        step[0] = np.cos(yaw) * forward - np.sin(yaw) * left
        step[1] = np.sin(yaw) * forward + np.cos(yaw) * left
        measured = self.data.qpos[self.base_qpos]
        base = np.clip(self.base + step, measured - BASE_LEASH, measured + BASE_LEASH)
        self.base = np.clip(base, BASE_LOW, BASE_HIGH)

    def _write(self) -> None:
        arm, base, fingers = self._actuators
        self.data.ctrl[arm] = self.arm
        self.data.ctrl[base] = self.base
        # Fully closed asks for a little less than zero, so that closed fingers keep pressing.
        self.data.ctrl[fingers] = FINGER_OPEN * (1.0 - self.gripper) / 2.0 - 0.01 * (self.gripper + 1.0)

    def targets(self) -> np.ndarray:
        """All targets as one vector [11], for a snapshot."""
        return np.concatenate([self.arm, self.base, [self.gripper]])

    def set_targets(self, targets: np.ndarray) -> None:
        """Inverse of `targets`; leaves `data.ctrl` alone, which the physics state restores."""
        self.arm, self.base, self.gripper = targets[:6].copy(), targets[6:10].copy(), float(targets[10])

    def state(self) -> np.ndarray:
        """The policy's state float32 [16]: base_pos 3, base_quat 4, eef_pos 3, eef_quat 4, gripper_qpos 2.

        Quaternions are xyzw with w >= 0; the hand's pose is given in the base's frame.
        """
        qpos = self.data.qpos
        base, arm, fingers = qpos[self.base_qpos], qpos[self.arm_qpos], qpos[self.finger_qpos]
        quat = np.empty(4)
        mujoco.mju_mat2Quat(quat, rotation(arm[3:]).ravel())
        quat *= 1.0 if quat[0] >= 0 else -1.0
        half_yaw = base[2] / 2.0
        return np.array(
            [base[0], base[1], 0.0, 0.0, 0.0, np.sin(half_yaw), np.cos(half_yaw)]
            + [arm[0], arm[1], arm[2] + base[3], quat[1], quat[2], quat[3], quat[0], fingers[0], -fingers[1]],
            np.float32,
        )
