"""Python runs this first in every process whose PYTHONPATH has its folder: the worker, made impatient or mortal.

The worker is a process of its own, out of reach of the tests' patches. Its delays are shortened here, and it can be
killed in the midst of its work: ``KILL_WORKER=after:3`` when it has written its journal for the third time,
``KILL_WORKER=made:compile`` when the service has made a compile job and the journal does not know yet.
"""

import inspect
import os
import signal
import sys

if "lightning_quant.deploy.targets.aihub.worker" in sys.orig_argv:
    from qai_hub import api_utils
    from qai_hub.util import session

    from lightning_quant.deploy.targets.aihub.journal import Journal

    timeout = float(os.environ.get("WORKER_TIMEOUT", "4"))
    session.MAX_RETRIES = 2
    session.BACKOFF_FACTOR, session.MAX_WAIT = 0.01, 0.05
    session.REQUEST_TIMEOUT_SECONDS = session.EXTERNAL_RESPONSE_TIMEOUT_SECONDS = timeout
    session.create_session.__defaults__ = (True, timeout, "library")
    for name in ("_try_upload_asset", "_download_to_verified_path"):  # they took the delays at import
        setattr(api_utils, name, session.retry_with_backoff()(inspect.unwrap(getattr(api_utils, name))))

    when, _, what = os.environ.get("KILL_WORKER", "").partition(":")
    write, written = Journal._write, []

    def write_and_die(self):
        written.append(1)
        entries = self._entries.items()
        if when == "made" and any(key.startswith(what) and entry.get("state") == "made" for key, entry in entries):
            os.kill(os.getpid(), signal.SIGKILL)
        write(self)
        if when == "after" and len(written) == int(what):
            os.kill(os.getpid(), signal.SIGKILL)

    Journal._write = write_and_die
