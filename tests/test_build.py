"""What the build decides on machines that lack things, and that it serves C++ alone."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from backends import REQUIRED

BACKEND = Path(__file__).parents[1] / "build_backend.py"
NAMES = ("PROLORA_NATIVE", "PROLORA_CUDA", "PROLORA_EMULATE", "CXX", "CUDACXX", "CUDA_PATH")


@pytest.fixture
def backend(monkeypatch):
    """The backend on a Linux machine with a compiler, nvcc and a driver, and no wishes."""
    pytest.importorskip("scikit_build_core", reason="the build backend is not installed")
    spec = importlib.util.spec_from_file_location("build_backend_under_test", BACKEND)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in (*NAMES, "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    machine(monkeypatch, {"c++", "nvcc", "nvidia-smi"})
    return module


def machine(monkeypatch, tools, system="linux", processor="x86_64", headers=True):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.machine", lambda: processor)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}" if name in tools else None)
    monkeypatch.setattr("os.path.exists", lambda path: False)
    monkeypatch.setattr("os.path.isfile", lambda path: headers and path.endswith("Python.h"))
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)


def needs(backend, settings=None):
    return backend._requirements(lambda _: ["cmake"], settings)


def run(backend, works, settings=None):
    """The settings that were tried, in turn; `works` says which of them builds."""
    tried = []

    def build(folder, settings, metadata):
        # Metadata of a wheel of another kind would be refused.
        assert metadata == (None if tried else "metadata")
        tried.append(settings)
        if not works(settings):
            raise SystemExit(1)
        return "name.whl"

    backend._build(build, "folder", settings, "metadata")
    return tried


def is_pure(settings):
    return settings.get("wheel.cmake") == "false"


def test_off_is_pure_python_and_needs_no_tools(backend, monkeypatch, capsys):
    monkeypatch.setenv("PROLORA_NATIVE", "OFF")
    assert needs(backend) == []
    (settings,) = run(backend, works=is_pure)
    assert settings["wheel.py-api"] == "py3"
    assert capsys.readouterr() == ("", "")


def test_a_machine_without_a_compiler_gets_a_pure_wheel_and_one_line(backend, monkeypatch, capsys):
    machine(monkeypatch, tools=())
    assert needs(backend) == []
    run(backend, works=is_pure)
    assert capsys.readouterr().err == (
        "prolora: built without the compiled extension: there is no C++ compiler\n"
    )


def test_a_python_without_headers_such_as_that_of_comfyui_portable_gets_a_pure_wheel(
    backend, monkeypatch, capsys
):
    machine(monkeypatch, {"c++"}, "win32", "AMD64", headers=False)
    assert needs(backend) == []
    (settings,) = run(backend, works=is_pure)
    assert is_pure(settings) and "this Python has no headers" in capsys.readouterr().err


@pytest.mark.parametrize("project", [".", "examples/icon_family"])
def test_pip_builds_with_a_python_that_ignores_pythonpath_as_that_of_comfyui_portable(
    tmp_path, project
):
    # What pip makes for a build: a folder that PYTHONPATH names, which enters that of requirements.
    site, required = tmp_path / "site", tmp_path / "required"
    for folder in (site, required / "scikit_build_core"):
        folder.mkdir(parents=True)
    # Python's own modules count as packages there, and would be missing.
    (site / "sitecustomize.py").write_text(f"import sys; sys.path = [{str(required)!r}]")
    for name in ("__init__", "build"):
        (required / "scikit_build_core" / f"{name}.py").touch()
    code = "import sys; sys.path.append(sys.argv[1]); import build_backend, wave"
    subprocess.run(
        [sys.executable, "-B", "-I", "-S", "-c", code, BACKEND.parent / project],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{site}"},
        check=True,
    )


def test_what_cannot_be_compiled_is_left_out_step_by_step(backend, capsys):
    first, without_cuda, pure = run(backend, works=is_pure)
    assert first == {} and is_pure(pure)
    assert without_cuda == {"cmake.define.PROLORA_CUDA": "OFF"}
    assert "without the compiled extension" in capsys.readouterr().err


def test_kernels_that_cannot_be_compiled_cost_the_kernels_alone(backend, capsys):
    tried = run(backend, works=lambda s: s.get("cmake.define.PROLORA_CUDA") == "OFF")
    assert len(tried) == 2
    assert "without CUDA kernels" in capsys.readouterr().err


def test_a_build_that_works_says_nothing(backend, capsys):
    assert run(backend, works=lambda settings: True) == [{}]
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("wish", ["PROLORA_NATIVE", "PROLORA_CUDA"])
@pytest.mark.parametrize("by", ["environment", "pip"])
def test_what_was_asked_for_is_never_left_out(backend, monkeypatch, wish, by):
    settings = {f"cmake.define.{wish}": "ON"} if by == "pip" else None
    if by == "environment":
        monkeypatch.setenv(wish, "ON")
    tried = []

    def build(folder, settings, metadata):
        tried.append(settings)
        raise SystemExit(1)

    with pytest.raises(SystemExit):
        backend._build(build, "folder", settings, None)
    assert tried == [settings or {}]


@pytest.mark.parametrize("wish", ["PROLORA_NATIVE", "PROLORA_CUDA"])
def test_on_without_a_compiler_still_tries(backend, monkeypatch, wish):
    machine(monkeypatch, tools=())
    monkeypatch.setenv(wish, "ON")
    assert needs(backend)[0] == "cmake"
    with pytest.raises(SystemExit):
        run(backend, works=is_pure)


def test_another_word_is_refused(backend, monkeypatch):
    monkeypatch.setenv("PROLORA_NATIVE", "yes")
    with pytest.raises(SystemExit, match="must be AUTO, ON or OFF, not YES"):
        needs(backend)


@pytest.mark.parametrize(
    ("tools", "system", "processor", "fetched"),
    [
        ({"c++", "nvidia-smi"}, "linux", "x86_64", True),
        ({"c++", "nvidia-smi"}, "linux", "aarch64", True),
        ({"c++", "nvidia-smi"}, "linux", "riscv64", False),
        ({"c++"}, "darwin", "arm64", False),
        ({"c++", "nvidia-smi"}, "win32", "AMD64", False),
        ({"c++", "nvcc", "nvidia-smi"}, "linux", "x86_64", False),
        ({"c++"}, "linux", "x86_64", False),
    ],
)
def test_nvcc_is_fetched_where_there_is_a_driver_and_wheels_of_it(
    backend, monkeypatch, tools, system, processor, fetched
):
    machine(monkeypatch, tools, system, processor)
    assert (backend.NVCC_WHEELS[0] in needs(backend)) is fetched
    assert backend.NVCC_WHEELS[0] not in needs(backend, {"cmake.define.PROLORA_CUDA": "OFF"})


def test_no_driver_means_no_cuda_unless_it_was_asked_for(backend, monkeypatch, capsys):
    machine(monkeypatch, {"c++", "nvcc"})
    (settings,) = run(backend, works=lambda settings: True)
    assert settings == {"cmake.define.PROLORA_CUDA": "OFF"}
    assert capsys.readouterr().err == (
        "prolora: built without CUDA kernels: no NVIDIA driver here; PROLORA_CUDA=ON compiles them "
        "all the same\n"
    )
    monkeypatch.setenv("PROLORA_CUDA", "ON")
    assert run(backend, works=lambda settings: True) == [{}]
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("PROLORA_CUDA", "AUTO")
    monkeypatch.setattr("ctypes.util.find_library", lambda name: name == "cuda" and "libcuda.so.1")
    assert run(backend, works=lambda settings: True) == [{}]


def test_windows_finds_its_compilers_by_cmake(backend, monkeypatch):
    machine(monkeypatch, (), "win32", "AMD64")
    assert needs(backend) == ["cmake"]


@pytest.mark.parametrize(
    ("version", "architectures"),
    [
        ("11.8", ""),
        ("12.0.140", "75-real;80;90"),
        ("12.4.131", "75-real;80;90"),
        ("12.8.61", "75-real;80;90-real;100-real;120"),
        ("13.0.88", "75-real;80;90-real;100-real;120"),
    ],
)
def test_architectures_go_by_the_version_of_nvcc(version, architectures, tmp_path):
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    script = tmp_path / "ask.cmake"
    script.write_text(
        f"include({BACKEND.parent.as_posix()}/cmake/DefaultArchitectures.cmake)\n"
        f'default_architectures({version} result)\nmessage("${{result}}")\n'
    )
    done = subprocess.run(["cmake", "-P", script], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == architectures


@pytest.fixture
def configure(tmp_path):
    """Runs CMake up to the compiler: gives exit code, messages, and the commands that compile."""
    pybind11 = pytest.importorskip("pybind11", reason="no pybind11")
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not (shutil.which("cmake") and shutil.which("c++") and headers.is_file()):
        pytest.skip("no cmake, no C++ compiler or no headers of Python")

    def run(*options, **environment):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        line = ["cmake", "-S", BACKEND.parent, "-B", folder, *(f"-D{option}" for option in options)]
        line += [
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]
        line += ["-G", "Unix Makefiles", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
        environment = {k: v for k, v in os.environ.items() if k not in NAMES} | environment
        done = subprocess.run(line, capture_output=True, text=True, env=environment)
        table = folder / "compile_commands.json"
        commands = json.loads(table.read_text()) if table.is_file() else []
        lines = [entry["command"] for entry in commands]
        return done.returncode, " ".join((done.stdout + done.stderr).split()), lines

    return run


HOST = "PROLORA_CUDA=OFF"


@pytest.mark.slow
def test_warnings_are_errors_only_where_that_was_asked_for(configure):
    code, _, lines = configure(HOST)
    assert code == 0 and lines and not any("-Werror" in line for line in lines)
    code, _, lines = configure(HOST, "PROLORA_WERROR=ON")
    assert code == 0 and lines and all("-Werror" in line for line in lines)
    project = (BACKEND.parent / "pyproject.toml").read_text()
    assert 'PROLORA_WERROR = {env = "PROLORA_WERROR", default = "OFF"}' in project


@pytest.mark.slow
def test_an_nvcc_that_cannot_compile_and_a_missing_openmp_cost_themselves_alone(configure):
    without = "CMAKE_DISABLE_FIND_PACKAGE_OpenMP=ON"
    code, said, lines = configure(without, CUDACXX=shutil.which("false"))
    assert code == 0 and "prolora: built without CUDA kernels" in said
    assert "prolora: built without OpenMP" in said
    assert lines and not any(".cu" in line or "openmp" in line for line in lines)
    code, said, _ = configure("PROLORA_CUDA=ON", CUDACXX=shutil.which("false"))
    assert code != 0 and "PROLORA_CUDA=ON, but" in said
    code, said, _ = configure(HOST, without, "PROLORA_NATIVE=ON")
    assert code != 0 and "PROLORA_NATIVE=ON, but no OpenMP" in said


def test_a_program_in_c_plus_plus_uses_the_ops_without_python(tmp_path):
    if not (shutil.which("cmake") and shutil.which("c++")) and "cpu" not in REQUIRED:
        pytest.skip("no cmake or no C++ compiler")
    build, installed = tmp_path / "build", tmp_path / "installed"
    line = ["cmake", "-S", BACKEND.parent, "-B", build, "-DPROLORA_LIBRARY=ON", f"-D{HOST}"]
    subprocess.run(line, check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build], check=True, capture_output=True)
    done = subprocess.run([build / "small_svd"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[1].split() == ["20", "14", "8", "2"]
    line = ["cmake", "--install", build, "--prefix", installed]
    subprocess.run(line, check=True, capture_output=True)
    assert (installed / "include" / "prolora" / "ops.h").is_file()
    assert list(installed.rglob("libprolora_ops.a"))


def test_the_compiler_of_windows_gets_no_options_of_gcc(configure):
    code, _, lines = configure(HOST, "MSVC=ON")
    assert code == 0 and lines
    assert all("/W3" in line and "-Wall" not in line and "-fno-math" not in line for line in lines)
