"""A W&B that does not answer stops no training, and loses nothing of it."""

import http.server
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from memtrain.callbacks import logging as loggers
from tests.support.forks import PATIENCE, wait_until

RUN = dict(
    id="UnVuOjE=", name="abc", displayName="n", description=None, config="{}", sweepName=None,
    historyLineCount=0, project=dict(id="UDox", name="p", entity=dict(id="RTox", name="e")),
)  # fmt: skip


class Answer(http.server.BaseHTTPRequestHandler):
    """What W&B says to a run that begins."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("content-length", 0)))
        viewer = dict(id="x", entity="e", username="u", flags="{}", teams=dict(edges=[]))
        files = dict(runID="abc", uploadHeaders=[], files=[])
        data = dict(viewer=viewer, upsertBucket=dict(bucket=RUN, inserted=True), createRunFiles=files)
        said = json.dumps(dict(data=data)).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_GET = do_PUT = do_POST

    def log_message(self, *_):
        pass


def log_a_run(folder: str, answers: bool) -> None:
    """Five rows, to a W&B that is never there, or, where it `answers`, gone after the run has begun."""
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    loggers.INIT_PATIENCE, loggers.FINISH_PATIENCE = 120.0 if answers else 2.0, 4.0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    os.environ.update(WANDB_BASE_URL=f"http://127.0.0.1:{server.server_port}", WANDB_API_KEY="a" * 40)
    if answers:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    else:
        server.server_close()
    logger = loggers.wandb_logger("p", "online", "n", folder)
    if answers:
        server.shutdown()
        server.server_close()
    for step in range(5):
        logger.log_metrics(dict(loss=0.25), step=step)
    logger.experiment.finish()
    print("finished")


@pytest.mark.slow
@pytest.mark.parametrize("answers", [False, True])
def test_a_dead_wandb_stops_nothing_and_loses_nothing(forks, tmp_path, answers):
    """Never there, or gone after the run has begun."""
    forks.call(log_a_run, tmp_path, answers, log=tmp_path / "said", WANDB_SERVICE="")
    said = forks.said()
    assert "finished" in said, said
    assert ("W&B cannot be reached" in said) != answers
    (folder,) = (tmp_path / "wandb").glob("run-*" if answers else "offline-run-*")
    (file,) = folder.glob("*.wandb")
    inspect = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json", file]

    def is_whole() -> bool:  # W&B's own process may outlive ours, and writes the end of the file when it goes
        return subprocess.run(inspect, capture_output=True, text=True, timeout=PATIENCE).stdout.count("0.25") >= 5

    wait_until(is_whole)
