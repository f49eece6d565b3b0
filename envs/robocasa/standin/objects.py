"""Objects made of one to five boxes or cylinders, six of each of RoboCasa's categories.

Which categories there are, where their models belong and by what they are scaled is read from the installed RoboCasa.
"""

from __future__ import annotations

import ast
import pathlib
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from envs.robocasa.standin import mjcf

INSTANCES = 6
_FOLDERS = {"objaverse": "objaverse", "aigen": "aigen_objs", "lightwheel": "lightwheel"}  # registry → folder

# Shape and size (width, depth, height; metres) of a category, or of a type of categories; the first that fits counts.
_FORMS: dict[str, tuple[str, tuple[float, float, float]]] = {
    "plate": ("box", (0.20, 0.20, 0.02)),
    "bowl": ("open", (0.16, 0.16, 0.06)),
    "pan": ("open", (0.22, 0.22, 0.05)),
    "saucepan": ("open", (0.18, 0.18, 0.09)),
    "saucepan_with_lid": ("open", (0.18, 0.18, 0.09)),
    "pot": ("open", (0.20, 0.20, 0.11)),
    "mug": ("open", (0.075, 0.075, 0.09)),
    "cup": ("open", (0.07, 0.07, 0.10)),
    "glass_cup": ("open", (0.07, 0.07, 0.10)),
    "wine_glass": ("open", (0.065, 0.065, 0.13)),
    "tray": ("open", (0.30, 0.22, 0.03)),
    "baking_sheet": ("open", (0.32, 0.24, 0.025)),
    "oven_tray": ("open", (0.32, 0.24, 0.03)),
    "cutting_board": ("box", (0.28, 0.18, 0.02)),
    "placemat": ("box", (0.32, 0.24, 0.006)),
    "ice_cube_tray": ("open", (0.20, 0.10, 0.04)),
    "basket": ("open", (0.22, 0.18, 0.10)),
    "colander": ("open", (0.20, 0.20, 0.09)),
    "tupperware": ("open", (0.18, 0.13, 0.07)),
    "digital_scale": ("box", (0.18, 0.18, 0.03)),
    "watermelon": ("box", (0.20, 0.16, 0.16)),
    "cantaloupe": ("box", (0.14, 0.14, 0.13)),
    "pineapple": ("box", (0.11, 0.11, 0.20)),
    "coconut": ("box", (0.11, 0.11, 0.11)),
    "cabbage": ("box", (0.13, 0.13, 0.12)),
    "lettuce": ("box", (0.13, 0.13, 0.12)),
    "cauliflower": ("box", (0.13, 0.13, 0.11)),
    "pizza": ("box", (0.24, 0.24, 0.02)),
    "cereal": ("box", (0.15, 0.055, 0.20)),
    "receptacle": ("cylinder", (0.075, 0.075, 0.15)),
    "drink": ("cylinder", (0.06, 0.06, 0.14)),
    "condiment": ("cylinder", (0.05, 0.05, 0.13)),
    "spice": ("cylinder", (0.05, 0.05, 0.10)),
    "utensil": ("box", (0.17, 0.03, 0.02)),
    "tool": ("box", (0.15, 0.05, 0.03)),
    "meat": ("box", (0.11, 0.06, 0.03)),
    "bread_food": ("box", (0.12, 0.06, 0.05)),
    "packaged_food": ("box", (0.06, 0.06, 0.10)),
    "fruit": ("cylinder", (0.065, 0.065, 0.06)),
    "vegetable": ("box", (0.10, 0.05, 0.05)),
    "": ("box", (0.07, 0.055, 0.05)),
}
_DENSITY_HINT = 'density="100"'  # RoboCasa overwrites it by the category's own


def categories(package: pathlib.Path) -> dict[str, dict[str, Any]]:
    """RoboCasa's table of object categories as it stands in its source, without importing RoboCasa.

    Args:
        package: the folder of the installed `robocasa`.

    Raises:
        ValueError: the source has no such table.
    """
    path = package / "models" / "objects" / "kitchen_objects.py"
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "OBJ_CATEGORIES":
            return eval(compile(ast.Expression(node.value), str(path), "eval"))
    raise ValueError(f"{path} has no table OBJ_CATEGORIES: expected RoboCasa v0.2 or v1.0.1")


def models(package: pathlib.Path) -> Iterator[tuple[pathlib.PurePosixPath, str]]:
    """The files of all objects: path below the assets folder, and text."""
    for name, category in categories(package).items():
        for registry in _FOLDERS.keys() & category.keys():
            for folder, instance in _instances(name, registry, category[registry]):
                path = pathlib.PurePosixPath("objects") / folder / instance
                if category[registry].get("is_auxiliary_obj"):
                    path /= name  # a lid lies in a folder of its own beside what it closes
                yield path / "model.xml", _model(name, instance, category["types"], category[registry].get("scale", 1))


def _instances(name: str, registry: str, settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Folder and name of each model: the first names that the category does not exclude."""
    excluded = set(settings.get("exclude", ()))
    for folder in settings.get("model_folders", [f"{_FOLDERS[registry]}/{name}"]):
        stem = folder.rpartition("/")[2]
        names = (f"{stem}_{index}" for index in range(100 + len(excluded)))
        yield from [(folder, instance) for instance in names if instance not in excluded][:INSTANCES]


def _model(category: str, instance: str, types: str | tuple[str, ...], scale: float | list[float]) -> str:
    keys = (category, *((types,) if isinstance(types, str) else types), "")
    shape, extent = _FORMS[next(key for key in keys if key in _FORMS)]
    vary = np.random.default_rng(zlib.crc32(instance.encode()))
    scales = (scale,) * 3 if isinstance(scale, int | float) else scale
    # RoboCasa multiplies by the scale: divided here, an object has its size whatever the real models' units were.
    wide, high = vary.uniform(0.9, 1.05), vary.uniform(0.85, 1.15)
    half = [size * by / 2 / s for size, by, s in zip(extent, (wide, wide, high), scales, strict=True)]
    solids = mjcf.shaped(shape, half, wall=0.006 / scales[0], floor=0.008 / scales[2])
    body = "".join(mjcf.geom(solid, mjcf.colour(category, instance), more=_DENSITY_HINT) for solid in solids)
    sites = (
        mjcf.site("bottom_site", (0, 0, -half[2]))
        + mjcf.site("top_site", (0, 0, half[2]))
        + mjcf.site("horizontal_radius_site", (half[0], half[1], 0))
    )
    return mjcf.model(instance, body + mjcf.region("bbox", (0, 0, 0), half), sites)
