"""The fixture models that RoboCasa 1.0.1's download brings, made of primitives.

Which there are is read from the installed RoboCasa: its fixture registry names the models of each type, its source
those of handles and panels.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterator

from envs.robocasa.standin import mjcf
from envs.robocasa.standin.appliances import APPLIANCES
from envs.robocasa.standin.mjcf import box, geom, region

# Shape and half sizes (metres) of what does not move, by type of the registry.
_FORMS: dict[str, tuple[str, tuple[float, float, float]]] = {
    "blender_lid": ("cylinder", (0.075, 0.075, 0.012)),
    "candle": ("cylinder", (0.04, 0.04, 0.06)),
    "cinnamon": ("cylinder", (0.025, 0.025, 0.055)),
    "digital_scale": ("box", (0.09, 0.09, 0.015)),
    "dish_rack": ("open", (0.22, 0.16, 0.08)),
    "flower_vase": ("cylinder", (0.07, 0.07, 0.16)),
    "fruit_bowl": ("open", (0.13, 0.13, 0.05)),
    "glass_cup": ("open", (0.04, 0.04, 0.06)),
    "hood": ("box", (0.38, 0.25, 0.30)),
    "jar": ("cylinder", (0.05, 0.05, 0.07)),
    "jar_lid": ("cylinder", (0.05, 0.05, 0.012)),
    "knife_block": ("box", (0.06, 0.08, 0.11)),
    "oil_bottle": ("cylinder", (0.035, 0.035, 0.13)),
    "paper_towel": ("cylinder", (0.07, 0.07, 0.15)),
    "paprika": ("cylinder", (0.025, 0.025, 0.055)),
    "pepper_shaker": ("cylinder", (0.022, 0.022, 0.05)),
    "plant": ("cylinder", (0.08, 0.08, 0.13)),
    "salt_shaker": ("cylinder", (0.022, 0.022, 0.05)),
    "soap_dispenser": ("cylinder", (0.035, 0.035, 0.09)),
    "stool": ("cylinder", (0.17, 0.17, 0.44)),
    "tiered_basket": ("open", (0.15, 0.15, 0.18)),
    "turmeric": ("cylinder", (0.025, 0.025, 0.055)),
    "utensil_rack": ("box", (0.25, 0.02, 0.16)),
    "utensil_set": ("cylinder", (0.06, 0.06, 0.16)),
    "vinegar_bottle": ("cylinder", (0.035, 0.035, 0.13)),
    "window": ("box", (0.50, 0.03, 0.40)),
}
_HALF = {"elongated": (0.01, 0.02, 0.12), "knob": (0.015, 0.017, 0.015), "panel": (0.20, 0.01, 0.30)}
# RoboCasa writes a style's texture into the element `tex` of handles and panels.
_TEXTURED = '<texture name="tex" type="2d" file="texture.png"/><material name="mat" texture="tex" shininess="0.1"/>'


def models(package: pathlib.Path) -> Iterator[tuple[pathlib.PurePosixPath, str]]:
    """The files of all fixtures: path below the assets folder, and text.

    Args:
        package: the folder of the installed `robocasa`.
    """
    import yaml  # comes with RoboCasa

    for registry in sorted((package / "models" / "assets" / "fixtures" / "fixture_registry").glob("*.yaml")):
        kind = registry.stem
        if kind not in APPLIANCES and kind not in _FORMS:
            continue  # walls, floors, cabinets and counters are RoboCasa's own text; their textures are mended later
        paths = {entry["xml"] for entry in yaml.safe_load(registry.read_text()).values() if "xml" in entry}
        for path in sorted(paths):
            yield pathlib.PurePosixPath(path) / "model.xml", _fixture(kind, path.rpartition("/")[2])
    for source in ("cabinets.py", "cabinet_panels.py"):
        text = (package / "models" / "fixtures" / source).read_text()
        for path in re.findall(r'"(fixtures/(?:handles|cabinets/cabinet_panels)/[^"]+/model\.xml)"', text):
            yield pathlib.PurePosixPath(path), _handle_or_panel(path, _is_knob(path, text))


def _fixture(kind: str, name: str) -> str:
    half, body = APPLIANCES[kind]() if kind in APPLIANCES else _simple(kind, name)
    return mjcf.model(name, body, mjcf.site("anchor_site", (0, 0, half[2])))


def _simple(kind: str, name: str) -> tuple[tuple[float, float, float], str]:
    shape, half = _FORMS[kind]
    rgba = mjcf.colour(kind, name)
    solids = mjcf.shaped(shape, half, wall=0.006, floor=0.008)
    body = "".join(geom(solid, rgba, more='density="100"') for solid in solids)
    body += region("main", (0, 0, 0), half) + region("bbox", (0, 0, 0), half)
    inner = [half[0] - 0.008, half[1] - 0.008, half[2] - 0.004]
    if kind == "dish_rack":
        return half, body + region("int_0", (0, 0, 0.004), inner)
    return half, body + (region("int", (0, 0, 0.004), inner) if shape == "open" else "")


def _is_knob(path: str, source: str) -> bool:
    """Whether RoboCasa's source lists the handle among its knobs, which it scales by other rules."""
    return path in source.partition("VISUAL_MESH_KNOB_HANDLE_REG = {")[2].partition("}")[0]


def _handle_or_panel(path: str, knob: bool) -> str:
    name, looks = path.split("/")[-2], 'material="mat"'
    form = "panel" if "cabinet_panels" in path else "knob" if knob else "elongated"
    x, y, z = half = _HALF[form]
    solids = [box((-x, x), (-y, y), (-z, z))]
    if form == "elongated":  # a bar and what holds it
        solids = [box((-x, x), (-y, 0), (-z, z))]
        solids += [box((-x, x), (0, y), (end - 0.012, end + 0.012)) for end in (-z * 0.8, z * 0.8)]
    body = "".join(geom(solid, more='density="10"', looks=looks) for solid in solids)
    return mjcf.model(name, body + region("main", (0, 0, 0), half), assets=_TEXTURED)
