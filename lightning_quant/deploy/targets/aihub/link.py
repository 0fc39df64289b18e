"""One context binary of the graphs for several input sizes: it holds the weights once."""

from __future__ import annotations

import re
from typing import Any

from lightning_quant.deploy.targets.aihub.submissions import JobFailed, Submissions
from lightning_quant.utilities.hashing import short_hash


def graph_name(size: str) -> str:
    """Return what a graph is called within the binary, such as ``size_256x512``."""
    return re.sub(r"\W", "_", f"size_{size}")


class Link:
    """The link job of one device.

    Args:
        submissions: of the bundle.
        device: as the client lists it.
        name: of the device.
        compile_keys: the journal's keys of the graphs' compile jobs.
    """

    def __init__(self, submissions: Submissions, device: Any, name: str, compile_keys: list[str]) -> None:
        self.submissions = submissions
        self.device = device
        self.name = name
        self.compile_keys = compile_keys
        self.key = f"link-{short_hash(' '.join(compile_keys))}"
        self.url = ""
        self._failure: str | None = None

    def submit(self) -> None:
        """Wait for the compiled graphs and submit the job, unless it was.

        Raises:
            JobFailed: when a graph of them cannot be compiled, for each graph with the same reason.
        """
        if any("id" not in self.submissions.journal.entry(key) for key in self.compile_keys):
            self._failure = "the sizes cannot be linked: the compile job of one was not submitted"
        if self._failure is not None:
            raise JobFailed(self._failure)
        try:
            models = [
                self.submissions.wait_for(key, f"a compile job for {self.name}").get_target_model().model_id
                for key in self.compile_keys
            ]
        except JobFailed as error:
            self._failure = f"the sizes cannot be linked: {error}"
            raise JobFailed(self._failure) from None
        client = self.submissions.service.client

        def request(name: str) -> Any:
            return client.submit_link_job([client.get_model(one) for one in models], self.device, name=name)

        self.url = self.submissions.submit(self.key, f"submitting the link job for {self.name}", request)

    def wait(self) -> str:
        """Wait for the job and return the id of the linked model.

        Raises:
            JobFailed: with the service's reason.
        """
        if self._failure is not None:
            raise JobFailed(self._failure)
        try:
            job = self.submissions.wait_for(self.key, f"the link job for {self.name}")
        except JobFailed as error:
            self._failure = str(error)
            raise
        target: str = job.get_target_model().model_id
        return target
