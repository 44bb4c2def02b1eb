"""Makes a virtual environment in which `transformers` runs on the CPU. Usage: environment.py FOLDER

Prints the environment's Python. Does nothing if the environment is there; one that was interrupted is made
anew. Where `CONSORT_TEST_PYTHON` names a Python that has torch and transformers, as a comparison on a GPU needs one with
CUDA, that is printed. Exits with 77 if packages cannot be had here, after saying why: the caller then skips.

The torch package is linked against 2 GB of CUDA libraries, none of which computes anything on a CPU. What is
called nowhere on a CPU is therefore not downloaded, but replaced: the symbols that torch's Python bindings
want from those libraries are given by empty functions (see `stand_in`).
"""

import ctypes
import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

CANNOT_BE_HAD = 77
# All downloads together; far above what a slow line takes for the 620 MB.
SECONDS_MAX = 540
# Silence of the network after which pip tries again.
NETWORK_SECONDS_MAX = "30"
# While an environment is made: torch before its CUDA part is removed, and pip's copies.
FREE_BYTES_MIN = 4 * 10**9

# Without their dependencies, which are CUDA. cudart and cupti (13 MB) are real: torch's CPU code calls them.
BARE = ["torch==2.13.0", "nvidia-cuda-runtime==13.0.96", "nvidia-cuda-cupti==13.0.85"]
# With theirs. torch's own that are not CUDA come last.
WHOLE = ["transformers==5.23.0", "numpy", "filelock", "typing-extensions", "setuptools", "sympy", "networkx"]
WHOLE += ["jinja2", "fsspec"]


def say(text):
    print(text, file=sys.stderr, flush=True)


def cannot(text):
    say(f"Python packages cannot be had here: {text}")
    sys.exit(CANNOT_BE_HAD)


def recipe():
    """What the environment follows from: made again when this changes."""
    texts = [sys.version, *BARE, *WHOLE, pathlib.Path(__file__).read_text()]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def run(command, deadline, what):
    """Runs what may fail because of where it runs."""
    try:
        limit = max(1, deadline - time.monotonic())
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        cannot(f"{what} took longer than {SECONDS_MAX} s")
    except OSError as error:
        cannot(f"{what}: {error}")
    if done.returncode != 0:
        cannot(f"{what} failed:\n" + "\n".join((done.stdout + done.stderr).splitlines()[-8:]))


def install(python, deadline):
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--no-cache-dir"]
    pip += ["--only-binary=:all:", "--timeout", NETWORK_SECONDS_MAX, "--retries", "2"]
    say(f"installing {', '.join(BARE)} (540 MB to download)")
    run([*pip, "--no-deps", *BARE], deadline, "installing torch")
    say(f"installing {WHOLE[0]} and what it needs (60 MB to download)")
    run([*pip, *WHOLE], deadline, "installing transformers")


def undefined(library):
    """What a library expects from others; without what may be missing."""
    names = subprocess.run(["nm", "-D", "--undefined-only", library], check=True, capture_output=True, text=True)
    fields = [line.split() for line in names.stdout.splitlines()]
    return {symbol.split("@")[0] for kind, symbol in fields if kind == "U"}


def c_source(symbols):
    """A C file that defines the symbols, so that the loader finds them.

    What torch's start asks of them must go well: a function returns the address of zeros, page-aligned, for
    whoever reads it as a reference, a pointer or a truth value; a constructor gives its object virtual
    functions of that kind; class descriptions (typeinfo) are real ones, as classes are registered by name.
    """
    lines = [
        "static char zeros[4096] __attribute__((aligned(4096)));",
        "static void *nothing(void) { return zeros; }",
        'extern char class_info[] __asm__("_ZTVN10__cxxabiv117__class_type_infoE");',
        'static const void *absent[2] = { class_info + 16, "6Absent" };',
        "static const void *virtual[66] = { 0, absent, [2 ... 65] = nothing };",
    ]
    for number, symbol in enumerate(sorted(symbols)):
        if symbol.startswith("_ZTI"):
            value = f'{{ class_info + 16, "{symbol[4:]}" }}'
            lines.append(f'const void *t{number}[2] __asm__("{symbol}") = {value};')
        elif symbol.startswith("_ZTV"):
            lines.append(f'const void *v{number}[66] __asm__("{symbol}") = {{ 0, absent, [2 ... 65] = nothing }};')
        elif re.search(r"C[12]E", symbol):
            body = "{ *this = virtual + 2; return this; }"
            lines.append(f'void *f{number}(const void **this) __asm__("{symbol}");')
            lines.append(f"void *f{number}(const void **this) {body}")
        else:
            lines.append(f'void *f{number}(void) __asm__("{symbol}");')
            lines.append(f"void *f{number}(void) {{ return zeros; }}")
    return "\n".join(lines) + "\n"


def stand_in(folder):
    """Puts stand-ins into torch's library folder in place of the CUDA libraries that are not there.

    Run in a Python that has not loaded torch: everything that the loader finds by itself needs no stand-in.
    """
    libraries = pathlib.Path(folder)
    cuda = libraries.parent.parent / "nvidia" / "cu13" / "lib"
    for name in ["libtorch_cuda_linalg.so", "libtorch_nvshmem.so", "libcaffe2_nvrtc.so"]:
        (libraries / name).unlink(missing_ok=True)
    for path in [cuda / "libcudart.so.13", cuda / "libcupti.so.13"]:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    for name in ["libgomp.so.1", "libc10.so", "libtorch_cpu.so", "libshm.so", "libc10_cuda.so"]:
        ctypes.CDLL(str(libraries / name), ctypes.RTLD_GLOBAL)
    here = ctypes.CDLL(None)
    missing = {symbol for symbol in undefined(libraries / "libtorch_python.so") if not hasattr(here, symbol)}
    for name in ["libtorch_cuda.so", "libcudnn.so.9", "libcufile.so.0", "libnccl.so.2"]:
        path = libraries / name
        source, version = path.with_suffix(".c"), path.with_suffix(".version")
        of_cudnn = {symbol for symbol in missing if symbol.startswith("cudnn")}
        symbols = {"libtorch_cuda.so": missing - of_cudnn, "libcudnn.so.9": of_cudnn}.get(name, set())
        source.write_text(c_source(symbols))
        # The loader warns of a library without the version that is asked for.
        version.write_text(f"{name} {{ *; }};\n")
        path.unlink(missing_ok=True)
        command = ["cc", "-shared", "-fPIC", "-w", f"-Wl,-soname,{name}", "-o", path, source]
        if symbols is of_cudnn:
            command.append(f"-Wl,--version-script={version}")
        subprocess.run(command, check=True)
        source.unlink()
        version.unlink()
    say(f"{len(missing)} symbols of CUDA libraries have stand-ins")


def make(folder, deadline):
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < FREE_BYTES_MIN:
        cannot(f"{free // 10**6} MB are free in {folder.parent}, {FREE_BYTES_MIN // 10**6} MB are needed")
    say(f"making a virtual environment in {folder}")
    run([sys.executable, "-m", "venv", str(folder)], deadline, "making a virtual environment")
    python = str(folder / "bin" / "python")
    install(python, deadline)
    where = "import sysconfig; print(sysconfig.get_path('platlib'))"
    packages = subprocess.run([python, "-c", where], check=True, capture_output=True, text=True).stdout.strip()
    subprocess.run([python, __file__, "--stand-in", os.path.join(packages, "torch", "lib")], check=True)
    subprocess.run([python, "-c", "import torch, transformers"], check=True)


def main():
    given = os.environ.get("CONSORT_TEST_PYTHON")
    if given:
        print(given)
        return
    folder = pathlib.Path(sys.argv[1]).absolute()
    deadline = time.monotonic() + SECONDS_MAX
    folder.parent.mkdir(parents=True, exist_ok=True)
    stamp = folder / "recipe"
    # Tests run beside each other, and two of them may want the environment.
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != recipe():
            make(folder, deadline)
            # Written last: no folder without it counts.
            stamp.write_text(recipe())
    print(folder / "bin" / "python")


if sys.argv[1] == "--stand-in":
    stand_in(sys.argv[2])
else:
    main()
