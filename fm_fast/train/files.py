"""Files that are never half written, and folders that one run at a time writes into."""

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows, which also opens no folders
    fcntl = None

TEMPORARY = ".tmp"
LONGEST_BEGINNING = 200  # bytes of a temporary file's name, to which more are added
LONGEST_CHAIN = 40  # of links, as Linux has it
# What file systems say that do not bring folders to the disk one by one, and of folders that cannot be read.
NOT_FOR_FOLDERS = (errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM)


@contextlib.contextmanager
def replaced_whole(path: Path) -> Iterator[Path]:
    """Yields the name of a temporary file beside `path`; what was written to it takes the place of `path` at the end.

    Whatever happens, also loss of power, `path` is the old file or the new one: the content reaches the disk before its name does. Of a
    link the file that it names is replaced. To a device, a pipe or an open file, such as /dev/stdout, it is appended. An OSError that names
    no file, as that of a full disk, is raised with the name.
    """
    if is_stream(path):
        with _appended(path) as temporary:
            yield temporary
        return
    path = resolved(path)
    beginning = path.name if len(os.fsencode(path.name)) <= LONGEST_BEGINNING else "result"
    descriptor, name = tempfile.mkstemp(prefix=f"{beginning}.", suffix=TEMPORARY, dir=path.parent)
    os.close(descriptor)
    temporary = Path(name)
    with takes_place(temporary, path):
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # now: the writer may have put a file of its own there, as safetensors does


def resolved(path: Path) -> Path:
    """The file that a link names. OSError for links in a circle, of which Python's versions say different things."""
    try:
        target = path.resolve()
    except RuntimeError:
        target = path
    if target.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return target


@contextlib.contextmanager
def takes_place(temporary: Path, path: Path) -> Iterator[None]:
    """`temporary` is `path` at the end, or is deleted where the block or the disk fails."""
    try:
        yield
        _to_disk(temporary)
        os.replace(temporary, path)
        _to_disk(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        raise_with_name(error, path)
        raise


def raise_with_name(error: BaseException, path: Path) -> None:
    """The same error anew, with the name, if it is an OSError that has none."""
    if isinstance(error, OSError) and error.errno is not None and error.filename is None:
        raise OSError(error.errno, error.strerror, str(path)) from error


def is_stream(path: Path) -> bool:
    """Whether this, or what it is a link to, is no file of a folder: /dev/stdout stays a stream where it has been sent to a file."""
    for _ in range(LONGEST_CHAIN):
        place = path.parent.resolve()
        if (
            place == Path("/dev")
            or place.is_relative_to("/dev/fd")
            or place.is_relative_to("/proc")
            or (path.exists() and not path.is_file() and not path.is_dir())
        ):
            return True
        if not path.is_symlink():
            return False
        path = place / os.readlink(path)
    return False


@contextlib.contextmanager
def _appended(path: Path) -> Iterator[Path]:
    """Yields the name of a temporary file; what was written to it follows, at the end, what has been written to `path`."""
    with tempfile.TemporaryDirectory() as folder:
        temporary = Path(folder, "content")
        yield temporary
        if sys.stdout is not None:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
        try:
            with temporary.open("rb") as content, path.open("ab") as stream:
                shutil.copyfileobj(content, stream)
                stream.flush()
                _go_to_the_end(stream.fileno())
        except OSError as error:
            raise_with_name(error, path)
            raise


def _go_to_the_end(descriptor: int) -> None:
    """Where that file is this process's output: what it prints next follows what was appended."""
    for output in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(output), os.fstat(descriptor)):
                os.lseek(output, 0, os.SEEK_END)


def is_full(error: OSError) -> bool:
    """Whether a disk had no room; None is what torch and safetensors do not tell."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, None)


def read_records(file: Path) -> list[dict[str, Any]]:
    """The records of a log, one JSON object with a number "step" a line; other lines, as one that was cut off, are left out."""
    records = []
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def as_folder(name: str, text: str) -> Path:
    """The folder that the setting of that name asks for, there or not. Raises ValueError where there can be none."""
    if not text:
        raise ValueError(f"{name}: expected a folder, got {text!r}")
    folder = Path(text)
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{name}: expected a folder, {place} is a file")
    return folder


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _to_disk(path: Path) -> None:
    if path.is_dir() and fcntl is None:
        return
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in NOT_FOR_FOLDERS):
            raise


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold the folder, which is made if need be, against other runs. The system lets go of it however the process ends.

    Raises FileExistsError if another run holds it. Windows, and file systems that have no locks, do without.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _lock(descriptor, folder)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held_in_turn(file: Path) -> Iterator[bool]:
    """Hold the file, which is made or emptied if need be, as soon as no other process does; yields whether it is still where it was."""
    if fcntl is None:
        file.touch()
        yield True
        return
    with file.open("ab") as opened:
        is_held_now = _waited_for(opened.fileno())
        is_there = _is_at(opened.fileno(), file)
        if is_held_now and is_there:
            opened.truncate(0)
        yield is_there


def _waited_for(descriptor: int) -> bool:
    """Whether the file is held; not where the file system has no locks."""
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        return False
    return True


def _is_at(descriptor: int, file: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), file.stat())
    return False


def is_held(file: Path) -> bool:
    """Whether a process holds it; False where that is not known."""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        try:
            if fcntl is not None:
                fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)  # NFS gives readers no other one
        except BlockingIOError:
            return True
    return False


def _lock(descriptor: int, folder: Path) -> None:
    assert fcntl is not None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise FileExistsError(f"{folder}: another run is writing into this folder; wait for it, or choose another --out") from error
    except OSError:
        return
