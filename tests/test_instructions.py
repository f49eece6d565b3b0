"""Instructions that the user gives: for all, or by a table, for sources with and without their own."""

import json

import demo_files as files
import pytest
from damaged_demos import edit_hdf5

from z1_jax.collect.__main__ import main
from z1_jax.collect.importers.instructions import Instructions, read_instructions
from z1_jax.data.dataset import open_dataset
from z1_jax.errors import UserError

CAMERA = files.CAMERAS[0]


@pytest.fixture
def bare(rng, tmp_path):
    """HDF5 whose demonstrations have no ep_meta, as robomimic's own datasets."""
    path = files.write_hdf5(tmp_path / "drawer.hdf5", files.make_demos(rng))

    def forget(data):
        for name in data:
            del data[name].attrs["ep_meta"]

    return edit_hdf5(path, forget)


def collect(source, out, *options) -> list[str]:
    main(["collect", f"--from={source}", f"--out={out}", f"--cameras={CAMERA}", *options])
    return [row.instruction for row in open_dataset(out).episodes]


def test_demonstrations_without_words(bare, tmp_path, capsys):
    with pytest.raises(UserError, match="demo_1 has no instruction; .*--instruction=TEXT, or --instructions=TABLE"):
        collect(bare, tmp_path / "a")
    assert collect(bare, tmp_path / "b", "--instruction=pull it") == ["pull it"] * 3
    table = tmp_path / "words.csv"
    table.write_text('episode,instruction\ndemo_2,push it\n3,"lift it, slowly"\n')
    with pytest.raises(UserError, match="demo_1 has no instruction"):  # the table says nothing of it
        collect(bare, tmp_path / "c", f"--instructions={table}")
    words = ["pull it", "push it", "lift it, slowly"]
    assert collect(bare, tmp_path / "d", f"--instructions={table}", "--instruction=pull it") == words
    source = open_dataset(tmp_path / "d").source
    assert source["instructions"] == {"everywhere": "pull it", "table": [["demo_2", words[1]], ["3", words[2]]]}
    assert collect(bare, tmp_path / "d", f"--instructions={table}", "--instruction=pull it") == words  # there already
    with pytest.raises(UserError, match="exists with instructions"):
        collect(bare, tmp_path / "d", "--instruction=pull it")


def test_words_instead_of_a_sources_own(rng, tmp_path, capsys):
    demos = files.make_demos(rng)
    root = files.write_lerobot(tmp_path / "lerobot", demos)
    table = tmp_path / "words.json"
    table.write_text(json.dumps({"episode 1": "shut it"}))
    words = [demo.instruction for demo in demos]
    words[1] = "shut it"
    assert collect(root, tmp_path / "a", f"--instructions={table}") == words


def test_episodes_of_several_sources(rng, tmp_path, capsys):
    folder = tmp_path / "both"
    folder.mkdir()
    for name in ("one", "two"):
        files.write_hdf5(folder / f"{name}.hdf5", files.make_demos(rng))
    table = tmp_path / "words.json"
    table.write_text(json.dumps({"demo_1": "x"}))
    with pytest.raises(
        UserError, match="names 'demo_1', and one.hdf5 and two.hdf5 both have it; write one.hdf5/demo_1"
    ):
        collect(folder, tmp_path / "a", f"--instructions={table}")
    table.write_text(json.dumps({"one/demo_1": "x", "two.hdf5/2": "y"}))
    found = collect(folder, tmp_path / "b", f"--instructions={table}")
    assert (found[0], found[4]) == ("x", "y") and "x" not in found[1:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("words.json", '{"demo_9": "x"}', "names 'demo_9', which is not imported; there: demo_1, demo_2, demo_3"),
        ("words.json", '{"demo_1": "x", "demo_1": "y"}', "names 'demo_1' twice"),
        ("words.json", '{"demo_1": " "}', "has no text for 'demo_1'"),
        ("words.json", '{"demo_1": 5}', "cannot be read .it is no object of texts.; expected JSON such as"),
        ("words.json", '["x"]', "cannot be read"),
        ("words.json", "{", "cannot be read"),
        ("words.csv", "demo_1,a,b\n", "cannot be read .the line .* has 3 columns."),
        ("nothing.csv", None, "cannot be read"),
    ],
)
def test_tables_that_are_refused(bare, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"option --instructions: .*{message}") as error:
        collect(bare, tmp_path / "a", f"--instructions={tmp_path / name}", "--instruction=all")
    assert "\n" not in str(error.value) and not (tmp_path / "a").exists()


def test_the_closest_name_counts(tmp_path):
    told = Instructions("all", (("3", "number"), ("episode 3", "name"), ("episode 3, steps 4 to 9", "part")))
    assert told.of(tmp_path, "episode 3, steps 4 to 9", 3) == "part"
    assert told.of(tmp_path, "episode 3, steps 0 to 3", 3) == "name"
    assert told.of(tmp_path, "demo_3", 3) == "number" and told.of(tmp_path, "demo_4", 4) == "all"
    assert read_instructions("", None).of(tmp_path, "demo_4", 4) is None
