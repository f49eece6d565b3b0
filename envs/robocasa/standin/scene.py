"""Mends the scene that RoboCasa hands to MuJoCo, so that it compiles and can be seen without meshes and textures.

Absent textures become flat colours, geoms with an absent mesh invisible dots that keep their names, and what collides
in such a fixture is drawn too. What collides, weighs and moves stays exactly as RoboCasa wrote it.
"""

from __future__ import annotations

import copy
import os
import xml.etree.ElementTree as ET

from envs.robocasa.standin import mjcf

# Colour of a texture by a word in its path; the first that occurs counts.
_COLOURS = {
    "wall": ".86 .84 .79",
    "floor": ".62 .53 .44",
    "brick": ".62 .36 .30",
    "wood": ".60 .43 .28",
    "oak": ".66 .50 .34",
    "marble": ".88 .88 .87",
    "granite": ".50 .49 .48",
    "counter": ".74 .73 .71",
    "metal": ".68 .69 .71",
    "steel": ".68 .69 .71",
    "chrome": ".75 .76 .78",
    "black": ".12 .12 .13",
    "white": ".93 .93 .92",
    "gray": ".55 .55 .56",
    "grey": ".55 .55 .56",
    "red": ".65 .18 .16",
    "blue": ".24 .37 .60",
    "green": ".28 .47 .30",
}
# Parts that a task asks for, by a word in their names, in colours that can be told from the rest.
_PARTS = {
    "start_button": ".15 .65 .25 1",
    "stop_button": ".75 .18 .15 1",
    "handle": ".25 .25 .27 1",
    "knob": ".15 .15 .17 1",
    "spout": ".45 .47 .50 1",
}
_FILES = ("file", "fileright", "fileleft", "fileup", "filedown", "filefront", "fileback")
_DRAWN = ("type", "pos", "size", "quat", "euler", "axisangle", "fromto", "zaxis")  # what makes two geoms look the same


def mend(xml: str) -> str:
    """The scene with everything replaced that refers to an absent file.

    Args:
        xml: the whole scene, file names absolute.
    """
    root = ET.fromstring(xml)
    asset = root.find("asset")
    if asset is None:
        return xml
    for texture in asset.findall("texture"):
        _flatten(texture)
    absent = {mesh.get("name"): mesh for mesh in asset.findall("mesh") if not os.path.exists(mesh.get("file", ""))}
    for mesh in absent.values():
        asset.remove(mesh)
    for body in root.findall("worldbody/body"):
        if _dot(body, absent):
            _draw_what_collides(body)
    return ET.tostring(root, encoding="unicode")


def _flatten(texture: ET.Element) -> None:
    files = [texture.get(name, "") for name in _FILES if name in texture.attrib]
    if not files or all(os.path.exists(file) for file in files):
        return
    for name in (*_FILES, "gridsize", "gridlayout", "hflip", "vflip"):
        texture.attrib.pop(name, None)
    path = files[0].lower()
    words = [word for word in _COLOURS if word in path]
    rgb = _COLOURS[words[0]] if words else mjcf.colour(os.path.basename(path)).rsplit(" ", 1)[0]
    texture.attrib.update(builtin="flat", rgb1=rgb, width="8", height="8")


def _dot(body: ET.Element, absent: dict[str | None, ET.Element]) -> bool:
    """Turns geoms of absent meshes into dots; whether there were any."""
    dotted = False
    for geom in body.iter("geom"):
        if geom.get("mesh") not in absent:
            continue
        dotted = True
        for name in ("mesh", "material", "fromto", "size", "density"):
            geom.attrib.pop(name, None)
        geom.attrib.update(type="sphere", size="0.001", rgba="0 0 0 0", contype="0", conaffinity="0", mass="0")
    return dotted


def _draw_what_collides(body: ET.Element) -> None:
    """Adds a copy to be drawn of each geom that collides, unless the body has one that looks the same."""
    for part in body.iter("body"):
        geoms = part.findall("geom")
        drawn = {_look(geom) for geom in geoms if geom.get("group") == "1"}
        for geom in geoms:
            if geom.get("group", "0") != "0" or geom.get("type") == "mesh" or _look(geom) in drawn:
                continue
            twin = copy.deepcopy(geom)
            for name in ("name", "class", "density", "material"):
                twin.attrib.pop(name, None)
            if geom.get("material") is not None:
                twin.set("material", geom.get("material", ""))
                twin.attrib.pop("rgba", None)
            else:
                twin.set("rgba", _part_colour(geom, part, body))
            twin.attrib.update(group="1", contype="0", conaffinity="0", mass="0")
            part.append(twin)


def _look(geom: ET.Element) -> tuple[str | None, ...]:
    return tuple(geom.get(name) for name in _DRAWN)


def _part_colour(geom: ET.Element, part: ET.Element, fixture: ET.Element) -> str:
    names = (geom.get("name", ""), part.get("name", ""))
    for word, rgba in _PARTS.items():
        if any(word in name for name in names):
            return rgba
    kind = fixture.get("name", "").split("_")[0]
    return mjcf.colour(kind, part.get("name", ""), saturation=0.12)
