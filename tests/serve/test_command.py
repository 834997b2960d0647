"""mnc serve as a process: it answers, it ends when interrupted, and it says what keeps it from starting."""

import re
import signal
import socket
import subprocess
import sys
import urllib.request

import pytest

from mnc_d2.cli import main


def test_it_serves_until_it_is_interrupted(model_file):
    pytest.importorskip("flask", reason="the extra 'serve' is not installed: pip install flask waitress")
    pytest.importorskip("waitress", reason="the extra 'serve' is not installed: pip install flask waitress")
    command = [sys.executable, "-m", "mnc_d2", "serve", str(model_file), "--port", "0", "--device", "cpu"]
    # Tests that run in the background may ignore SIGINT, and so would what they start.
    options = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL), "text": True}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        line = process.stdout.readline()
        address = re.match(r"http://127\.0\.0\.1:\d+/", line)
        try:
            with urllib.request.urlopen(address[0], timeout=60) as response:
                page = response.read().decode()
        finally:
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    assert f"{model_file.parent.name}/model_final.pth" in page
    assert (process.returncode, errors) == (0, "")


@pytest.mark.parametrize("library", ["flask", "waitress"])
def test_without_the_extra_it_says_what_to_install(monkeypatch, library):
    for name in [x for x in sys.modules if x.startswith("mnc_d2.serve")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)  # an import fails then
    with pytest.raises(SystemExit, match="mnc serve: .* pip install flask waitress"):
        main(["serve", "model.pth"])


def test_a_port_that_is_taken_is_named(model_file):
    pytest.importorskip("flask", reason="the extra 'serve' is not installed: pip install flask waitress")
    pytest.importorskip("waitress", reason="the extra 'serve' is not installed: pip install flask waitress")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with pytest.raises(SystemExit, match=f"Port {port} of 127.0.0.1 cannot be had .*in use.*--port"):
            main(["serve", str(model_file), "--port", port])
