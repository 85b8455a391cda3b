import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import msmri

ROOT = Path(__file__).parents[1] / "msmri"
FILES = sorted(ROOT.rglob("*.py"))

# what each part of the package may import from the others; `errors` and the version everybody may
MAY_IMPORT = {
    "tensors": set(),
    "errors": set(),
    "allocation": set(),
    "config": set(),
    "metrics": {"tensors"},
    "distances": {"tensors"},
    "report": {"metrics", "tensors"},
    "physics": {"tensors"},
    "measurement": {"physics", "tensors"},
    "io": {"measurement", "physics", "tensors"},
    "model": {"tensors", "config"},
    "sampling": {"tensors", "physics.operators", "physics.solve"},
    "methods": {"tensors", "physics", "measurement", "model", "sampling"},
    "train": {"tensors", "measurement", "model", "config"},
    "preparation": {"tensors", "physics", "measurement", "io", "metrics"},
    "pipeline": {"tensors", "physics", "measurement", "io", "metrics", "report", "methods", "preparation"},
    "diagnostics": {
        "tensors",
        "physics",
        "measurement",
        "model",
        "sampling",
        "io",
        "metrics",
        "report",
        "methods",
        "preparation",
    },
}
EVERYTHING = {"cli", "testing", "interop", "__main__"}  # may import all, and nobody may import them
EXCEPTIONS = {
    ("methods.tuning", "metrics"),  # chooses a weight by a metric, on validation scans
    ("methods.adps", "methods.references"),
    ("methods.adps", "methods.references"),  # whom to cite
    ("methods.ssdu", "methods.ssdu_training"),  # the zero-shot form trains on the scan at hand
    ("methods.msm_noisy", "methods.msm_training"),  # the line-wise loss for noisy lines hides lines by the same law
    ("model.partial", "physics.fourier"),  # the measurement-domain denoiser works in k-space, with an operator
    ("model.partial", "physics.operators"),
    ("model.partial", "physics.solve"),
    ("model.ambient", "physics.operators"),  # so may the estimate from a further-masked image
    ("model.ambient", "physics.solve"),
    ("model.unrolled", "physics.operators"),
    ("model.unrolled", "physics.solve"),
    ("train", "io.output"),  # checkpoints and curves are written whole or not at all
    ("train", "report"),
    ("train", "physics.operators"),  # moves the maps to the device
}
HEAVY = {"matplotlib", "sigpy", "ismrmrd", "fastmri", "diffusers", "deepinv", "skimage", "torchmetrics", "lpips"}
STANDARD_ONLY = {"errors": set(), "config": {"yaml"}}


def name_of(path):
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(path, *, module_level=False):
    def visit(node):
        for child in ast.iter_child_nodes(node):
            if is_type_checking(child):
                continue
            if isinstance(child, ast.Import):
                yield from (alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative import"
                if child.module == "msmri":
                    yield from (f"msmri.{alias.name}" for alias in child.names)
                else:
                    yield child.module
                    yield from (f"{child.module}.{a.name}" for a in child.names if child.module in PACKAGES)
            elif not (module_level and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)):
                yield from visit(child)

    yield from visit(ast.parse(path.read_text("utf-8")))


PACKAGES = {"msmri.physics", "msmri.model", "msmri.sampling", "msmri.methods", "msmri.io", "msmri.interop"}
MODULES = {name_of(path) for path in FILES}


def inner(path):
    found = {name.removeprefix("msmri.") for name in imports(path) if name.startswith("msmri.")}
    return {name for name in found if name in MODULES}


def allowed(module, target):
    layer = module.split(".")[0]
    if target == "errors" or target == "" or layer in EVERYTHING:
        return True
    if layer == target.split(".")[0]:
        # methods know their own package and its tuning, but not one another
        return layer != "methods" or target == "methods" or module == "methods" or (module, target) in EXCEPTIONS
    if target == "physics" or "." not in target:
        granted = MAY_IMPORT[layer]
        return target in granted or (module, target) in EXCEPTIONS
    return bool({target, target.split(".")[0]} & MAY_IMPORT[layer]) or (module, target) in EXCEPTIONS


def test_flat_names_are_lazy():
    code = "import sys, msmri; assert 'torch' not in sys.modules; print(msmri.load_prior.__module__, msmri.__version__)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True).stdout
    assert told.split() == ["msmri.model.prior", msmri.__version__]
    assert all(hasattr(msmri, name) for name in msmri.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = msmri.nothing


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_one_way(path):
    module = name_of(path)
    if module == "":  # the flat public names, if any, are a matter of taste; heavy ones are refused below
        return
    assert module.split(".")[0] in MAY_IMPORT.keys() | EVERYTHING, f"{module} is in no layer: add it to this test"
    wrong = sorted(target for target in inner(path) if not allowed(module, target))
    assert not wrong, f"{module} imports {wrong}"
    if module.split(".")[0] not in EVERYTHING:
        assert not [target for target in inner(path) if target.split(".")[0] in EVERYTHING]


@pytest.mark.parametrize(
    ("module", "target", "expected"),
    [
        ("physics.coils", "tensors", True),
        ("physics.coils", "measurement", False),
        ("io.fastmri", "physics.masks", True),
        ("model.adm", "physics.operators", False),
        ("model.partial", "physics.operators", True),
        ("sampling.reverse", "physics.operators", True),
        ("sampling.reverse", "physics.masks", False),
        ("methods.msm", "methods.tv", False),
        ("methods.msm", "methods", True),
        ("methods.msm", "methods.tuning", False),
        ("methods.tuning", "metrics", True),
        ("methods.ssdu", "methods.ssdu_training", True),
        ("methods.tv", "metrics", False),
        ("methods.tv", "io.fastmri", False),
        ("train", "methods.msm", False),
        ("report", "metrics", True),
        ("metrics", "measurement", False),
        ("tensors", "errors", True),
        ("errors", "tensors", False),
        ("testing", "methods", True),
        ("methods.msm", "testing", False),
    ],
)
def test_the_rules_are_the_ones_meant(module, target, expected):
    assert allowed(module, target) is expected


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_heavy_libraries_are_imported_inside_functions(path):
    assert not {name.split(".")[0] for name in imports(path, module_level=True)} & HEAVY


@pytest.mark.parametrize("module", STANDARD_ONLY)
def test_the_floor_needs_only_the_standard_library(module):
    path = ROOT / f"{module}.py"
    if not path.exists():
        pytest.skip("not there yet")
    others = {name.split(".")[0] for name in imports(path)} - {"msmri"}
    assert others <= sys.stdlib_module_names | STANDARD_ONLY[module]


def test_nothing_is_called_utils():
    names = {part for path in FILES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert not names & {"util", "utils", "utility", "helpers", "misc"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_says_what_it_holds(path):
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert docstring
    assert len(docstring.splitlines()[0]) > 10


def attribute_chains(path):
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node), node.lineno


GLOBAL_DRAWS = {"torch.manual_seed", "torch.seed", "torch.cuda.manual_seed", "torch.cuda.manual_seed_all",
                "torch.set_rng_state", "random.seed", "random.random", "random.shuffle", "random.choice",
                "random.randint", "random.sample"}  # fmt: skip
LOCAL_NUMPY = {"default_rng", "Generator", "RandomState", "SeedSequence", "get_state"}
TORCH_DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
LIKE_DRAWS = {"rand_like", "randn_like", "randint_like"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_global_random_state(path):
    for chain, line in attribute_chains(path):
        parts = chain.split(".")
        assert chain not in GLOBAL_DRAWS, f"{path}:{line} uses {chain}"
        if parts[:2] in (["np", "random"], ["numpy", "random"]) and len(parts) > 2:
            assert parts[2] in LOCAL_NUMPY, f"{path}:{line} uses {chain}"
        assert not (parts[0] == "torch" and parts[-1] in LIKE_DRAWS), f"{path}:{line} uses {chain}; use normal_like"
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            name, given = ast.unparse(node.func), {keyword.arg for keyword in node.keywords}
            if name in {f"torch.{draw}" for draw in TORCH_DRAWS}:
                assert "generator" in given, f"{path}:{node.lineno} {name} draws from the global generator"
            if name.endswith("random.RandomState") or name.endswith("random.default_rng"):
                assert node.args or node.keywords, f"{path}:{node.lineno} {name} without a seed"


def test_entry_points_and_the_table_of_methods_agree():
    import tomllib

    from msmri.methods import BUILT_IN

    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"]["msmri.methods"] == dict(BUILT_IN)
    for value in BUILT_IN.values():
        assert (ROOT / Path(*value.split(":")[0].split(".")[1:])).with_suffix(".py").exists() or "msm" in value


def test_the_version_is_the_projects():
    import tomllib

    import msmri

    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text("utf-8"))["project"]
    assert msmri.__version__ == project["version"]
    try:
        installed = importlib.metadata.version("msmri")
    except importlib.metadata.PackageNotFoundError:
        return
    assert installed == msmri.__version__
