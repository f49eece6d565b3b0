"""What openpi's example clients send, read by their tables; each mistake in one line."""

import numpy as np
import pytest

from envs.base import EnvObservation
from z1_jax.errors import UserError
from z1_jax.serve import aloha as aloha_joints
from z1_jax.serve.inputs import TABLES, Inputs
from z1_jax.serve.wire import MessageError

IMAGE = np.zeros((4, 4, 3), np.uint8)
STATE = [0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.25, 1.1, -1.2, 1.3, -1.4, 1.5, -1.6, 0.75]
DECODED = [0.1, 0.2, -0.3, -0.4, 0.5, -0.6, -0.5130776068814178, 1.1, 1.2, -1.3, -1.4, 1.5, -1.6, 0.22332757987422025]
ENCODED = [
    [0.1, 0.2, -0.3, -0.4, 0.5, -0.6, 0.6717322350044973, 1.1, 1.2, -1.3, -1.4, 1.5, -1.6, 0.9084410358377123],
    [0.05, 0.1, -0.15, -0.2, 0.25, -0.3, 0.6125550347961936, 0.55, 0.6, -0.65, -0.7, 0.75, -0.8, 0.730909435212801],
]


def libero(rng):
    """As openpi's examples/libero/main.py."""
    return {
        "observation/image": rng.integers(0, 256, (8, 8, 3)).astype(np.uint8),
        "observation/wrist_image": rng.integers(0, 256, (8, 8, 3)).astype(np.uint8),
        "observation/state": rng.standard_normal(8),
        "prompt": "open the drawer",
    }


def droid(rng):
    """As openpi's examples/droid/main.py."""
    return {
        "observation/exterior_image_1_left": rng.integers(0, 256, (8, 8, 3)).astype(np.uint8),
        "observation/wrist_image_left": rng.integers(0, 256, (8, 8, 3)).astype(np.uint8),
        "observation/joint_position": rng.standard_normal(7),
        "observation/gripper_position": rng.standard_normal(1),
        "prompt": "open the drawer",
    }


def aloha(rng):
    """As openpi's examples/aloha_real/env.py: channels first, four cameras; the one in simulation sends no prompt."""
    cameras = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    images = {camera: rng.integers(0, 256, (3, 8, 8)).astype(np.uint8) for camera in cameras}
    return {"state": rng.standard_normal(14), "images": images}


def test_libero_and_droid_fill_base_and_left_wrist(rng):
    for name, message, dim, keys in (
        ("libero", libero(rng), 8, ("observation/image", "observation/wrist_image")),
        ("droid", droid(rng), 8, ("observation/exterior_image_1_left", "observation/wrist_image_left")),
    ):
        asked = Inputs(name, ("base", "wrist", None), dim).read(message)
        for camera, key in zip(("base", "wrist"), keys, strict=True):
            np.testing.assert_array_equal(asked.observation.images[camera], message[key])
        assert asked.observation.instruction == "open the drawer"
        assert (asked.noise, asked.previous, asked.delay, asked.age_s) == (None, None, 0, 0.0)
    message = droid(rng)
    joints = [*message["observation/joint_position"], *message["observation/gripper_position"]]
    np.testing.assert_array_equal(Inputs("droid", ("b", "w"), 8).read(message).observation.state, joints)


def test_aloha_fills_three_slots_and_takes_the_servers_prompt(rng):
    message = aloha(rng)
    inputs = Inputs("aloha", ("top", "left", "right"), 14, prompt="transfer the cube")
    observation = inputs.read(message).observation
    for camera, key in (("top", "cam_high"), ("left", "cam_left_wrist"), ("right", "cam_right_wrist")):
        np.testing.assert_array_equal(observation.images[camera], message["images"][key])
    assert observation.instruction == "transfer the cube"
    assert inputs.read({**message, "prompt": "hold"}).observation.instruction == "hold"
    assert inputs.unseen == ("cam_low",)
    # A policy that has no right wrist: it is told, and the picture is no mistake.
    two = Inputs("aloha", ("top", "left", None), 14, prompt="x")
    assert two.unseen == ("cam_right_wrist", "cam_low") and set(two.read(message).observation.images) == {"top", "left"}


@pytest.mark.parametrize("name", TABLES)
def test_what_is_written_is_read(name, rng):
    dim = {"z1": 5, "libero": 8, "droid": 8, "aloha": 14, "aloha_pi": 14}[name]
    images = {camera: rng.integers(0, 256, (4, 4, 3)).astype(np.uint8) for camera in ("a", "b")}
    observation = EnvObservation(images, rng.standard_normal(dim).astype(np.float32), "go")
    inputs = Inputs(name, ("a", "b", None), dim)
    message = inputs.write(observation)
    state = aloha_joints.policy_state(observation.state) if name == "aloha_pi" else observation.state
    assert sorted(inputs.keys) == sorted(
        [*(f"images/{key}" for key in message.get("images", ())), *(key for key in message if key != "images")]
    )
    got = inputs.read(message).observation
    np.testing.assert_array_equal(got.state, state)
    assert got.instruction == "go" and all((got.images[camera] == images[camera]).all() for camera in images)


def test_options(rng):
    inputs = Inputs("z1", ("cam",), 2)
    message = {"state": [0, 1.5], "images": {"cam": IMAGE}, "prompt": "go"}
    asked = inputs.read({**message, "noise_seed": np.array([3, 4]), "previous_actions": [[1, 2]], "delay": 1})
    assert asked.noise == (3, 4) and asked.previous.tolist() == [[1.0, 2.0]] and asked.delay == 1
    assert inputs.read({**message, "noise_seed": 7, "age_ms": 250}).age_s == 0.25
    for change, told in (
        ({"noise_sed": 3}, "has key 'noise_sed', which inputs z1 do not know"),
        ({"noise_seed": 1.5}, "has noise_seed '1.5'; expected a whole number"),
        ({"noise_seed": True}, "expected a whole number"),
        ({"noise_seed": "3"}, "expected a whole number"),
        ({"previous_actions": [1, 2]}, r"has previous_actions of shape \[2\]; expected \[steps, action_dim\]"),
        ({"previous_actions": [[1], [2, 3]]}, "has previous_actions .* expected numbers"),
        ({"previous_actions": [["1"]]}, "expected numbers"),
        ({"delay": None}, "has delay 'None'"),
        ({"age_ms": -1}, "has age_ms '-1'; expected milliseconds"),
        ({"age_ms": float("nan")}, "has age_ms 'nan'"),
        ({"prompt": ""}, "has prompt ''; expected the instruction"),
        ({"prompt": 3}, "has prompt '3'"),
        ({"state": [0]}, r"has state of shape \[1\]; expected \[2\]"),
        ({"state": [0, "1"]}, "has state .* expected numbers"),
        ({"state": {}}, "expected numbers"),
        ({"images": IMAGE}, "has images of type ndarray; expected a dict of images by camera"),
        ({"images": {}}, "lacks the image 'cam'"),
        ({"images": {"cam": IMAGE, "other": IMAGE}}, "has key 'other'"),
        ({"images": {"cam": [[1]]}}, "has cam of type list; expected an image"),
    ):
        with pytest.raises(MessageError, match=told):
            inputs.read({**message, **change})
    for key in ("state", "images", "prompt"):
        with pytest.raises(MessageError, match=key):
            inputs.read({name: value for name, value in message.items() if name != key})
    with pytest.raises(MessageError, match="is a list; expected a dict of state, images/cam, prompt"):
        inputs.read([message])


def test_aloha_pi_converts_as_openpi(rng):
    """Numbers that openpi's own functions gave for adapt_to_pi=True: _decode_state, _encode_actions."""
    inputs = Inputs("aloha_pi", ("a", None, None), 14, prompt="x")
    message = {"images": {"cam_high": IMAGE}, "state": STATE}
    np.testing.assert_allclose(inputs.read(message).observation.state, DECODED, rtol=1e-12)
    actions = np.stack([STATE, 0.5 * np.array(STATE)])
    np.testing.assert_allclose(inputs.answer(actions), ENCODED, rtol=1e-6)
    left = rng.uniform(-1, 1, (5, 14))
    back = inputs.read({**message, "previous_actions": inputs.answer(left)}).previous
    np.testing.assert_allclose(back, left, atol=1e-6)
    with pytest.raises(MessageError, match="previous_actions of width 7; expected 14"):
        inputs.read({**message, "previous_actions": left[:, :7]})
    plain = Inputs("aloha", ("a", None, None), 14, prompt="x")
    np.testing.assert_array_equal(plain.read(message).observation.state, STATE)
    np.testing.assert_array_equal(plain.answer(actions), actions)


def test_a_table_of_another_robot_is_refused_at_the_start():
    for arguments, told in (
        (("ur5", ("a",), 8), "inputs 'ur5' do not exist, expected one of z1, libero, droid, aloha, aloha_pi"),
        (("libero", ("a",), 16), "inputs libero: the client's state has width 8, the policy's 16"),
        (
            ("libero", ("a", None, "c"), 8),
            "inputs libero: the client has no camera for c, which the policy sees in slot 2",
        ),
    ):
        with pytest.raises(UserError, match=told):
            Inputs(*arguments)
