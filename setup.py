"""Build of hyperfast's two pybind11 modules with ninja. Nothing here needs torch.

hyperfast._cpu    csrc/module_cpu.cpp and csrc/cpu/dispatch.cpp once, every other csrc/cpu/*.cpp once per ISA
hyperfast._cuda   csrc/module_cuda.cpp and csrc/cuda/*.cu, when nvcc is found

Objects and compiler reports stay in build/ninja-*, so the next build compiles only what changed. What was
built, or why not, goes to hyperfast/_build_info.json, which `python -m hyperfast.info` prints.

Environment: CXX (default g++); CUDA_HOME (when set, the only place where nvcc is looked for);
HYPERFAST_CUDA=auto|1|0 (build _cuda if possible, or fail, or leave it); HYPERFAST_SANITIZE=address,undefined.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = Path("build", f"ninja-{sysconfig.get_config_var('SOABI')}")  # relative to ROOT, where ninja runs

ISA_FLAGS = {"scalar": ""}
if platform.machine() == "x86_64":
    ISA_FLAGS["avx2"] = "-mavx2 -mfma -mf16c"
    # gcc 12 warns about its own AVX-512 header.
    ISA_FLAGS["avx512"] = (
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512 -Wno-maybe-uninitialized"
    )
# sm_80 code serves every 8.x, sm_90a is Hopper in full, later GPUs compile compute_90's PTX.
CUDA_TARGETS = {
    "sm_80": "-gencode arch=compute_80,code=sm_80",
    "sm_90a": "-gencode arch=compute_90a,code=sm_90a",
    "PTX compute_90": "-gencode arch=compute_90,code=compute_90",
}
RULES = """\
rule cxx
  command = $cxx $flags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule nvcc
  command = $nvcc $flags -MMD -MF $out.d -c $in -o $out > $out.txt 2>&1 || { cat $out.txt; exit 1; }
  depfile = $out.d
  deps = gcc
rule link
  command = $linker -shared $in -o $out $flags
"""


def find_nvcc() -> tuple[str | None, str]:
    """nvcc's path, or None and the sentence that says where it was looked for."""
    home = os.environ.get("CUDA_HOME")
    path = f"{home}/bin" if home else os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    places = f"CUDA_HOME={home}" if home else "PATH and /usr/local/cuda"
    nvcc = shutil.which("nvcc", path=path)
    return nvcc, "" if nvcc else f"nvcc was not found in {places}"


def choose_nvcc() -> tuple[str | None, str]:
    """What HYPERFAST_CUDA asks for: nvcc's path, or None and the reason to build without it."""
    mode = os.environ.get("HYPERFAST_CUDA", "auto")
    if mode not in ("auto", "1", "0"):
        raise SystemExit(f"hyperfast: HYPERFAST_CUDA is {mode!r}; it may be auto, 1 or 0")
    if mode == "0":
        return None, "the build was told HYPERFAST_CUDA=0"
    nvcc, reason = find_nvcc()
    if mode == "1" and nvcc is None:
        raise SystemExit(f"hyperfast: HYPERFAST_CUDA=1, but {reason}; set CUDA_HOME or HYPERFAST_CUDA=auto")
    return nvcc, reason


def version_of(command: str, pattern: str) -> str:
    """What `pattern` captures in the output of `command --version`; SystemExit if there is none."""
    try:
        text = subprocess.run([*shlex.split(command), "--version"], capture_output=True, text=True).stdout
    except OSError as error:
        raise SystemExit(f"hyperfast: cannot run {command} ({error}); set CXX to a C++ compiler") from None
    found = re.search(pattern, text)
    return found[1] if found else "unknown"


def sources(*patterns: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for pattern in patterns for path in ROOT.glob(pattern))


def build_file(nvcc: str | None, cxx: str) -> str:
    """The text of build.ninja; its targets are BUILD/_cpu.so and, with nvcc, BUILD/_cuda.so."""
    import pybind11

    sanitize = os.environ.get("HYPERFAST_SANITIZE")
    if sanitize:  # every report ends the process
        sanitize = f"-fsanitize={sanitize} -fno-sanitize-recover=all -D_GLIBCXX_ASSERTIONS"
        sanitize = f" -O1 -g -fno-omit-frame-pointer {sanitize}"
    sanitize = sanitize or ""
    common = "-O3 -std=c++17 -fPIC -fvisibility=hidden -fopenmp -Wall -Wextra" + sanitize
    includes = {pybind11.get_include(), *(sysconfig.get_path(name) for name in ("include", "platinclude"))}
    module = " ".join([common, *(f"-isystem {shlex.quote(path)}" for path in sorted(includes))])
    device = " ".join(
        ["-O3 -std=c++17 -Xcompiler=-fPIC,-fvisibility=hidden -Xptxas -v", *CUDA_TARGETS.values()]
    )
    text = [f"builddir = {BUILD}", f"cxx = {cxx}", f"nvcc = {nvcc or ''}", RULES]

    def add_object(rule: str, source: str, flags: str, isa: str = "") -> str:
        target = f"{BUILD}/{Path(source).name}{isa and '.' + isa}.o"
        text.extend([f"build {target}: {rule} {source}", f"  flags = {flags.replace('$', '$$')}"])
        return target

    def add_module(name: str, linker: str, objects: list[str], flags: str) -> None:
        text.append(f"build {BUILD}/{name}.so: link {' '.join(objects)}")
        text.extend([f"  linker = {linker}", f"  flags = {flags}"])

    objects = [
        add_object("cxx", "csrc/module_cpu.cpp", module),
        add_object("cxx", "csrc/cpu/dispatch.cpp", common),
    ]
    for source in sources("csrc/cpu/*.cpp"):
        if source != "csrc/cpu/dispatch.cpp":
            for isa, flags in ISA_FLAGS.items():
                objects.append(add_object("cxx", source, f"{common} -DHYPERFAST_ISA={isa} {flags}", isa))
    add_module("_cpu", "$cxx", objects, "-fopenmp" + sanitize)
    if nvcc:
        objects = [add_object("cxx", "csrc/module_cuda.cpp", module)]
        objects += [add_object("nvcc", source, device) for source in sources("csrc/cuda/*.cu")]
        # The static CUDA runtime's names must not meet those of the shared one that torch loads.
        add_module("_cuda", "$nvcc", objects, "-cudart static -Xlinker --exclude-libs=ALL")
    return "\n".join(text) + "\n"


def run_ninja(module: str) -> tuple[bool, str]:
    """Build one module; whether it worked, and the compilers' output (printed as well)."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])
    ninja = shutil.which("ninja", path=path)
    if ninja is None:
        raise SystemExit("hyperfast: ninja was not found; install it with `pip install ninja`")
    command = [ninja, "-v", "-f", f"{BUILD}/build.ninja", f"{BUILD}/{module}.so"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    return done.returncode == 0, done.stdout


class NinjaBuild(build_ext):
    """build_ext that leaves the compiling to ninja, for editable installs and wheels alike."""

    def run(self) -> None:
        nvcc, reason = choose_nvcc()
        cxx = os.environ.get("CXX", "g++")
        info = {"compiler": version_of(cxx, r"^(.*)"), "isas": list(ISA_FLAGS)}
        (ROOT / BUILD).mkdir(parents=True, exist_ok=True)
        (ROOT / BUILD / "build.ninja").write_text(build_file(nvcc, cxx))
        if not run_ninja("_cpu")[0]:
            raise SystemExit("hyperfast: hyperfast._cpu did not compile; the compiler's messages are above")
        self.install("_cpu")
        if nvcc:
            reason = self.build_cuda()
        if nvcc and not reason:
            self.install("_cuda")
            info["cuda"] = {"built": True, "reason": "", "nvcc": version_of(nvcc, r"V([\d.]+)")}
            info["cuda"]["architectures"] = list(CUDA_TARGETS)
        else:
            self.target("_cuda").unlink(missing_ok=True)  # an older build's
            info["cuda"] = {"built": False, "reason": reason}
        text = json.dumps(info, indent=2) + "\n"
        self.target("_cpu").with_name("_build_info.json").write_text(text)

    def build_cuda(self) -> str:
        """Why _cuda did not compile, or nothing; SystemExit where HYPERFAST_CUDA=1 demands it."""
        built, output = run_ninja("_cuda")
        if built:
            return ""
        said = next((line.strip() for line in output.splitlines() if "error" in line.lower()), "")
        reason = f"hyperfast._cuda did not compile: {said or 'see the build output'}"
        if os.environ.get("HYPERFAST_CUDA") == "1":
            raise SystemExit(f"hyperfast: HYPERFAST_CUDA=1, but {reason}")
        return reason

    def target(self, module: str) -> Path:
        return Path(self.get_ext_fullpath(f"hyperfast.{module}"))

    def install(self, module: str) -> None:
        """Put a module where Python finds it; atomically, for the older one may be in use."""
        target = self.target(module)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / BUILD / f"{module}.so", f"{target}.new")
        os.replace(f"{target}.new", target)


if __name__ == "__main__":
    headers = sources("csrc/**/*.h", "csrc/**/*.cuh")
    setup(
        license="Apache-2.0",
        packages=find_packages(include=["hyperfast", "hyperfast.*"]),  # hyperfast/kernels links to kernels/
        ext_modules=[Extension("hyperfast._cpu", sources("csrc/**/*.cpp", "csrc/**/*.cu"), depends=headers)],
        cmdclass={"build_ext": NinjaBuild},
    )
