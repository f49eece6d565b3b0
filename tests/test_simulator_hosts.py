"""What `rollout.*` refuses before a run begins. Actors on a real cluster: tests/test_ray_workers.py."""

import dataclasses
import socket
import sys

import pytest

from z1_jax import processes
from z1_jax.config.checks import check
from z1_jax.config.schema import Config, ConfigError, RolloutConfig
from z1_jax.simulator_hosts import check_ray


def config(backend: str = "ray", address: str = "", workers: int = 2) -> Config:
    base = Config()
    return dataclasses.replace(
        base, rollout=RolloutConfig(backend, address), env=dataclasses.replace(base.env, workers=workers)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("local", "auto"), r"rollout.address: got auto, which has no effect with rollout.backend=local"),
        (("ray", "head"), r"rollout.address: got head, expected HOST:PORT"),
        (("ray", "head:0"), r"rollout.address: got head:0, expected HOST:PORT"),
        (("ray", "head:70000"), r"rollout.address: got head:70000, expected HOST:PORT"),
        (("ray", "ray://head:10001"), r"rollout.address: got ray://head:10001, expected HOST:PORT"),
        (("ray", "", 0), r"env.workers: got 0 with rollout.backend=ray, expected the number of actors"),
    ],
)
def test_what_would_have_no_effect_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        check(config(*given))


def test_addresses_of_ray_are_accepted():
    for address in ("", "auto", "head.example:6379", "10.0.0.1:6379"):
        check(config(address=address))
    check(config("local"))


def test_nothing_is_simulated_without_an_evaluation():
    base = config()
    alone = dataclasses.replace(
        base,
        algorithm="sft",
        demos=dataclasses.replace(base.demos, dataset="data/some"),
        eval=dataclasses.replace(base.eval, episodes=0),
    )
    with pytest.raises(ConfigError, match="rollout.backend: got ray, but with eval.episodes=0 nothing is simulated"):
        check(alone)


def test_a_missing_ray_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"rollout.backend: got ray, but Ray is not installed: pip install 'z1-jax\["):
        check_ray(config())
    check_ray(config("local"))


def test_several_learners_need_an_address(monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'z1-jax[ray]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check_ray(config())
    monkeypatch.setattr(processes, "count", lambda: 4)
    with pytest.raises(ConfigError, match="rollout.address: got '' with 4 learners"):
        check_ray(config())


def test_an_address_where_nothing_listens_is_told_at_once():
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'z1-jax[ray]'")
    with socket.socket() as found:
        found.bind(("127.0.0.2", 0))
        port = found.getsockname()[1]
    with pytest.raises(ConfigError, match="no Ray cluster at .*: Connection refused"):
        check_ray(config(address=f"127.0.0.2:{port}"))
    with pytest.raises(ConfigError, match="no Ray cluster at nowhere.invalid:6379: "):
        check_ray(config(address="nowhere.invalid:6379"))
