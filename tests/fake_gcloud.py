"""A `gcloud` on PATH, a cloud in a folder: records its arguments and plays a queued resource.

The folder holds `calls.jsonl` (what was asked), `resource.json` (see cloud_tiny.Cloud),
`workers/N` (homes of the workers while there is a TPU) and `buckets/NAME` (gs://NAME). A command
for the workers takes the way it takes in gcloud and ssh: split at blanks, joined, given to a shell.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

CLOUD = Path(os.environ['FAKE_CLOUD'])
DENIED = 'PERMISSION_DENIED: Permission denied on resource'


def fail(message):
    sys.exit(f'ERROR: (gcloud) {message}')


def flags(words):
    """({flag: value, or True}, what is no flag)."""
    pairs = [w[2:].partition('=') for w in words if w.startswith('--')]
    given = {name: value if equals else True for name, equals, value in pairs}
    return given, [w for w in words if not w.startswith('--')]


def homes(given='all'):
    numbers = range(resource['workers']) if given == 'all' else [int(given)]
    return [CLOUD / 'workers' / str(i) for i in numbers]


def lose_machines():
    """Without a warning, as it may happen."""
    for pid in CLOUD.glob('workers/*/.jaxrm/pid'):
        try:
            os.killpg(int(pid.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue
    shutil.rmtree(CLOUD / 'workers', ignore_errors=True)


def make_machines():
    for home in homes():
        home.mkdir(parents=True, exist_ok=True)


def look():
    """One look at the resource, which goes on to its next state."""
    seen = CLOUD / 'buckets' / resource['preempt_at'] if resource['preempt_at'] else None
    if resource['state'] == 'ACTIVE' and seen and seen.exists():
        resource['preempt_at'] = None
        resource['state'], *resource['next'] = resource['becomes']
        lose_machines()
    elif resource['next']:
        resource['state'] = resource['next'].pop(0)
    if resource['state'] == 'ACTIVE':
        make_machines()
    else:
        lose_machines()
    return resource['state']


def queued(verb, words):
    given, names = flags(words)
    if verb == 'list':
        state = look()
        assert given['filter'] == f'name~/{resource["name"]}$'
        print(state or '', end='\n' if state else '')
    elif verb == 'describe':
        print('no quota')
    elif verb == 'create':
        if resource['exists'] or resource['state']:
            fail(f'ALREADY_EXISTS: Resource {names[0]} already exists')
        resource['state'], *resource['next'] = resource['plans'].pop(0)
    elif verb == 'delete':
        if not resource['state']:
            fail(f'NOT_FOUND: Resource {names[0]} was not found')
        lose_machines()
        resource['state'], resource['next'] = None, []


def ssh(words):
    given, _ = flags(words)
    if resource['state'] != 'ACTIVE':
        fail('the TPU is not ready')
    command = ' '.join(given['command'].split(' '))
    base = json.loads((CLOUD / 'environ.json').read_text())
    running = [
        subprocess.Popen(
            ['/bin/bash', '-c', command],
            cwd=home,
            env=base | {'HOME': str(home), 'JAX_PROCESS_ID': home.name},
            stdin=subprocess.DEVNULL,
        )
        for home in homes(given['worker'])
    ]
    statuses = [process.wait() for process in running]
    sys.exit(next(filter(None, statuses), 0))


def scp(words):
    given, (*sources, target) = flags(words)
    for home in homes(given['worker']):
        place = lambda path: home / path.partition(':')[2] if ':' in path else Path(path)  # noqa: E731
        for source in map(place, sources):
            if source.is_dir():
                shutil.copytree(source, place(target) / source.name, dirs_exist_ok=True)
            else:
                shutil.copy(source, place(target))


def storage(verb, words):
    given, (source, target) = flags(words)
    here = lambda url: Path(re.sub('^gs:/', str(CLOUD / 'buckets'), url))  # noqa: E731
    into = here(target)
    if verb == 'cp':
        into.parent.mkdir(parents=True, exist_ok=True)
        into.write_bytes(sys.stdin.buffer.read() if source == '-' else Path(source).read_bytes())
        return
    if not here(source).is_dir():
        fail(f'{source} is not a folder')
    for path in filter(Path.is_file, here(source).rglob('*')):
        name = path.relative_to(here(source))
        if not re.match(given.get('exclude', '$'), str(name)):
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, into / name)


def main(words):
    with (CLOUD / 'calls.jsonl').open('a') as file:
        file.write(json.dumps(words) + '\n')
    if any(' '.join(words).startswith(start) for start in resource['deny']):
        fail(DENIED)
    match words:
        case ['compute', 'tpus', 'queued-resources', verb, *rest]:
            queued(verb, rest)
            part = CLOUD / 'resource.json.part'
            part.write_text(json.dumps(resource))
            part.replace(CLOUD / 'resource.json')
        case ['compute', 'tpus', 'tpu-vm', 'ssh', *rest]:
            ssh(rest)
        case ['compute', 'tpus', 'tpu-vm', 'scp', *rest]:
            scp(rest)
        case ['storage', verb, *rest]:
            storage(verb, rest)
        case _:
            fail(f'no such command: {words}')


if __name__ == '__main__':
    resource = json.loads((CLOUD / 'resource.json').read_text())
    main(sys.argv[1:])
