"""Stand-ins for RoboCasa's assets: as MuJoCo sees them, and under all 24 tasks of whichever RoboCasa is installed."""

import os
import pathlib
import re
import xml.etree.ElementTree as ET

os.environ.setdefault("MUJOCO_GL", "egl")

import mujoco
import numpy as np
import pytest

from envs.robocasa import compat, standin, tables
from envs.robocasa.standin import appliances, fixtures, mjcf, objects, scene

try:
    INSTALLED, WHY = compat.find(), ""
except ValueError as error:
    INSTALLED, WHY = None, str(error)
needs_robocasa = pytest.mark.skipif(INSTALLED is None, reason=WHY)
TASKS = list(tables.HORIZONS[INSTALLED.api]) if INSTALLED else ["RoboCasa"]
# One task of each family runs always: cabinet, sink, drawer, stove, coffee machine, microwave.
QUICK = {"RoboCasa", "PnPCounterToCab", "PickPlaceCounterToCabinet", "TurnSinkSpout", "OpenDrawer", "TurnOffStove"}
QUICK |= {"StartCoffeeMachine", "CoffeePressButton", "PnPCounterToMicrowave", "PickPlaceCounterToMicrowave"}


# --- as MuJoCo sees them: needs no RoboCasa ---------------------------------------------------------------------------


def simulate(text: str) -> tuple[mujoco.MjModel, mujoco.MjData]:
    model = mujoco.MjModel.from_xml_string(text)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    return model, data


@pytest.mark.parametrize("kind", sorted(appliances.APPLIANCES))
def test_an_appliance_rests_and_each_joint_goes_from_stop_to_stop(kind):
    half, body = appliances.APPLIANCES[kind]()
    model, data = simulate(mjcf.model(kind, body))
    for _ in range(100):
        mujoco.mj_step(model, data)
    assert np.abs(data.qpos).max(initial=0) < 1e-4, "something moves by itself"
    for index in range(model.njnt):
        mujoco.mj_resetData(model, data)
        name, (low, high) = model.joint(index).name, model.jnt_range[index]
        if re.match("rack|fridge_drawer", name):  # behind doors
            for door in (other for other in range(model.njnt) if "door" in model.joint(other).name):
                data.qpos[door] = max(model.jnt_range[door], key=abs)
        for end, force in ((high, 1), (low, -1)):
            data.qfrc_applied[model.jnt_dofadr[index]] = force
            for _ in range(3000):
                mujoco.mj_step(model, data)
            assert (data.qpos[index] - end) * force > -0.05 * (high - low), f"{name} is blocked"
    region = model.geom("reg_main")
    np.testing.assert_allclose(region.size, half, rtol=1e-4)  # MJCF holds five digits


@pytest.mark.parametrize("kind", sorted(appliances.APPLIANCES))
def test_an_appliance_looks_as_it_collides(kind, rng):
    """Rays from random sides meet what is drawn wherever they meet what collides."""
    model, data = simulate(mjcf.model(kind, appliances.APPLIANCES[kind]()[1]))
    groups = np.zeros((2, 6), np.uint8)
    groups[0, 0] = groups[1, 1] = 1
    model.geom_rgba[[g for g in range(model.ngeom) if "reg_" in model.geom(g).name], 3] = 0  # rays skip the invisible
    hits = 0
    for _ in range(300):
        start = rng.normal(size=3)
        start *= 3 / np.linalg.norm(start)
        aim = rng.uniform(-0.1, 0.1, 3) - start
        there, seen = (mujoco.mj_ray(model, data, start, aim, group, 1, -1, np.zeros(1, np.int32)) for group in groups)
        hits += there >= 0
        if there >= 0:
            assert 0 <= seen <= there + 1e-6
    assert hits > 50


CATEGORIES = """
OBJ_CATEGORIES = dict(
    bowl=dict(types=("receptacle", "stackable"), objaverse=dict(scale=2.0), aigen=dict()),
    can=dict(types=("drink"), objaverse=dict(scale=[0.5, 0.5, 0.8], exclude=["can_1", "can_3"])),
    lid=dict(types=("lid"), lightwheel=dict(model_folders=["lightwheel/saucepan"], is_auxiliary_obj=True)),
)
"""


@pytest.fixture
def package(tmp_path):
    """A folder like RoboCasa's package, with a table of three categories."""
    (tmp_path / "models" / "objects").mkdir(parents=True)
    (tmp_path / "models" / "objects" / "kitchen_objects.py").write_text("import robocasa\n" + CATEGORIES)
    return tmp_path


def test_objects_lie_where_robocasa_looks_for_them(package):
    found = {str(path) for path, _ in objects.models(package)}
    expected = {f"objects/objaverse/bowl/bowl_{i}/model.xml" for i in range(6)}
    expected |= {f"objects/aigen_objs/bowl/bowl_{i}/model.xml" for i in range(6)}
    expected |= {f"objects/objaverse/can/can_{i}/model.xml" for i in (0, 2, 4, 5, 6, 7)}
    expected |= {f"objects/lightwheel/saucepan/saucepan_{i}/lid/model.xml" for i in range(6)}
    assert found == expected


def test_objects_have_their_size_after_scaling_and_hold_what_is_put_in(package):
    texts = dict(objects.models(package))
    can = texts[pathlib.PurePosixPath("objects/objaverse/can/can_0/model.xml")]
    model, _ = simulate(can)
    size = 2 * model.geom("reg_bbox").size * [0.5, 0.5, 0.8]
    np.testing.assert_allclose(size, [0.06, 0.06, 0.14], rtol=0.16)
    assert model.site("top_site").pos[2] == pytest.approx(model.geom("reg_bbox").size[2], rel=1e-4)

    bowl = texts[pathlib.PurePosixPath("objects/objaverse/bowl/bowl_0/model.xml")]
    root = ET.fromstring(bowl)
    ball = '<body pos="0.01 0 0.1"><freejoint/><geom size="0.008"/></body>'
    root.find("worldbody").append(ET.fromstring(ball))
    model, data = simulate(ET.tostring(root, encoding="unicode"))
    for _ in range(2000):
        mujoco.mj_step(model, data)
    half = model.geom("reg_bbox").size
    assert abs(data.qpos[0]) < half[0] and abs(data.qpos[1]) < half[1]
    assert -half[2] < data.qpos[2] < half[2], "the ball fell through or lies on top"


def test_a_source_without_the_table_is_refused(package):
    (package / "models" / "objects" / "kitchen_objects.py").write_text("OTHER = {}")
    with pytest.raises(ValueError, match="has no table OBJ_CATEGORIES: expected RoboCasa"):
        list(objects.models(package))


SCENE = """
<mujoco><compiler inertiagrouprange="0 0"/><asset>
  <texture name="gone" type="2d" file="/nowhere/wood/oak.png"/>
  <texture name="sky" type="skybox" builtin="flat" width="8" height="8"/>
  <texture name="there" type="2d" file="{image}"/>
  <material name="m" texture="gone"/><material name="n" texture="there"/>
  <mesh name="gone" file="/nowhere/door.obj"/><mesh name="there" file="{mesh}"/>
</asset><worldbody>
  <body name="microwave_main"><joint name="door" type="hinge"/>
    <geom name="look" type="mesh" mesh="gone" group="1" contype="0" conaffinity="0" material="m"/>
    <geom name="start_button" type="box" size=".1 .2 .3" group="0" density="70"/>
    <geom name="shell" type="cylinder" size=".1 .2" group="0" density="50"/>
    <geom type="cylinder" size=".1 .2" group="1" contype="0" conaffinity="0"/>
  </body>
  <body name="whole"><freejoint/><geom name="mesh" type="mesh" mesh="there" group="1" contype="0" conaffinity="0"/>
    <geom name="ball" size=".1" group="0"/></body>
</worldbody></mujoco>"""
TETRAHEDRON = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 3 2\nf 1 2 4\nf 1 4 3\nf 2 3 4\n"


def test_a_scene_is_mended_where_files_are_absent_and_nowhere_else(tmp_path):
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.obj").write_text(TETRAHEDRON)
    text = SCENE.format(image=tmp_path / "a.png", mesh=tmp_path / "a.obj")
    model, data = simulate(scene.mend(text))
    microwave, whole = model.body("microwave_main"), model.body("whole")
    mass = 70 * 0.2 * 0.4 * 0.6 + 50 * np.pi * 0.1**2 * 0.4
    assert model.body_mass[microwave.id] == pytest.approx(mass)  # what is drawn weighs nothing
    dot = model.geom("look")
    assert dot.rgba[3] == 0 and dot.contype == 0 and dot.conaffinity == 0
    drawn = [g for g in range(model.ngeom) if model.geom_bodyid[g] == microwave.id and model.geom_group[g] == 1]
    boxes = [g for g in drawn if model.geom_type[g] == mujoco.mjtGeom.mjGEOM_BOX]
    assert len(drawn) == 3 and len(boxes) == 1  # the dot, the cylinder that was there, and the button's twin
    np.testing.assert_array_equal(model.geom_size[boxes[0]], [0.1, 0.2, 0.3])
    assert model.geom_rgba[boxes[0]][3] == 1 and model.geom_contype[boxes[0]] == 0
    assert model.body_geomnum[whole.id] == 2 and model.geom("mesh").type == mujoco.mjtGeom.mjGEOM_MESH
    assert scene.mend(text).count("builtin") == 2 and str(tmp_path / "a.png") in scene.mend(text)


def test_a_whole_scene_is_left_alone(tmp_path):
    text = '<mujoco><asset/><worldbody><body><geom name="a" size=".1" group="0"/></body></worldbody></mujoco>'
    before, after = ET.fromstring(text), ET.fromstring(scene.mend(text))
    assert ET.tostring(before) == ET.tostring(after)


def test_paths_that_robocasa_would_rewrite_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "find", lambda: compat.Installation("v0.2", "0.2.0", tmp_path))
    monkeypatch.setattr(standin.assets, "digest_of", lambda found: "0")
    with pytest.raises(ValueError, match="expected a path without a folder named robocasa"):
        standin.prepare(tmp_path / "robocasa")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        standin.prepare(tmp_path / "file")


# --- under RoboCasa itself --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def assets():
    return standin.install(standin.folder())  # as tests/test_robocasa.py: a process has one place for them


@needs_robocasa
def test_every_model_compiles_and_is_written_once(assets):
    count = 0
    for path in assets.rglob("model.xml"):
        text = path.read_text()
        if "visuals/" in text or ".obj" in text:  # RoboCasa's own, which need the scene's mending
            continue
        text = re.sub("<asset>.*?</asset>", "<asset/>", text).replace('material="mat"', "")
        mujoco.MjModel.from_xml_string(text)
        count += 1
    assert count > 1000
    assert standin.install(assets.parent) == assets == standin.prepare(assets.parent)
    assert standin.LABEL in (assets / "STAND-INS.txt").read_text()
    with pytest.raises(ValueError, match="choose stand-ins before anything imports robocasa"):
        standin.install(assets.parent / "other")


@pytest.mark.skipif(INSTALLED is None or INSTALLED.api != "v1", reason=WHY or "v0.2 carries its fixtures' models")
def test_every_model_that_the_registry_names_is_there(assets):
    import yaml

    for registry in (INSTALLED.root / "models" / "assets" / "fixtures" / "fixture_registry").glob("*.yaml"):
        for entry in yaml.safe_load(registry.read_text()).values():
            if "xml" in entry:
                assert (assets / entry["xml"] / "model.xml").exists(), f"{registry.stem}: {entry['xml']}"
    assert sum(1 for _ in fixtures.models(INSTALLED.root)) > 900


def build(task: str):
    import robosuite
    from robosuite.controllers import load_composite_controller_config

    return robosuite.make(
        task,
        robots="PandaOmron",
        controller_configs=load_composite_controller_config(controller=None, robot="PandaOmron"),
        layout_and_style_ids=[[1, 1]],
        obj_instance_split=tables.OBJECTS[INSTALLED.api]["heldout"],
        seed=0,
        use_camera_obs=False,
        has_renderer=False,
        has_offscreen_renderer=True,
        ignore_done=True,
    )


def picture(env) -> np.ndarray:
    return env.sim.render(camera_name="robot0_agentview_left", width=96, height=96)


@needs_robocasa
@pytest.mark.parametrize(
    "task", [task if task in QUICK else pytest.param(task, marks=pytest.mark.slow) for task in TASKS]
)
def test_a_task_runs_is_seen_and_can_be_solved(task, assets, rng):
    env = build(task)
    try:
        env.reset()
        assert env.get_ep_meta()["lang"]
        for _ in range(5):
            observation, *_ = env.step(rng.uniform(-1, 1, 12))
        assert all(np.isfinite(value).all() for value in observation.values())
        image = picture(env)
        assert image.std() > 10 and len(np.unique(image.reshape(-1, 3), axis=0)) > 100
        for solved in (False, True, False):
            bring_about(env, task, solved)
            assert bool(env._check_success()) is solved, f"{task}: {env.get_ep_meta()['lang']}"
    finally:
        env.close()


def bring_about(env, task: str, solved: bool) -> None:
    """Puts the scene into a state in which the task is solved, or is not, by joints, contacts and places alone."""
    if task.startswith(("Open", "Close")):
        fixture = next(getattr(env, name) for name in ("drawer", "door_fxtr", "fxtr") if hasattr(env, name))
        open_or_close(env, fixture, solved == task.startswith("Open"))
    elif "Stove" in task and task.startswith("Turn"):
        turn(env, f"{env.stove.name}_knob_{env.knob}_joint", 1.0 if solved == (task == "TurnOnStove") else 0.0)
    elif "Faucet" in task:
        turn(env, f"{env.sink.name}_handle_joint", 0.5 if solved == (task == "TurnOnSinkFaucet") else 0.0)
    elif "Spout" in task:
        turn(env, f"{env.sink.name}_spout_joint", {"left": -1.0, "right": 1.0}[env.behavior] * (1 if solved else -1))
    elif "Microwave" in task and task.startswith("Turn"):
        start = solved == (task == "TurnOnMicrowave")
        press(env, env.microwave, "start_button" if start else "stop_button")
    elif task in ("CoffeePressButton", "StartCoffeeMachine"):
        env.coffee_machine._turned_on = False  # RoboCasa's machine never goes off again
        if solved:
            start = next(n for n in names(env, "geom") if re.match(f"{env.coffee_machine.name}_.*start_button", n))
            press(env, env.coffee_machine, start.removeprefix(env.coffee_machine.name + "_"))
    else:
        put(env, task, solved)


def names(env, kind: str) -> list[str]:
    return [name for name in getattr(env.sim.model, f"{kind}_names") if name]


def open_or_close(env, fixture, opened: bool) -> None:
    joints = [name for name in names(env, "joint") if name.startswith(fixture.name + "_")]
    doors = [name for name in joints if re.search("door|hinge|slide|drawer|microjoint", name.lower())]
    assert doors, joints
    for name in doors:
        span = env.sim.model.jnt_range[env.sim.model.joint_name2id(name)]
        env.sim.data.set_joint_qpos(name, span[np.argmax(np.abs(span))] if opened else 0.0)
    env.sim.forward()


def turn(env, joint: str, angle: float) -> None:
    env.sim.data.set_joint_qpos(joint, angle)
    env.sim.forward()
    if INSTALLED.api == "v0.2":  # reads qpos at the joint's number, where its address is meant
        env.sim.data.qpos[env.sim.model.joint_name2id(joint)] = angle


def press(env, fixture, button: str) -> None:
    """Drives the robot's base so that a fingertip touches this button alone; lets RoboCasa notice; drives back."""
    data, model, gripper = env.sim.data, env.sim.model, env.robots[0].gripper["right"]
    before = data.qpos.copy()
    ids = [model.joint_name2id(n) for n in names(env, "joint") if re.search("mobile_(forward|side)|torso_height", n)]
    tip = model.geom_name2id(next(name for name in names(env, "geom") if "finger1_pad_collision" in name))
    target = model.geom_name2id(f"{fixture.name}_{button}")
    others = [name for name in names(env, "geom") if re.match(f"{fixture.name}_.*button", name) and button not in name]
    for offset in np.random.default_rng(0).normal(scale=0.015, size=(60, 3)):
        axes = np.stack([data.xaxis[index] for index in ids], axis=1)
        way = np.linalg.solve(axes, data.geom_xpos[target] + offset - data.geom_xpos[tip])
        data.qpos[[model.jnt_qposadr[index] for index in ids]] += way
        env.sim.forward()
        touched = env.check_contact(gripper, f"{fixture.name}_{button}")
        if touched and not any(env.check_contact(gripper, other) for other in others):
            break
    else:
        raise AssertionError(f"no finger can touch {button} alone")
    fixture.update_state(env)
    data.qpos[:] = before
    env.sim.forward()


def put(env, task: str, solved: bool) -> None:
    """Sets the object to where it belongs, or above the ceiling."""
    if not solved:
        place(env, env.sim.data.body_xpos[env.obj_body_id["obj"]] + [0, 0, 3.0])
    elif task == "CoffeeSetupMug":
        site = env.sim.model.site_name2id(f"{env.coffee_machine.name}_receptacle_place_site")
        place(env, env.sim.data.site_xpos[site] + [0, 0, 0.04])
    elif "container" in env.objects and task.startswith(("PnP", "PickPlace")):
        lower(env, env.sim.data.body_xpos[env.obj_body_id["container"]].copy(), env.objects["container"])
    elif task.endswith("ToCounter") or task == "CoffeeServeMug":
        spots = env.counter.get_reset_regions(env)
        spot = max(spots.values(), key=lambda region: region["size"][0] * region["size"][1])
        lower(env, world(env.counter, spot["offset"]), env.counter)
    else:
        fixture = env.cab if hasattr(env, "cab") else env.sink
        corners = fixture.get_int_sites(relative=False)
        p0, px, py, pz = next(iter(corners.values())) if isinstance(corners, dict) else corners
        place(env, (px + py) / 2 + (pz - p0) / 2)


def world(fixture, offset) -> np.ndarray:
    cos, sin = np.cos(fixture.rot), np.sin(fixture.rot)
    x, y, z = offset
    return np.array(fixture.pos) + [cos * x - sin * y, sin * x + cos * y, z]


def place(env, position: np.ndarray) -> None:
    env.sim.data.set_joint_qpos(env.objects["obj"].joints[0], np.concatenate([position, [1, 0, 0, 0]]))
    env.sim.forward()


def lower(env, position: np.ndarray, onto) -> None:
    for height in np.arange(0.25, -0.05, -0.002):
        place(env, position + [0, 0, height])
        if env.check_contact(env.objects["obj"], onto):
            return
    raise AssertionError(f"the object never touches {onto.name}")
