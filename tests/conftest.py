"No test reaches for another machine: what tries to fails, also where the failure is swallowed"
import sys

import pytest

reached = []

def _guard(event, args):
    "Python tells it of each connection and look-up, before they are made"
    if event == 'socket.connect': address = args[1]
    elif event == 'socket.getaddrinfo': address = args
    else: return
    host = address[0] if isinstance(address, tuple) else 'localhost' # a Unix socket has a path
    if host in (None, '', 'localhost', '127.0.0.1', '::1'): return
    reached.append(host)
    raise RuntimeError(f'{host} is another machine')

sys.addaudithook(_guard)

@pytest.fixture(autouse=True)
def no_network():
    yield
    assert not reached
