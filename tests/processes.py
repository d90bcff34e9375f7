"""Servers in processes of their own, for tests."""

import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

S3_SERVER = """
import socket, sys
from moto.server import main
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
print(port, flush=True)
main(["-H", "127.0.0.1", "-p", str(port)])
"""


@contextmanager
def process(*arguments, **options):
    """A server process that prints its port."""
    server = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, text=True, **options
    )
    try:
        yield int(server.stdout.readline())
    finally:
        server.terminate()
        server.wait()


@contextmanager
def s3_server():
    """The environment with which clients reach an S3 server that starts empty."""
    with process("-c", S3_SERVER, stderr=subprocess.DEVNULL) as port:
        url = f"http://127.0.0.1:{port}"
        wait_for(url)
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


def wait_for(url):
    for _ in range(200):
        try:
            urllib.request.urlopen(url, timeout=1)
            return
        except OSError:
            time.sleep(0.05)
