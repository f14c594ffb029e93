"""Compiling at first use and the cache of libraries: real compilers, real processes, no mocks.

Processes import the folder of build_cpu.py as a package, because it only needs the standard library: importing torch in
each would take most of the time.
"""

import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from etmamba_timm.ops.kernels import build_cpu as build

COMPILER = next(filter(None, map(shutil.which, build.COMPILERS)), None)
ANSWER = 'extern "C" int answer() { return 42; }\n'
# Prints what the library answers, or the error. With 'watch', starting any process is an error.
LOAD = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(build.__file__).parents[1])!r})
from kernels import build_cpu as build, cache
def forbid(event, arguments):
    if event.startswith(("subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system", "pty.")):
        raise AssertionError(f"{{event}} {{arguments}}")
if "watch" in sys.argv:
    sys.addaudithook(forbid)
try:
    print(build.load(Path(sys.argv[1])).answer())
except build.BuildError as error:
    print(f"BuildError: {{error}}")
"""


@pytest.fixture(scope="module", autouse=True)
def _compiler(tmp_path_factory):
    """Skips without a compiler that takes our flags; asks it directly, so no fault of build_cpu.py skips tests."""
    if os.name != "posix" or COMPILER is None:
        pytest.skip("there is no C++ compiler on PATH, or no shell to wrap it")
    folder = tmp_path_factory.mktemp("probe")
    (folder / "probe.cpp").write_text(ANSWER)
    command = [COMPILER, *build.FLAGS, str(folder / "probe.cpp"), "-o", str(folder / "probe.so")]
    probe = subprocess.run(command, capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"{COMPILER} doesn't take the flags of build_cpu.py: {probe.stderr.strip()}")


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "answer.cpp"
    path.write_text(ANSWER)
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache folder that doesn't exist yet, for this process and those it starts."""
    folder = tmp_path / "the cache"
    monkeypatch.setenv("ETMAMBA_CACHE", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    return folder


def test_a_compilation_says_so_and_the_cache_is_silent(source, cache, caplog):
    caplog.set_level("INFO", "etmamba_timm")
    build.load(source)
    build.load(source)
    [message] = caplog.messages
    assert message.startswith("compiling the CPU kernels, about ten seconds")
    assert str(cache) in message


@pytest.fixture
def wrap(tmp_path, monkeypatch):
    """Makes a shell script of these lines the compiler; "$@" is its command line, $CXX_LOG a file to write to."""

    def use(*lines: str) -> Path:
        log, script = tmp_path / "compiler.log", tmp_path / "wrapped c++"
        script.write_text("\n".join(["#!/bin/sh", f"CXX_LOG={shlex.quote(str(log))}", *lines]) + "\n")
        script.chmod(0o755)
        monkeypatch.setenv("CXX", shlex.quote(str(script)))
        return log

    return use


def start(source: Path, *words: str, **env: str) -> subprocess.Popen:
    command = [sys.executable, "-c", LOAD, str(source), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env={**os.environ, **env}, stdout=pipe, stderr=pipe, text=True)


def outcome(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    return out.strip()


def libraries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


def listing(*folders: Path) -> list[str]:
    return sorted(str(path) for folder in folders for path in folder.rglob("*"))


# Compiling and caching


def test_compiles_calls_and_says_so_once(source, cache, caplog, capfd):
    caplog.set_level("INFO")
    for _ in range(2):
        library = build.load(source)
        assert isinstance(library, ctypes.CDLL)
        assert library.answer() == 42
    assert [(r.levelname, r.name) for r in caplog.records] == [("INFO", build.__name__)]
    assert capfd.readouterr() == ("", "")
    assert {path.name for path in cache.iterdir()} == {libraries(cache)[0].name, "lock"}


def test_a_warm_cache_needs_neither_compiler_nor_process(source, cache, tmp_path):
    assert "AssertionError: subprocess.Popen" in start(source, "watch").communicate()[1]  # the watch works
    assert outcome(start(source)) == "42"
    before = listing(cache)
    assert outcome(start(source, "watch", PATH=str(tmp_path / "nowhere"), CXX="/nowhere/c++")) == "42"
    assert listing(cache) == before


def test_another_source_text_is_another_library(source, cache):
    assert build.load(source).answer() == 42
    source.write_text(ANSWER.replace("42", "43"))
    assert build.load(source).answer() == 43
    assert len(libraries(cache)) == 2
    source.write_text(ANSWER)
    assert build.load(source).answer() == 42
    assert len(libraries(cache)) == 2


@pytest.mark.parametrize("name", ["_processor", "FLAGS", "OPTIONAL_FLAGS", "_SCHEME"])
def test_another_processor_or_other_flags_are_another_library(source, cache, monkeypatch, wrap, name):
    log = wrap('echo compiled >> "$CXX_LOG"', f'exec {COMPILER} "$@"')
    build.load(source)
    other = {
        "_processor": lambda: "a processor of another machine in the cluster",
        "FLAGS": (*build.FLAGS, "-DOTHER"),
        "OPTIONAL_FLAGS": ((),),
        "_SCHEME": build._SCHEME + 1,
    }
    monkeypatch.setattr(build, name, other[name])
    build.load(source)
    assert log.read_text().count("compiled") == 2
    assert len({path.name.split("-")[1] for path in libraries(cache)}) == 2


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="there is no /proc/cpuinfo")
def test_the_processor_is_known_by_its_features_and_not_by_what_changes():
    known = build._processor()
    features = [n for n in known.splitlines() if n.partition(":")[0].strip().lower() in ("flags", "features", "isa")]
    assert features
    assert "MHz" not in known
    assert "bogomips" not in known.lower()
    assert build._processor() == known


def test_nothing_is_written_outside_the_cache(source, cache, tmp_path, wrap):
    log = wrap('echo "$TMPDIR" >> "$CXX_LOG"', f'exec {COMPILER} "$@"')
    home, temporary, here = (tmp_path / name for name in ("home", "temporary", "here"))
    for folder in (home, temporary, here):
        folder.mkdir()
    before = listing(tmp_path)
    environment = {"HOME": str(home), "TMPDIR": str(temporary), "XDG_CACHE_HOME": "", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(
        [sys.executable, "-c", LOAD, str(source)], env={**os.environ, **environment}, cwd=here, capture_output=True
    )
    assert (process.stdout, process.stderr) == (b"42\n", b"")
    new = set(listing(tmp_path)) - set(before)
    assert new == {str(cache), str(cache / "lock"), str(libraries(cache)[0]), str(log)}
    assert Path(log.read_text().strip()).parent == cache  # the compiler's own temporary files


@pytest.mark.parametrize("refused", ["-march=native", "-m*=native"])
def test_a_compiler_that_does_not_know_the_native_flags(source, cache, wrap, refused):
    log = wrap(
        f'case "$*" in *{refused}*) echo "error: unknown value native" >&2; exit 1;; esac',
        'echo compiled >> "$CXX_LOG"',
        'for a; do shift; [ "$a" = -mcpu=native ] || set -- "$@" "$a"; done',  # GCC and Clang on x86 differ about it
        f'exec {COMPILER} "$@"',
    )
    assert build.load(source).answer() == 42
    assert log.read_text() == "compiled\n"


# Several processes, and killed ones


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no-locks"])
def test_eight_processes_at_once(source, cache, wrap, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(sys.modules[__name__], "LOAD", LOAD.replace("try:", "cache.fcntl = None\ntry:", 1))
    log = wrap('echo compiled >> "$CXX_LOG"', "sleep 1", f'exec {COMPILER} "$@"')
    processes = [start(source) for _ in range(8)]
    assert [outcome(process) for process in processes] == ["42"] * 8
    compiled = log.read_text().count("compiled")
    assert compiled == 1 if locks else 1 <= compiled <= 8
    assert outcome(start(source, "watch")) == "42"
    assert not list(cache.glob("build-*"))


def test_killed_during_a_compile(source, cache, tmp_path, wrap, monkeypatch):
    log = wrap(
        'for a; do [ "$last" = -o ] && echo partial > "$a"; last="$a"; done',
        'echo $$ > "$CXX_LOG.new" && mv "$CXX_LOG.new" "$CXX_LOG"',
        "exec sleep 60",
    )
    process = start(source)
    deadline = time.monotonic() + 30
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    compiler = int(log.read_text())
    try:
        monkeypatch.delenv("CXX")
        assert not libraries(cache)
        assert outcome(start(source)) == "42"  # while the orphaned compiler still runs
    finally:
        os.kill(compiler, signal.SIGKILL)
    [leftover] = cache.glob("build-*")
    assert (leftover / "made.so").read_text() == "partial\n"
    assert outcome(start(source, "watch")) == "42"

    # Leftovers stay for a day, since their process may be alive, and go at the next build.
    source.write_text(ANSWER.replace("42", "43"))
    assert outcome(start(source)) == "43"
    assert leftover.exists()
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(leftover, (two_days_ago, two_days_ago))
    source.write_text(ANSWER.replace("42", "44"))
    assert outcome(start(source)) == "44"
    assert not leftover.exists()


# A damaged cache


@pytest.mark.parametrize("damage", ["empty", "truncated", "one bit"])
def test_a_damaged_library_is_built_anew(source, cache, damage):
    assert outcome(start(source)) == "42"
    [library] = libraries(cache)
    good = library.read_bytes()
    middle = len(good) // 2
    flipped = good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :]
    library.write_bytes({"empty": b"", "truncated": good[:middle], "one bit": flipped}[damage])
    assert "AssertionError: subprocess.Popen" in start(source, "watch").communicate()[1]
    assert outcome(start(source)) == "42"
    assert outcome(start(source, "watch")) == "42"


def test_a_whole_library_that_does_not_load_here_is_built_anew(source, cache):
    """A folder shared with a system that has another C++ runtime: each has its own library, and neither is removed."""
    assert outcome(start(source)) == "42"
    [library] = libraries(cache)
    foreign = b"made by another system"
    library.unlink()
    library = library.with_name("-".join([*library.stem.split("-")[:2], build.digest(foreign)]) + ".so")
    library.write_bytes(foreign)
    assert outcome(start(source)) == "42"
    assert outcome(start(source, "watch")) == "42"
    assert library in libraries(cache)


# Errors


def test_a_cache_that_cannot_be_written(source, tmp_path, monkeypatch):
    """Its parent is a file, which fails for root as well."""
    monkeypatch.setenv("ETMAMBA_CACHE", str(source / "cache"))
    with pytest.raises(build.BuildError, match=r"Not a directory.*make it writable, or set ETMAMBA_CACHE to a folder"):
        build.load(source)


def test_a_warm_cache_may_be_read_only(source, cache):
    assert outcome(start(source)) == "42"
    cache.chmod(0o500)
    try:
        if os.access(cache, os.W_OK):
            pytest.skip("permissions don't bind this user, who is probably root")
        assert outcome(start(source, "watch")) == "42"
        source.write_text(ANSWER.replace("42", "43"))
        assert "make it writable, or set ETMAMBA_CACHE to a folder" in outcome(start(source))
    finally:
        cache.chmod(0o700)


def test_no_compiler(source, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler found.*install .* g\+\+ or clang\+\+, or set CXX"):
        build.load(source)


@pytest.mark.parametrize(("cxx", "message"), [("/nowhere/c++ -g", "No such file"), ('"c++', "No closing quotation")])
def test_a_compiler_that_does_not_run(source, cache, monkeypatch, cxx, message):
    monkeypatch.setenv("CXX", cxx)
    with pytest.raises(build.BuildError, match=rf"{message}.*set CXX"):
        build.load(source)


def test_a_compile_error(source, cache, capfd):
    source.write_text('extern "C" int answer() { return forty_two; }\n')
    with pytest.raises(build.BuildError, match=r": answer\.cpp:1:34: error: .*forty_two.*; install a C\+\+ compiler"):
        build.load(source)
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in cache.iterdir()] == ["lock"]


def test_a_link_error(source, cache, monkeypatch):
    """Of the linker's line and the compiler's ("ld returned 1", "linker command failed"), the one that says what."""
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-lno_such_library"))
    with pytest.raises(build.BuildError, match=r"failed \(exit status 1\): .*no_such_library"):
        build.load(source)


def test_a_compiler_that_fails_without_a_word(source, cache, wrap):
    wrap("exit 3")
    with pytest.raises(build.BuildError, match=r"failed \(exit status 3\): no message; install"):
        build.load(source)


def test_a_new_library_that_does_not_load(source, cache, wrap):
    """As on a folder mounted noexec."""
    wrap('for a; do [ "$last" = -o ] && echo nothing > "$a"; last="$a"; done')
    with pytest.raises(build.BuildError, match=r"doesn't load: .*\.so.*noexec.*set ETMAMBA_CACHE"):
        build.load(source)


# Where the cache is


def test_cache_dir(tmp_path, monkeypatch):
    for name in ("ETMAMBA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert build.cache_dir() == tmp_path / ".cache" / "etmamba_timm"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert build.cache_dir() == tmp_path / ".cache" / "etmamba_timm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert build.cache_dir() == tmp_path / "xdg" / "etmamba_timm"
    monkeypatch.setenv("ETMAMBA_CACHE", "~/mine")
    assert build.cache_dir() == tmp_path / "mine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ETMAMBA_CACHE", ".")
    assert build.cache_dir() == tmp_path
    monkeypatch.setenv("ETMAMBA_CACHE", "")
    assert build.cache_dir() == tmp_path / "xdg" / "etmamba_timm"


def test_no_home(monkeypatch):
    for name in ("ETMAMBA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    assert build.cache_dir().is_absolute()  # from the password database
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)  # as in a container that runs under a number
    with pytest.raises(build.BuildError, match="set ETMAMBA_CACHE"):
        build.cache_dir()
