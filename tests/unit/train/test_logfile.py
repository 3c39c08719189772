"""A rank's log lies in the run's folder while it grows."""

import calendar
import time

from tests.servers.daemons import GUARD_S, poll
from tests.unit.new_runs import make_run


def test_a_log_can_be_followed_while_it_grows(tmp_path, monkeypatch):
    """Where nodes share no file system, the run's folder is the only place to look."""
    import logging

    from rsb_cluster.node.ranks import Ranks
    from rsb_cluster.train import logfile

    monkeypatch.setattr(logfile, "COPY_S", 0.05)
    monkeypatch.setenv("TZ", "Asia/Tokyo")  # the log says UTC all the same
    time.tzset()
    run, name = make_run(tmp_path), "logs/0001-rank00000.log"

    def until(text: bytes) -> bool | None:
        return poll(lambda: (run.store.exists(name) and text in run.store.read_bytes(name)) or None, GUARD_S)

    ranks = Ranks(rank=0, local_rank=0, world_size=1, job_id="7", restart=0, allocated=1)
    with logfile.logging_to(run.store, ranks) as log_file:
        log_file.keep_copying()
        logging.getLogger("rsb_cluster").info("step 1, AWS_SECRET_ACCESS_KEY=geheim")
        time.sleep(0.2)
        assert not run.store.exists(name), "the attempt has no number yet"
        log_file.name = name
        assert until(b"step 1")
        logging.getLogger("rsb_cluster").info("step 2")
        assert until(b"step 2")
        logging.getLogger("rsb_cluster").info("step 3")
    monkeypatch.undo()
    time.tzset()
    content = run.store.read_bytes(name)
    written = time.strptime(content.decode()[:20], "%Y-%m-%d %H:%M:%SZ")
    assert abs(calendar.timegm(written) - time.time()) < 3600
    assert content.count(b"step 3") == content.count(b"step 1") == 1 and b"geheim" not in content
