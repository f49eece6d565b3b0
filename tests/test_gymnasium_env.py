"""Environments of gymnasium behind our interface, against the environments themselves."""

import functools
import itertools
import pathlib

import gymnasium
import numpy as np
import pytest
from dot_gym import Push
from seeds import fresh_seed

from envs import demos, kitchen
from envs.base import Episode, episodes
from envs.gymnasium_env import GymnasiumEnv, Places, gymnasium_suite, read_options
from envs.pool import EnvPool
from envs.suite import SettingError
from z1_jax import suites
from z1_jax.config.command_line import parse_command_line
from z1_jax.config.schema import ConfigError

DOT = "dot_gym:tests/Dot-v0"
OPTIONS = ("state=agent/place", "success=task/solved", "instruction=words")
PLACES = read_options(OPTIONS)
APART = ("--config.group.branching=none", "--config.group.prefix_chunks=0", "--config.group.prefix_chunks_end=0")


def dot(**given) -> GymnasiumEnv:
    return GymnasiumEnv(DOT, **{"places": PLACES, "image_size": 8, **given})


def config_of(name: str, *keys: str):
    config = parse_command_line(["", "--config=configs/grpo.py", f"--config.env.suite=gym:{name}", *keys])
    suites.check_settings(config)
    return config


def test_the_kitchen_by_way_of_gymnasium_is_the_kitchen(seed=None):
    seed = fresh_seed(__name__) if seed is None else seed
    cameras = kitchen.CAMERAS[:2]
    places = read_options(
        [f"image={cameras[0]}", f"image={cameras[1]}", "state=state", "success=success", "instruction=instruction"]
    )
    one = GymnasiumEnv("envs.kitchen.gym:z1/CloseDrawer-v0", places, 64, 20)
    other = kitchen.make("CloseDrawer", cameras=cameras, image_size=64, horizon=20)
    assert one.spec.task == "CloseDrawer-v0" and one.spec.horizon == 20 and one.spec.control_hz == 20
    for env in (one, other):
        env.reset(Episode(seed))
    rng = np.random.default_rng(seed)
    done = False
    while not done:
        looks = [env.observe() for env in (one, other)]
        for camera in cameras:
            np.testing.assert_array_equal(*(look.images[camera] for look in looks), err_msg=f"seed {seed}")
        np.testing.assert_array_equal(*(look.state for look in looks))
        assert looks[0].instruction == looks[1].instruction
        actions = rng.uniform(-1, 1, (6, 12)).astype(np.float32)  # as gymnasium takes them
        results = [env.step_chunk(actions) for env in (one, other)]
        assert (results[0].steps, results[0].success) == (results[1].steps, results[1].success), f"seed {seed}"
        done = results[0].done
        assert done == results[1].done


def test_actions_are_scaled_and_episodes_end():
    env = dot()
    env.reset(Episode(1, "Dot-v0"))
    raw = env.env.unwrapped
    raw.taken.clear()
    env.step_chunk(np.array([[-1.0, -1.0], [1.0, 1.0], [0.0, 0.5], [3.0, -3.0]]))
    np.testing.assert_allclose(raw.taken, [[0, -4], [2, 4], [1, 2], [2, -4]])
    assert all(action.dtype == np.float32 for action in raw.taken)
    result = env.step_chunk(np.ones((10, 2)))
    assert result.success and result.done and result.steps < 8 and raw.place > 10
    assert env.step_chunk(np.ones((3, 2))).steps == 0  # what is over goes no further
    env.reset(Episode(1))
    result = env.step_chunk(-np.ones((20, 2)))
    assert (result.steps, result.success, result.done) == (12, False, True)


def test_what_ends_by_itself_without_success_is_a_failure():
    env = dot()
    env.reset(Episode(2))
    env.env.unwrapped.place = -20.0
    result = env.step_chunk(-np.ones((4, 2)))
    assert (result.steps, result.success, result.done) == (1, False, True)
    env = dot(places=read_options([*OPTIONS[:1], "success=terminated"]))
    env.reset(Episode(2))
    env.env.unwrapped.place = -20.0
    assert env.step_chunk(-np.ones((4, 2))).success


def test_pictures_state_and_words():
    env = dot()
    env.reset(Episode(3))
    env.env.unwrapped.place = 7.5
    env.step_chunk(np.zeros((1, 2)))  # by 1, and a little noise
    look = env.observe()
    assert look.instruction == "move on" and look.state.dtype == np.float32
    np.testing.assert_allclose(look.state, [8.5, 1.0], atol=0.1)
    picture = look.images["render"]  # 10 × 20 to 4 × 8 on black
    assert picture.shape == (8, 8, 3) and not picture[:2].any() and not picture[6:].any()
    assert picture[2:6, :2, 0].min() == 200 and not picture[2:6, 5:].any()
    assert env.render("render", 20)[5:15, :8, 0].min() == 200
    fixed = dot(places=read_options(["state=none", "success=task/solved", "text=go to the end"])).observe()
    assert fixed.instruction == "go to the end" and fixed.state.tolist() == [0.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["picture=x"], "got 'picture=x', expected NAME=VALUE with a name of image, state, success"),
        (["state"], "got 'state', expected NAME=VALUE"),
        (["state="], "got 'state=', expected NAME=VALUE"),
        (["state=a", "state=b"], "got state=b twice"),
        (["image=a", "image=a"], "got image=a twice"),
        (["hz=fast"], "got hz=fast, expected a number"),
        (["text=a", "instruction=b"], "expected one of them"),
    ],
)
def test_options_that_cannot_be_are_one_line(options, message):
    with pytest.raises(SettingError, match=message) as error:
        read_options(options)
    assert error.value.key == "env.options"
    assert read_options(["image=a", "image=b"]).image == ("a", "b")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (DOT, (), "the observation has agent, words, expected state=ONE OF THEM"),
        (DOT, ("state=speed",), "state=speed is not there: the observation has agent, words, the info task"),
        (DOT, ("state=agent/place",), "success=is_success is not there"),
        (DOT, (*OPTIONS, "image=words"), r"image=words is .*, expected a picture uint8"),
        ("CartPole-v1", (), "expected a vector with finite bounds"),
        ("NoSuch-v1", (), "NameNotFound"),
        ("dot_gym:tests/Drifts-v0", OPTIONS, "seed 0 started differently the second time"),
        (DOT, (*OPTIONS, "expert=dot_gym:Pull"), "expert=dot_gym:Pull cannot be imported"),
    ],
)
def test_an_environment_that_does_not_fit_is_one_line(name, options, message):
    with pytest.raises(ConfigError, match=f"^config key env.(suite|options): .*{message}") as error:
        config_of(name, *APART, "--config.demos.dataset=d", f"--config.env.options={','.join(options)}")
    assert "\n" not in str(error.value)


def test_what_cannot_be_copied_branches_nowhere():
    options = f"--config.env.options={','.join(OPTIONS)}"
    for branching in ("tree", "prefix"):
        with pytest.raises(ConfigError, match=f"group.branching: got {branching}, but environments of .* cannot be"):
            config_of(DOT, options, "--config.demos.dataset=d", f"--config.group.branching={branching}")
    with pytest.raises(ConfigError, match="demos.dataset: got '', but env.suite=gym:.* has no scripted expert"):
        config_of(DOT, options, *APART)
    config = suites.settled(config_of(DOT, f"{options},expert=dot_gym:Push", *APART, "--config.env.image_size=28"))
    found = (config.task, config.env.cameras, config.env.image_size, config.env.horizon)
    assert found == ("Dot-v0", ("render",), 28, 12)
    assert config.directory.name == "grpo-tests-Dot-v0-Dot-v0-seed0"
    assert suites.demonstrator(config).make_expert is Push


def test_options_are_gymnasiums():
    with pytest.raises(ConfigError, match="env.options: got .'state=x'., which only env.suite=gym:ENV_ID has"):
        suites.settled(parse_command_line(["", "--config=configs/grpo.py", "--config.env.options=state=x"]))


def test_a_worker_that_dies_is_replayed_without_snapshots(tmp_path):
    rng = np.random.default_rng(4)
    actions = rng.uniform(-1, 1, (2, 2, 2, 2))
    outcomes = []
    for flag in ("", str(tmp_path / "died")):
        with EnvPool(functools.partial(_dies, flag), 2, 1) as pool:
            pool.reset([0, 1], episodes([5, 6]))
            pool.step([0, 1], actions[0])
            _, looks = pool.step([0, 1], actions[1])
            outcomes.append(np.stack([look.state for look in looks]))
    assert pool.replaced == 1 and (tmp_path / "died").exists()
    np.testing.assert_array_equal(*outcomes)


def _dies(flag: str) -> GymnasiumEnv:
    if "tests/Dies-v0" not in gymnasium.registry:
        gymnasium.register(
            "tests/Dies-v0",
            entry_point="dot_gym:Dot",
            disable_env_checker=True,
            kwargs={"flag": flag},
            max_episode_steps=12,
        )
    return GymnasiumEnv("tests/Dies-v0", PLACES, 8)


def test_ones_own_expert_demonstrates():
    suite = gymnasium_suite(f"gym:{DOT}", (*OPTIONS, "expert=dot_gym:Push"), 8, 0)
    found = list(
        itertools.islice(
            demos.collect(suite.demonstrator("Dot-v0"), episodes(range(3)), processes=0, chunk=4, labels="recorded"), 3
        )
    )
    assert all(episode.success and episode.instruction == "move on" for episode in found)
    assert found[0].actions.shape[1:] == (4, 2) and (found[0].actions[..., 0] == 1).all()


def test_places_stand_in_the_documentation():
    text = (pathlib.Path(__file__).parents[1] / "docs" / "own-environment.md").read_text()
    for name in Places.__dataclass_fields__:
        assert f"`{name}`" in text or f"`{name}=" in text, name
