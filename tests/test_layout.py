"""The directions of imports, read from the sources: who may know whom."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SOURCES = sorted(p for top in ("envs", "z1_jax", "configs") for p in (ROOT / top).rglob("*.py"))
ACCELERATOR = {"jax", "flax", "optax", "orbax", "chex"}
PURE = {f"z1_jax.rl.{name}" for name in ("flow", "tree", "advantage", "loss", "real_time", "schedules")}
INPUT_OUTPUT = {"os", "io", "json", "pathlib", "subprocess", "multiprocessing", "shutil", "ml_collections", "mujoco"}


def module_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in SOURCES}
MAINS = {name for name in MODULES if name in ("z1_jax.train", "z1_jax.evaluate") or name.endswith(".__main__")}


def imports(source: str, module: str = "m") -> set[str]:
    """Every module that `source` imports, also inside functions: `from a import b` is a.b where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                found.add(full if full in MODULES else node.module)
    return found


IMPORTS = {name: imports(path.read_text(), name) for name, path in MODULES.items()}


def under(name: str, *tops: str) -> bool:
    return any(name == top or name.startswith(top + ".") for top in tops)


def test_the_scan_sees_what_it_should():
    assert len(SOURCES) > 30
    assert imports("def f():\n    import jax.numpy as jnp\n    from z1_jax import train") == {
        "jax.numpy",
        "z1_jax.train",
    }
    assert "z1_jax.rl.flow" in IMPORTS["z1_jax.rl.actor"] and "envs.base" in IMPORTS["envs.pool"]


def offenders(chosen, forbidden) -> list[str]:
    return [f"{name} imports {other}" for name in chosen for other in sorted(IMPORTS[name]) if forbidden(other)]


def test_environments_know_neither_the_project_nor_jax():
    """Workers start fast and hold no accelerator."""
    envs = [name for name in MODULES if under(name, "envs")]
    assert offenders(envs, lambda other: under(other, "z1_jax", "configs", *ACCELERATOR)) == []


def test_models_know_only_types_sharding_and_models():
    models = [name for name in MODULES if under(name, "z1_jax.models")]
    allowed = ("z1_jax.errors", "z1_jax.types", "z1_jax.sharding", "z1_jax.models")
    assert offenders(models, lambda o: under(o, "z1_jax", "envs", "configs") and not under(o, *allowed)) == []


def test_the_methods_formulas_are_pure():
    assert set(MODULES) >= PURE
    allowed = (*PURE, "z1_jax.errors", "z1_jax.types")
    assert offenders(PURE, lambda o: under(o, *INPUT_OUTPUT) or (under(o, "z1_jax", "envs") and o not in allowed)) == []


def test_data_knows_neither_models_nor_environments():
    data = [name for name in MODULES if under(name, "z1_jax.data")]
    allowed = ("z1_jax.errors", "z1_jax.files", "z1_jax.types", "z1_jax.data")
    assert offenders(data, lambda o: under(o, "z1_jax", "envs") and not under(o, *allowed)) == []


def test_errors_files_types_and_sharding_stand_at_the_bottom():
    bottom = ["z1_jax.errors", "z1_jax.files", "z1_jax.types", "z1_jax.sharding"]
    allowed = ("z1_jax.errors", "z1_jax.types", "envs.text")  # the last: of both packages, and imports nothing
    assert offenders(bottom, lambda o: under(o, "z1_jax", "envs") and o not in allowed) == []


def test_only_config_knows_ml_collections():
    others = [name for name in MODULES if not under(name, "z1_jax.config.schema", "configs", "z1_jax.presets")]
    assert offenders(others, lambda o: under(o, "ml_collections", "absl")) == []


def test_nothing_imports_the_mains():
    assert offenders(MODULES, lambda o: o in MAINS) == []
    composers = MAINS | {"z1_jax.run_dir"}  # the report's page is written at a command's end
    assert offenders([m for m in MODULES if m not in composers], lambda o: o == "z1_jax.report.write") == []


def test_no_module_imports_itself_by_way_of_others():
    """Also not for a type checker alone. What imports only what is settled is settled; what is left goes in circles."""
    left = {name: {o for o in IMPORTS[name] if o in MODULES and o != name} for name in MODULES}
    while settled := {name for name, others in left.items() if not others & set(left)}:
        left = {name: others for name, others in left.items() if name not in settled}
    assert left == {}


@pytest.mark.parametrize("module", sorted(m for m in MODULES if under(m, "envs")))
def test_environments_draw_from_explicit_generators(module):
    """No global random state: `np.random.normal()`, `random.random()` and the like."""
    allowed = {"default_rng", "Generator", "SeedSequence", "Philox", "PCG64", "BitGenerator"}
    # These simulators draw from the global generator: their adapters seed it, and put back what was there.
    if module in ("envs.robocasa.env", "envs.libero.simulation"):
        allowed |= {"RandomState", "seed", "get_state", "set_state"}
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("np.random", "numpy.random"):
            assert node.attr in allowed, f"{module}:{node.lineno} uses np.random.{node.attr}"
    assert "random" not in IMPORTS[module]


def test_random_inputs_of_tests_come_from_the_runs_seed():
    """So that --seed draws them all again."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and not node.args and path.name not in ("seeds.py", "tiny_env.py"):
                assert ast.unparse(node.func) not in ("np.random.default_rng", "np.random.SeedSequence"), path
            if isinstance(node, ast.Import):
                assert path.name == "seeds.py" or node.names[0].name != "secrets", path


ARRAYS = {"np.ndarray", "jax.Array", "Array"}


def without_shape(source: str) -> list[str]:
    """Parameters of public functions that take arrays and do not say of what shape."""
    found = []

    def shaped(node: ast.AST) -> bool:  # Float[np.ndarray, "B D"]
        parts = node.slice.elts if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Tuple) else []
        return len(parts) == 2 and isinstance(parts[1], ast.Constant) and isinstance(parts[1].value, str)

    def bare(node: ast.AST) -> bool:
        if shaped(node):
            return False
        return ast.unparse(node) in ARRAYS or any(bare(child) for child in ast.iter_child_nodes(node))

    def visit(body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                visit(node.body)
            if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__call__"):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                found.extend(f"{node.name}: {a.arg}" for a in arguments if a.annotation and bare(a.annotation))

    visit(ast.parse(source).body)
    return found


def test_public_functions_give_the_shapes_of_the_arrays_that_they_take():
    assert without_shape("def f(a: np.ndarray | None, *, b: Mapping[str, Array]): ...") == ["f: a", "f: b"]
    assert without_shape("def f(a: Float[Array, 'B D'], b: int): ...\ndef _g(a: Array): ...") == []
    assert {name: bad for name, path in MODULES.items() if under(name, "z1_jax")
            if (bad := without_shape(path.read_text()))} == {}  # fmt: skip
