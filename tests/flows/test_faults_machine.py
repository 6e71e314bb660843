"""Unusual machines: file systems without locks, overlays, two users, closed streams, no home, long paths."""

import _strptime  # noqa: F401 - imported late by datetime, when another user may not read the interpreter's folder
import errno
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from numprune.errors import DiskError
from numprune.export import disk, locks, temporary
from numprune.flows import clean, runs, stages
from numprune.flows.cli import main
from tests.flows.conftest import Answered, work
from tests.flows.test_clean import make, record

Command = Callable[..., Answered]

# In front of the C library: what a file system refuses. FAULTS_FLOCK and FAULTS_FSYNC are error numbers.
REFUSING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

int flock(int file, int operation) {
    static int (*real)(int, int);
    if (!real) real = dlsym(RTLD_NEXT, "flock");
    const char *refused = getenv("FAULTS_FLOCK");
    if (!refused) return real(file, operation);
    errno = atoi(refused);
    return -1;
}

int fsync(int file) {
    static int (*real)(int);
    if (!real) real = dlsym(RTLD_NEXT, "fsync");
    const char *refused = getenv("FAULTS_FSYNC");
    struct stat found;
    if (!refused || fstat(file, &found) || !S_ISDIR(found.st_mode)) return real(file);
    errno = atoi(refused);
    return -1;
}
"""


@pytest.fixture(scope="session")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to be preloaded."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to build the file system with")
    folder = tmp_path_factory.mktemp("refusing")
    (folder / "refusing.c").write_text(REFUSING)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-o", folder / "refusing.so", folder / "refusing.c", "-ldl"], check=True
    )
    return folder / "refusing.so"


def cli(*argv: object, before: tuple[str, ...] = (), **options: object) -> "subprocess.CompletedProcess[str]":
    """A command line in a process of its own, with `before` in front of it."""
    command = [*before, sys.executable, "-m", "numprune.flows.cli", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)  # type: ignore[call-overload,no-any-return]


# --- file systems ---------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(refusing: Path, tmp_path: Path, refused: int) -> None:
    (tmp_path / "runs").mkdir()
    environment = {**os.environ, "LD_PRELOAD": str(refusing), "FAULTS_FLOCK": str(refused)}
    done = cli("runs", "clean", "--yes", "--workspace", tmp_path, env=environment)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"numprune: error: {tmp_path}/runs/.clean: files cannot be locked here ({os.strerror(refused)})"
    )
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_without_fsync_is_written_nevertheless(refusing: Path, tmp_path: Path) -> None:
    program = """
        import sys
        from pathlib import Path
        from numprune.export import temporary

        with temporary.beside(Path(sys.argv[1])) as content:
            (content / "file").write_text("whole")
            temporary.move(content, Path(sys.argv[1]))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), tmp_path / "out"]
    for refused, code in ((errno.EINVAL, 0), (errno.EIO, 1)):  # the second is a disk that fails
        environment = {**os.environ, "LD_PRELOAD": str(refusing), "FAULTS_FSYNC": str(refused)}
        assert subprocess.run(command, env=environment, capture_output=True).returncode == code
        assert (tmp_path / "out").exists() == (code == 0)
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize(
    "words",
    [
        "prune model OUT --ratio 0.25 --text text",
        "prune model OUT --ratio 0.25 --text text --plan-only",
        "quantize model OUT --scheme w8a8 --text text",
        "export model OUT --to onnx",
        "recover model OUT --dense dense --text text",
        "learn model OUT --ratio 0.25 --text text",
        "kubernetes tiny/1 --format deployment --image image --uri http://registry --out OUT",
    ],
)
def test_a_place_where_nothing_can_be_created(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything else. Even root cannot create a folder in /proc."""
    assert main([{"OUT": "/proc/numprune/out"}.get(word, word) for word in words.split()]) == 1
    assert re.search(r"/proc: nothing can be created there; choose a writable folder$", capsys.readouterr().err.strip())


def test_clean_on_an_overlay(tmp_path: Path) -> None:
    """There, a folder of an image's layer cannot be renamed."""
    lower = tmp_path / "image"
    run, unused = record(lower / "w", 1), make(lower / "w", 2)
    for name in ("upper", "work", "merged"):
        (tmp_path / name).mkdir()
    layers = "lowerdir=image,upperdir=upper,workdir=work,redirect_dir=off"
    script = f"""
        mount -t overlay overlay -o {layers} merged || exit 77
        {sys.executable} - merged/w/stages/{unused.name} <<'END' || exit 77
        import errno, os, sys
        try:
            os.rename(sys.argv[1], sys.argv[1] + "-renamed")
        except OSError as error:
            sys.exit(error.errno != errno.EXDEV)
        sys.exit("it can be renamed here")
        END
        exec {sys.executable} -m numprune.flows.cli runs clean --yes --workspace merged/w
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = ["unshare", "--mount", "sh", "-c", textwrap.dedent(script).strip()]
    try:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    if done.returncode in (1, 77) and "numprune" not in done.stderr:
        pytest.skip(f"no overlay without redirects can be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert str(unused.name) in done.stdout
    assert not (tmp_path / "upper" / "w" / "stages" / unused.name).is_dir()  # a whiteout
    assert run.folder.exists()
    assert unused.exists()  # in the image


def test_a_clean_killed_on_an_overlay_leaves_no_valid_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def die(*_: object) -> None:
        raise Killed

    made = make(tmp_path, 1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", refuse)
        patched.setattr(shutil, "rmtree", die)
        with pytest.raises(Killed):
            temporary.remove(made)
    assert (made / "deep" / "data.bin").exists()
    assert not stages.run_stage(tmp_path, work()).reused


# --- two users ------------------------------------------------------------------------------------

GROUP, ANN, BOB = 54_321, 54_322, 54_323


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder with the setgid bit, of a group; pytest's own are closed to other users."""
    if os.getuid() != 0:
        pytest.skip("only root can be two other users")
    folder = Path(tempfile.mkdtemp(prefix="numprune-shared-"))
    os.chown(folder, 0, GROUP)
    folder.chmod(0o2775)
    yield folder
    shutil.rmtree(folder)


def as_user(user: int, umask: int, do: Callable[[], object]) -> None:
    """`do()` in a fork of this process, as another user of the group."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([GROUP])
            os.setresgid(GROUP, GROUP, GROUP)
            os.setresuid(user, user, user)
            os.umask(umask)
            do()
            code = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def leave_a_half_made_folder(workspace: Path) -> None:
    with temporary.beside(workspace / "stages" / "work-0123456789abcdef") as content:
        (content / "file").write_text("half")
        os._exit(0)


def test_two_users_share_a_workspace(shared: Path) -> None:
    """With a umask of 002 each may change everything that the other made."""
    workspace = shared / "w"
    as_user(ANN, 0o002, lambda: record(workspace, 1))
    as_user(ANN, 0o002, lambda: leave_a_half_made_folder(workspace))
    assert len(temporary.abandoned(workspace / "stages")) == 1

    def second() -> None:
        stages.sweep(workspace)
        assert temporary.abandoned(workspace / "stages") == []
        assert stages.run_stage(workspace, work()).reused
        record(workspace, 1)
        assert [item.kind for item in clean.remove(workspace, clean.look(workspace, keep=0))[0]] == [
            "run",
            "run",
            "stage",
        ]

    as_user(BOB, 0o002, second)
    assert runs.list_runs(workspace) == []


def test_another_user_s_read_only_leftovers_do_not_block_a_run(shared: Path) -> None:
    """With the usual umask of 022 in the same folder."""
    workspace = shared / "w"
    (workspace / "stages" / ".locks").mkdir(parents=True)
    for folder in (workspace, workspace / "stages", workspace / "stages" / ".locks"):
        folder.chmod(0o2775)
    made = stages.run_stage  # imported before the user changes
    as_user(ANN, 0o022, lambda: made(workspace, work()))
    as_user(ANN, 0o022, lambda: leave_a_half_made_folder(workspace))

    def second() -> None:
        stages.sweep(workspace)
        assert made(workspace, work()).reused
        assert not made(workspace, work(2)).reused

    as_user(BOB, 0o022, second)
    assert len(temporary.abandoned(workspace / "stages")) == 1  # its owner's next run removes it


def test_lock_files_honour_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with locks.held(tmp_path / "lock"):
            assert stat.S_IMODE((tmp_path / "lock").stat().st_mode) == 0o664
            with pytest.raises(locks.Held), locks.held(tmp_path / "lock", timeout_s=0):
                pytest.fail("two held it")
            assert not locks.is_free(tmp_path / "lock")
        assert locks.is_free(tmp_path / "lock")
    finally:
        os.umask(before)


# --- processes ------------------------------------------------------------------------------------


def test_closed_streams() -> None:
    """As for some daemons. The next opened file must not take their place."""
    shell = f"exec {sys.executable} -m numprune.flows.cli"
    policy = "gate none.json --policy none.toml"

    def run(redirections: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(["sh", "-c", f"{shell} {policy} {redirections}"], capture_output=True, text=True)

    assert "none.toml" in run("").stderr
    closed = run(">&-")
    assert (closed.returncode, closed.stdout) == (1, "")
    assert closed.stderr.startswith("numprune: error: standard output is closed")
    for redirections in ("2>&-", "<&- 2>&-"):
        silent = run(redirections)
        assert (silent.returncode, silent.stdout, silent.stderr) == (1, "", "")


def test_a_deleted_current_folder(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    command = [
        "sh",
        "-c",
        f"rmdir {gone}; exec {sys.executable} -m numprune.flows.cli runs list --workspace {tmp_path}",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=gone, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "numprune: error: the current folder was deleted; change to an existing one\n"


def test_a_user_without_a_home(tmp_path: Path) -> None:
    """As in a container with an arbitrary user id."""
    mapped = ("unshare", "--user", "--map-user=54321", "--map-group=54321")
    try:
        if subprocess.run([*mapped, "true"], capture_output=True).returncode:
            pytest.skip("users cannot be mapped here")
    except FileNotFoundError:
        pytest.skip("there is no unshare")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = cli("registry", "list", "--workspace", tmp_path / "w", before=mapped, cwd=tmp_path, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert [path.name for path in tmp_path.iterdir()] == ["w"]  # no folder `~`


def test_a_temporary_path_too_long_for_sockets(tmp_path: Path) -> None:
    long = tmp_path / ("long" * 30)
    long.mkdir()
    program = "import os; from numprune.flows import children; print(children.call(os.path.basename, 'a/b'))"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "TMPDIR": str(long)}, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("b\n", "")


def test_a_machine_without_any_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container with read-only file systems."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "none")])
    with pytest.raises(DiskError, match=r"^No usable temporary directory found in .*; set TMPDIR to a writable folder"):
        disk.folder_for_sockets()


def test_no_folder_for_sockets_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 30)))
    monkeypatch.setattr(disk, "_SHORT", (str(tmp_path / "none"),))
    with pytest.raises(DiskError, match=r"^TMPDIR .*long: too long for Unix sockets"):
        disk.folder_for_sockets()
