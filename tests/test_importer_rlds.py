"""RLDS: TFDS's own serialisation in TFRecord shards that are framed here by hand, read back without TensorFlow."""

import io
import json
import struct

import numpy as np
import pytest
from PIL import Image

from z1_jax.collect.importers.base import BadData, Columns
from z1_jax.collect.importers.detect import open_sources
from z1_jax.collect.importers.rlds import RldsDirectory, is_rlds
from z1_jax.errors import UserError

pytest.importorskip("google_crc32c")
tfds = pytest.importorskip("tensorflow_datasets")
SUITE, TASK = "libero_object", "pick_up_the_milk_and_place_it_in_the_basket"
WORDS = "pick up the milk and place it in the basket"


def crc32c(data: bytes) -> int:
    """Castagnoli's polynomial, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def features():
    """Of OpenVLA's LIBERO datasets, at a smaller size of picture."""
    f = tfds.features
    picture = f.Image(shape=(16, 16, 3), dtype=np.uint8, encoding_format="jpeg")
    observation = {
        "image": picture,
        "wrist_image": picture,
        "state": f.Tensor(shape=(8,), dtype=np.float32),
        "joint_state": f.Tensor(shape=(7,), dtype=np.float32),
    }
    step = {
        "observation": f.FeaturesDict(observation),
        "action": f.Tensor(shape=(7,), dtype=np.float32),
        "discount": f.Scalar(dtype=np.float32),
        "reward": f.Scalar(dtype=np.float32),
        "is_first": f.Scalar(dtype=np.bool_),
        "is_last": f.Scalar(dtype=np.bool_),
        "is_terminal": f.Scalar(dtype=np.bool_),
        "language_instruction": f.Text(),
    }
    return f.FeaturesDict({"steps": f.Dataset(step), "episode_metadata": f.FeaturesDict({"file_path": f.Text()})})


def jpeg(rng) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def make_episode(rng, steps: int, words=WORDS) -> list[dict]:
    return [
        {
            "observation": {
                "image": jpeg(rng),
                "wrist_image": jpeg(rng),
                "state": rng.normal(size=8).astype(np.float32),
                "joint_state": rng.normal(size=7).astype(np.float32),
            },
            "action": rng.uniform(-1, 1, 7).astype(np.float32),
            "discount": 1.0,
            "reward": float(step == steps - 1),
            "is_first": step == 0,
            "is_last": step == steps - 1,
            "is_terminal": step == steps - 1,
            "language_instruction": words if isinstance(words, str) else words[step],
        }
        for step in range(steps)
    ]


def opened(observation: dict) -> dict:
    """Pictures as files: TFDS encodes no JPEG without TensorFlow, and takes encoded ones as they are."""
    return {name: io.BytesIO(value) if isinstance(value, bytes) else value for name, value in observation.items()}


def write(folder, episodes, file_path=f"/data/{SUITE}_no_noops/{TASK}_demo.hdf5", shards=2):
    """Writes the episodes as TFDS lays a dataset out."""
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    folder.mkdir(parents=True)
    described = features()
    serializer = ExampleSerializer(described.get_serialized_info())
    described.save_config(str(folder))
    (folder / "dataset_info.json").write_text(json.dumps({"name": "libero_object", "version": "1.0.0"}))
    for shard in range(shards):
        records = b""
        for steps in episodes[shard::shards]:
            as_files = [{**step, "observation": opened(step["observation"])} for step in steps]
            encoded = described.encode_example({"steps": as_files, "episode_metadata": {"file_path": file_path}})
            data = serializer.serialize_example(encoded)
            head = struct.pack("<Q", len(data))
            records += head + masked(head) + data + masked(data)
        (folder / f"libero_object-train.tfrecord-{shard:05d}-of-{shards:05d}").write_bytes(records)
    return folder


def test_checksum_of_a_known_text():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of CRC-32C's definition


@pytest.mark.parametrize("stride", [1, 3])
def test_episodes_come_back_as_they_were_written(stride, rng, tmp_path):
    episodes = [make_episode(rng, steps) for steps in (7, 4, 5)]
    folder = write(tmp_path / "libero_object_no_noops" / "1.0.0", episodes)
    assert is_rlds(folder)
    (source,), flaws = open_sources([tmp_path], "", skip_bad=False)
    assert isinstance(source, RldsDirectory) and flaws == [] and source.fps == 20
    assert (source.cameras, source.action_dim, source.state_dim) == (("agentview", "robot0_eye_in_hand"), 7, 8)
    assert len(source.episodes) == 3 and {e.task for e in source.episodes} == {f"{SUITE}/{TASK}"}
    for reference, steps in zip(source.episodes, [episodes[0], episodes[2], episodes[1]], strict=True):  # by shards
        raw = source.read(reference, source.cameras, stride)
        np.testing.assert_array_equal(raw.actions, [step["action"] for step in steps])
        np.testing.assert_array_equal(raw.state, [step["observation"]["state"] for step in steps])
        for camera, stored in (("agentview", "image"), ("robot0_eye_in_hand", "wrist_image")):
            expected = [np.asarray(Image.open(io.BytesIO(s["observation"][stored]))) for s in steps[::stride]]
            np.testing.assert_array_equal(raw.images[camera], expected)
        assert raw.instruction == WORDS
        assert source.read(reference, (), stride, "carry it").instruction == "carry it"


def test_columns_by_name(rng, tmp_path):
    episodes = [make_episode(rng, 4)]
    folder = write(tmp_path / "mine", episodes, "/data/mine.hdf5", shards=1)
    plain = RldsDirectory(folder)
    assert plain.fps is None and plain.cameras == ("image", "wrist_image") and plain.episodes[0].task == WORDS
    columns = Columns(state=("joint_state", "state"), actions=("action",), images=(("front", "wrist_image"),))
    source = RldsDirectory(folder, columns=columns)
    assert (source.cameras, source.state_dim) == (("front",), 15)
    raw, steps = source.read(source.episodes[0], ("front",), 1), episodes[0]
    joined = [np.concatenate([s["observation"]["joint_state"], s["observation"]["state"]]) for s in steps]
    np.testing.assert_array_equal(raw.state, joined)
    for wrong, line in (
        (Columns(state=("pose",)), "option --state: steps of .* have no 'pose'; they have .*observation/state"),
        (Columns(images=(("front", "state"),)), "observation/state of .* holds no pictures; observation/image, "),
        (Columns(state=("image",)), "observation/image has shape"),
    ):
        with pytest.raises(BadData, match=line):
            RldsDirectory(folder, columns=wrong)
    with pytest.raises(UserError, match="has no split 'test'; it has train"):
        RldsDirectory(folder, "test")


def test_what_is_damaged_is_told(rng, tmp_path):
    folder = write(tmp_path / "a", [make_episode(rng, 3) for _ in range(4)])
    first, second = sorted(folder.glob("*.tfrecord-*"))
    whole = first.read_bytes()
    first.write_bytes(whole[:-20])
    with pytest.raises(BadData, match="is cut off or damaged at byte [1-9]"):
        open_sources([folder], "", skip_bad=False)
    (source,), flaws = open_sources([folder], "", skip_bad=True)
    assert len(source.episodes) == 3 and len(flaws) == 1
    at = int(rng.integers(200, len(whole) // 2 - 200))  # in the first record's data
    first.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    source = RldsDirectory(folder)
    broken = [e for e in source.episodes if e.task == ""]
    assert len(source.episodes) == 4 and len(broken) == 1
    with pytest.raises(BadData, match="the record at byte 12 is damaged"):
        source.read(broken[0], (), 1)
    first.write_bytes(whole)
    second.unlink()
    with pytest.raises(BadData, match="shard 1 of the 2 of split train is missing"):
        open_sources([folder], "", skip_bad=False)


def test_words_that_change_within_an_episode_are_refused(rng, tmp_path):
    folder = write(tmp_path / "a", [make_episode(rng, 3, ["open it", "open it", "close it"])], shards=1)
    source = RldsDirectory(folder)
    with pytest.raises(BadData, match="changes its instruction: 'open it', then 'close it'"):
        source.read(source.episodes[0], (), 1)
