"""One server with everything on: keys, Records, traces. What goes out of it, and what must not."""

import http.server
import json
import stat
import threading
from pathlib import Path

import httpx
import pytest
from serving import starting

KEY = "sk-nobody-may-see-this-7f3a"
SAID = "colourless green ideas"


@pytest.fixture(scope="module")
def sink():
    """A collector of OpenTelemetry traces: (address, bodies that came)."""
    bodies = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", bodies
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="module")
def left(tmp_path_factory, sink):
    """All that a server wrote, said and sent during one good and one refused request, and the mode of its folder."""
    folder = tmp_path_factory.mktemp("secrets")
    records, sockets = folder / "records.jsonl", folder / "sockets"
    sockets.mkdir()
    options = ("--model", "smollm2", "--deploy", "1P1D", "--kv-memory", "0.05", "--max-len", "256")
    secret = {"DISAGG_API_KEY": KEY, "OTEL_EXPORTER_OTLP_ENDPOINT": sink[0], "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with starting(
        folder, *options, "--api-key", "env:DISAGG_API_KEY", "--records", str(records), **secret, TMPDIR=str(sockets)
    ) as ready:
        server = ready()
        modes = [stat.S_IMODE(each.stat().st_mode) for each in sockets.glob("disagg-*") if any(each.glob("*"))]
        body = {"model": "smollm2", "messages": [{"role": "user", "content": SAID}], "max_tokens": 4}
        ask = f"{server.url}/v1/chat/completions"
        good = httpx.post(ask, json=body, headers={"Authorization": f"Bearer {KEY}"}, timeout=60)
        wrong = httpx.post(ask, json=body, headers={"Authorization": f"Bearer {KEY}x"}, timeout=60)
        metrics = server.get("/metrics", Authorization=f"Bearer {KEY}").text
        code = server.stop()
    text = server.log.read_text() + records.read_text() + metrics + wrong.text
    return {"good": good, "wrong": wrong, "modes": modes, "code": code, "text": text, "records": records}


def test_a_request_leaves_a_trace_with_a_span_per_phase(left, sink):
    """The collector named by the standard variable gets spans of both phases before the server has ended."""
    assert left["good"].status_code == 200, left["good"].text
    assert left["code"] == 0
    paths, sent = {path for path, _ in sink[1]}, b"".join(body for _, body in sink[1])
    assert paths == {"/v1/traces"}
    for name in (b"request smollm2", b"prefill", b"handoff_copy", b"decode"):
        assert name in sent, name


def test_no_key_and_no_text_is_in_anything_that_is_kept(left, sink):
    """Not in the log, the Records, the metrics, the traces, nor in the answer to a wrong key."""
    assert left["wrong"].status_code == 401
    assert len(left["records"].read_text().splitlines()) == 1
    sent = b"".join(body for _, body in sink[1])
    for secret in (KEY, KEY[:-4], SAID):
        assert secret not in left["text"]
        assert secret.encode() not in sent
    assert json.loads(left["records"].read_text())["finish_reason"] in ("length", "stop")


def test_control_messages_are_out_of_reach_of_other_users(left):
    """The folder of the processes' sockets is this user's alone."""
    assert left["modes"] == [0o700]


def test_what_was_made_is_gone(left):
    """No socket and no folder stays behind."""
    assert not list(Path(left["records"]).parent.joinpath("sockets").glob("disagg-*"))
