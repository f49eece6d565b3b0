"""What the RoboCasa adapter knows without RoboCasa: its tables, what it finds installed, its shims, and the walk."""

import copy
import importlib
import importlib.metadata
import pickle
import sys
import textwrap
import types
import xml.etree.ElementTree as ET

import mujoco
import numpy as np
import pytest

from envs.robocasa import compat, state, tables, walk

# --- tables ---


def test_tasks_horizons_and_twins():
    old, new = tables.HORIZONS["v0.2"], tables.HORIZONS["v1"]
    assert len(old) == len(new) == 24
    for task in old:  # every one has a twin in v1, by name or by table
        assert task in new or set(tables.TWINS[task]) <= set(new)
    assert {name for task in old for name in tables.TWINS.get(task, (task,))} == set(new)
    # v1.0.1 multiplied its horizons by 1.5: each is 1.5 times a multiple of 100, in v0.2 they are the multiples.
    assert all((steps / 1.5) % 100 == 0 for steps in new.values()) and all(steps % 100 == 0 for steps in old.values())


@pytest.mark.parametrize(
    ("task", "api", "expected"),
    [
        ("OpenDrawer", "v0.2", "OpenDrawer"),
        ("OpenDrawer", "v1", "OpenDrawer"),
        ("PnPCounterToCab", "v1", "PickPlaceCounterToCabinet"),
        ("CoffeePressButton", "v1", "StartCoffeeMachine"),
        ("OpenMicrowave", "v1", "OpenMicrowave"),
    ],
)
def test_a_renamed_task_is_understood(task, api, expected):
    assert tables.task_name(task, api) == expected


@pytest.mark.parametrize(
    ("task", "api", "parts"),
    [
        ("OpenSingleDoor", "v1", ["OpenCabinet and OpenMicrowave", "choose one"]),
        ("OpenMicrowave", "v0.2", ["OpenSingleDoor", "choose one"]),
        ("OpenDrawr", "v1", ["unknown RoboCasa task 'OpenDrawr'", "OpenDrawer"]),
    ],
)
def test_an_unclear_task_names_the_choices(task, api, parts):
    with pytest.raises(ValueError) as error:
        tables.task_name(task, api)
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)


def test_scenes():
    evaluation = ((1, 1), (2, 2), (4, 4), (6, 9), (7, 10))
    assert tables.scenes(("evaluation",), "v0.2") == evaluation
    training = tables.scenes(("training",), "v0.2")
    assert len(training) == 10 * 12 - 5 and not set(training) & set(evaluation)
    assert len(tables.scenes(("training",), "v1")) == 50 * 50
    assert not set(tables.scenes(("training",), "v1")) & set(tables.scenes(("evaluation",), "v1"))
    assert tables.scenes(("3/11", "evaluation", "1/1"), "v0.2") == ((3, 11), *evaluation)  # each once, in order


@pytest.mark.parametrize("name", ["3/12", "10/0", "-1/1", "3", "a/b", "3/4/5", "test", ""])
def test_an_unknown_scene_is_one_line_that_says_what_there_is(name):
    with pytest.raises(ValueError, match="unknown RoboCasa scene .* expected evaluation, training, or layout/style"):
        tables.scenes((name,), "v0.2")


def test_action_and_state_parts_fill_their_widths():
    covered = np.concatenate([np.arange(tables.ACTION_DIM)[part] for part in tables.ACTION.values()])
    assert covered.tolist() == list(range(12))
    bounds = tables.state_bounds()
    assert len(bounds) == tables.STATE_DIM and all(low < high for low, high in bounds)


# --- what is installed ---


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages in front of all others; `site(name, text)` writes one."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "robocasa"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(name: str, text: str = "") -> None:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / "__init__.py").write_text(textwrap.dedent(text))
        importlib.invalidate_caches()

    write.root = tmp_path
    return write


def install(site, kind: str, version: str) -> None:
    for name in compat.NEEDED:
        site(name)
    site("robocasa", f'assert False, "MuJoCo version must be 1.2.3"\n__version__ = "{version}"\n')
    (site.root / "robocasa" / "environments" / "kitchen" / kind).mkdir(parents=True)


@pytest.mark.parametrize(("kind", "version", "api"), [("atomic", "1.0.1", "v1"), ("single_stage", "0.2.0", "v0.2")])
def test_the_installation_is_found_without_importing_it(kind, version, api, site):
    install(site, kind, version)
    found = compat.find()
    assert (found.api, found.version, found.root) == (api, version, site.root / "robocasa")
    assert "robocasa" not in sys.modules


def test_what_is_missing_is_one_line_that_says_how_to_install_it(site, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "robocasa" else real(name))
    with pytest.raises(ValueError, match="RoboCasa is not installed: pip install .*robocasa.*") as error:
        compat.find()
    assert "\n" not in str(error.value)
    monkeypatch.setattr(importlib.util, "find_spec", real)
    install(site, "atomic", "1.0.1")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("numba", "lxml") else real(name))
    with pytest.raises(ValueError, match="RoboCasa needs numba, lxml, not installed: pip install"):
        compat.find()


def test_leftovers_of_another_mujoco_are_told(site, monkeypatch):
    install(site, "atomic", "1.0.1")
    versions = {"mujoco": "3.3.1", "mujoco-core": "4.0.0"}

    def version(package):
        if versions.get(package) is None:
            raise importlib.metadata.PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match="MuJoCo 3.3.1 lies over parts of 4.0.0: pip uninstall -y mujoco mujoco-core"):
        compat.find()
    versions["mujoco"] = "4.0.0"
    assert compat.find().api == "v1"
    versions.update({"mujoco": "3.3.1", "mujoco-core": None})
    assert compat.find().api == "v1"


def test_a_strange_package_is_refused(site):
    install(site, "composite", "9.9.9")
    with pytest.raises(ValueError, match="is no RoboCasa that is known: expected v0.2 or v1.0.1"):
        compat.find()


def test_missing_assets_are_named_unless_stand_ins_replace_them(site, monkeypatch):
    monkeypatch.delenv("ROBOCASA_ASSETS_PATH", raising=False)
    install(site, "atomic", "1.0.1")
    assets = site.root / "robocasa" / "models" / "assets"
    for folder, name in (("textures/wood", "oak.png"), ("objects/objaverse/apple/apple_0", "model.xml")):
        (assets / folder).mkdir(parents=True)
        (assets / folder / name).touch()
    with pytest.raises(ValueError, match=r"lacks its assets \(objects/lightwheel in .*download_kitchen_assets"):
        compat.check(standins=False)
    assert compat.check(standins=True).api == "v1"
    (assets / "objects" / "lightwheel" / "cup").mkdir(parents=True)
    (assets / "objects" / "lightwheel" / "cup" / "model.xml").touch()
    assert compat.check(standins=False).missing_assets() == []


def test_assets_may_lie_elsewhere_as_v1_allows(site, monkeypatch, tmp_path):
    install(site, "atomic", "1.0.1")
    monkeypatch.setenv("ROBOCASA_ASSETS_PATH", str(tmp_path / "elsewhere"))
    assert compat.find().assets == tmp_path / "elsewhere"


def test_an_import_skips_the_asserts_of_the_package_alone(site):
    site("robocasa", "assert False\nfrom robocasa import part\nanswer = 42\n")
    (site.root / "robocasa" / "part.py").write_text("try:\n    assert False\nexcept AssertionError:\n    kept = True\n")
    compat._import_without_asserts("robocasa", site.root / "robocasa")
    module = sys.modules["robocasa"]
    assert module.answer == 42 and module.part.kept
    site("broken", "assert False\nraise RuntimeError('half')\n")
    with pytest.raises(RuntimeError, match="half"):
        compat._import_without_asserts("broken", site.root / "broken")
    assert "broken" not in sys.modules
    for name in [name for name in sys.modules if name.partition(".")[0] == "robocasa"]:
        del sys.modules[name]


def test_places_on_a_counter_come_in_a_fixed_order(site):
    """Objects in a set stand in the order of their addresses, which no seed decides."""
    site("robocasa")
    site("robocasa/models")
    site("robocasa/models/fixtures")
    text = "def places(valid_geoms):\n    valid_geoms = list(set(valid_geoms))\n    return valid_geoms\n"
    (site.root / "robocasa" / "models" / "fixtures" / "counter.py").write_text(text)
    compat._order_regions()
    geoms = [ET.Element("geom") for _ in range(50)]
    assert sys.modules["robocasa.models.fixtures.counter"].places(geoms + geoms[::2]) == geoms
    for name in [name for name in sys.modules if name.partition(".")[0] == "robocasa"]:
        del sys.modules[name]


# --- shims ---


def test_an_argument_that_is_not_known_is_dropped():
    def old(self, robots, horizon=5):
        return robots, horizon

    assert not compat._accepts(old, "load_model_on_init")
    assert compat._dropping(old, "load_model_on_init")(None, 1, horizon=2, load_model_on_init=False) == (1, 2)
    with pytest.raises(TypeError):
        compat._dropping(old, "load_model_on_init")(None, 1, unknown=3)


def test_multiccd_becomes_a_flag_of_the_model():
    class Task:
        def __init__(self, arena):
            self.root = ET.fromstring(f"<mujoco><option timestep='{arena}'/></mujoco>")

    plain = Task(0.002)
    Task.__init__ = compat._with_options(Task.__init__)
    on, off = Task(0.002, enable_multiccd=True, enable_sleeping_islands=False), Task(0.002, enable_multiccd=False)
    assert ET.tostring(off.root) == ET.tostring(plain.root)
    assert [flag.get("multiccd") for flag in on.root.iterfind("option/flag")] == ["enable"]
    with pytest.raises(ValueError, match="enable_sleeping_islands"):
        Task(0.002, enable_sleeping_islands=True)


def test_a_legacy_controller_is_the_one_without_the_word():
    def factory(name, params):
        if name != "JOINT_VELOCITY":
            raise ValueError(f"Unknown controller name: {name}")
        return name, params

    make = compat._without_legacy_names(factory)
    assert make("JOINT_VELOCITY_LEGACY", {"a": 1}) == make("JOINT_VELOCITY", {"a": 1}) == ("JOINT_VELOCITY", {"a": 1})
    with pytest.raises(ValueError, match="JOINT_TORQUE$"):
        make("JOINT_TORQUE", {})


# --- state and walk ---


def test_plain_values_and_their_equality(rng):
    array = rng.normal(size=(2, 3))
    values = [1, 1.5, "a", None, True, np.float64(2), array, [1, array], {"k": (1, [2.0])}, np.array([None, 1], object)]
    assert all(state.plain(value) for value in values)
    assert not any(state.plain(value) for value in (object(), [object()], {"k": len}, np.array([object()])))
    for value in values:
        assert state.same(value, value) and not state.same(value, "other")
    assert state.same(float("nan"), float("nan")) and not state.same(1, 1.0)
    nudged = array.copy()
    nudged[1, 2] = np.nextafter(nudged[1, 2], 9)
    assert not state.same({"k": [array]}, {"k": [nudged]})
    assert not state.same(np.zeros(2), -np.zeros(2))  # to the bit


MODEL = mujoco.MjModel.from_xml_string("<mujoco><worldbody><site/><geom size='1'/></worldbody></mujoco>")
DATA = mujoco.MjData(MODEL)


class Latch:
    def __init__(self, parent):
        self.parent, self.on, self.log = parent, False, []


class World:
    def __init__(self):
        self.fixtures = {"lamp": Latch(self)}
        self.goal, self.rng, self.nothing = np.zeros(3), np.random.default_rng(0), float("nan")


Latch.__module__ = World.__module__ = "robocasa.fake"  # the walk enters the simulator's own objects alone


def test_the_walk_names_what_changed():
    world = World()
    before = walk.fingerprints(world)
    assert walk.changed(before, walk.fingerprints(world)) == []  # cycles and NaN included
    world.fixtures["lamp"].on = True
    world.fixtures["lamp"].log.append("on")
    world.goal[1] = 1e-300
    world.rng.random()
    world.fresh = 1
    expected = ["env.fixtures['lamp'].log[0]", "env.fixtures['lamp'].on", "env.fresh", "env.goal", "env.rng"]
    assert walk.changed(before, walk.fingerprints(world)) == expected


def test_attributes_are_put_back_wherever_they_are_kept(rng):
    """Changed, new and deleted ones; those of objects, and of dictionaries that hold objects too."""
    world = World()
    lamp = world.fixtures["lamp"]
    lamp.regions = {"int": {"p0": rng.normal(size=3), "element": object()}}
    lamp.old = 7
    env = types.SimpleNamespace(
        fixtures=world.fixtures,
        robots=[],
        _observables={},
        goal=np.zeros(3),
        rng=np.random.default_rng(0),
        sim=types.SimpleNamespace(model=types.SimpleNamespace(_model=MODEL), data=types.SimpleNamespace(_data=DATA)),
    )
    start = state.baseline(env)

    def change(value: float) -> None:
        lamp.on, lamp.fresh, lamp.regions["int"]["p0"] = value > 0, value, np.full(3, value)
        env.goal[1] = value

    def seen() -> dict:
        return copy.deepcopy(state.attributes(env))

    change(0.5)
    del lamp.old
    snapshot, expected = pickle.loads(pickle.dumps(state.capture(env, start))), seen()
    change(-2.0)
    lamp.old, lamp.later, env.more = 8, [1], {"a": 1}
    assert not state.same(seen(), expected)
    state.apply(env, start, *snapshot)
    assert state.same(seen(), expected) and not hasattr(lamp, "old") and not hasattr(env, "more")
    begun = state.capture(env, start)[1]["attributes"]
    assert set(begun) == {
        ("env", "goal"),
        ("fixtures[lamp]", "on"),
        ("fixtures[lamp]", "fresh"),
        ("fixtures[lamp].regions.int", "p0"),
    }
