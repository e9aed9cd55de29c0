"""The other side of `sandbox`: a process that gives up its rights, and then runs a program.

Run by its path, on Linux, from a process with one thread. It leaves for new namespaces, whose first
process makes a root folder with little more than the system's libraries and Python's; a child of
that one is nobody, has limits, and runs the program. Descriptor `report` hears '+' when the program
begins, and then how it ended, or '!' and what failed before.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
import types

NAMESPACES = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x20000000 | 0x40000000
USER = 0x10000000  # of these, only what takes no rights to begin with
RDONLY, NOSUID, NODEV, BIND, REC, PRIVATE = 1, 2, 4, 1 << 12, 1 << 14, 1 << 18
RECURSIVE, DETACH, MOUNT_SETATTR = 0x8000, 2, 442
DEATH_SIGNAL, DUMPABLE, NO_NEW_PRIVILEGES = 1, 4, 38
NOBODY, OUTSIDERS = 65534, 0x70000000  # user ids; from the latter on nothing hands them out
ROOT = '/proc'  # is everywhere, and the program gets none
SYSTEM = (
    *('/usr', '/bin', '/sbin', '/lib', '/lib32', '/lib64', '/etc/ld.so.cache'),
    *('/nix/store', '/gnu/store', sys.base_prefix),
)
DEVICES = ('/dev/null', '/dev/zero', '/dev/full', '/dev/random', '/dev/urandom')
LIBC = ctypes.CDLL(None, use_errno=True)


def call(name: str, *given: int | str | bytes | None) -> None:
    """A function of the C library; raises OSError as those of os do."""
    plain = [x.encode() if isinstance(x, str) else x for x in given]
    values = [ctypes.c_ulong(x) if isinstance(x, int) else x for x in plain]
    if getattr(LIBC, name)(*values) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f'{name}: {os.strerror(number)}')


def leave() -> None:
    """Into new namespaces; without the right to make them, into those of a user of its own."""
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        with contextlib.suppress(OSError):
            return call('unshare', NAMESPACES)
        become(NOBODY)  # limits do not hold for root
        call('prctl', DUMPABLE, 1, 0, 0, 0)  # so that /proc/self is its own again
        uid = gid = NOBODY
    call('unshare', NAMESPACES | USER)
    for name, text in (('setgroups', 'deny'), ('uid_map', uid), ('gid_map', gid)):
        line = text if name == 'setgroups' else f'{NOBODY} {text} 1'
        with open(f'/proc/self/{name}', 'w') as file:
            file.write(str(line))
    return None


def become(user: int) -> None:
    """Another user, of no groups, which root can."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def make_root(disk: int) -> None:
    """A root folder that nothing can be written to but /tmp, with so many bytes."""
    os.umask(0o022)
    call('mount', None, '/', None, REC | PRIVATE, None)
    call('mount', 'none', ROOT, 'tmpfs', NOSUID, 'size=1m,mode=755')
    os.mkdir(f'{ROOT}/tmp')
    call('mount', 'none', f'{ROOT}/tmp', 'tmpfs', NOSUID | NODEV, f'size={disk},mode=1777')
    for path in (*SYSTEM, *DEVICES):
        show(path)
    read_only(ROOT, 0)
    os.chdir(ROOT)
    call('pivot_root', '.', '.')
    call('umount2', '.', DETACH)
    os.chdir('/tmp')


def show(path: str) -> None:
    """What is at a path, if anything is, in the new root."""
    into = ROOT + path
    if os.path.lexists(into) or not os.path.exists(path):
        return None
    os.makedirs(os.path.dirname(into), exist_ok=True)
    if os.path.islink(path):
        return os.symlink(os.readlink(path), into)
    if os.path.isdir(path):
        os.makedirs(into)
    else:
        open(into, 'x').close()
    call('mount', path, into, None, BIND | REC, None)
    if path not in DEVICES:
        read_only(into, RECURSIVE)
    return None


def read_only(path: str, how: int) -> None:
    attributes = b''.join(x.to_bytes(8, sys.byteorder) for x in (RDONLY | NOSUID, 0, 0, 0))
    call('syscall', MOUNT_SETATTR, -100, path, how, attributes, len(attributes))


def drop(outsider: int) -> None:
    """All rights, for good."""
    if os.getuid() == 0:
        try:
            become(outsider)
        except OSError:  # not a user here
            become(NOBODY)
    call('prctl', NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    version = (0x20080522).to_bytes(4, sys.byteorder) + bytes(4)
    call('capset', version, bytes(24))


def limit(memory: int, disk: int, seconds: int) -> None:
    for name, most in (('AS', memory), ('DATA', memory), ('FSIZE', disk), ('CPU', seconds),
                       ('NOFILE', 64), ('NPROC', 256), ('CORE', 0)):  # fmt: skip
        resource.setrlimit(getattr(resource, f'RLIMIT_{name}'), (most, most))


def run(report: int, code: int, size: int) -> None:
    """The program, which is what `code` has up to `size`; the word for its end comes behind it."""
    me, source = os.getpid(), os.pread(code, size, 0)
    module = sys.modules['__main__'] = types.ModuleType('__main__')
    sys.argv = ['program']
    os.write(report, b'+')
    try:
        exec(compile(source, 'program', 'exec'), module.__dict__)
        said = os.pread(code, 64, size)
    except BaseException as error:
        said = f'{type(error).__name__}: {error}'[:300].encode(errors='replace')
    if os.getpid() == me:  # and no child that it left
        os.write(report, said)
    os._exit(0)


def main(report: int, code: int, size: int, apart: int, *limits: int) -> None:
    """Never returns."""
    outsider = OUTSIDERS + os.getpid()
    try:
        if apart:
            call('prctl', DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
            leave()
            if first := os.fork():
                os.waitpid(first, 0)
                os._exit(0)
            call('prctl', DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
            make_root(limits[1])
            if child := os.fork():
                os.waitpid(child, 0)
                os._exit(0)  # and the kernel ends all that are left
            drop(outsider)
        limit(*limits)
    except OSError as error:
        os.write(report, f'!{error}'.encode())
        os._exit(1)
    run(report, code, size)


if __name__ == '__main__':
    main(*map(int, sys.argv[1:]))
