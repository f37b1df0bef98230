"""Store one large file on the Hub, telling how far it is, and stopping in the middle when asked to.

The Hub takes files in one of two ways. Xet, the usual one, cuts them into chunks and stores each chunk once, so a cut upload
goes on in the middle of a file. Plain LFS (where Xet is switched off) sends a whole file at a time. Both know content by its
hash and show nothing to anybody before a commit names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from importlib.util import find_spec
from typing import BinaryIO

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.utils import build_hf_headers

POLL_SECONDS = 0.2

OnBytes = Callable[[int], None]


class WatchedFile(CommitOperationAdd):
    """A file to commit. While it is sent, `on_bytes` hears how much of it, and may raise to stop."""

    on_bytes: OnBytes

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        with super().as_file() as file:
            if with_tqdm:  # it is read to be sent, not for its hash
                read = file.read

                def watched(size: int = -1) -> bytes:
                    data = read(size)
                    self.on_bytes(file.tell())
                    return data

                file.read = watched  # type: ignore[method-assign]
            yield file


def store(api: HfApi, repo_id: str, files: list[WatchedFile], *, as_pull_request: bool) -> None:
    """Store the content of files, but make nothing visible.

    Raises:
        Whatever huggingface_hub, Xet or `on_bytes` raises.
    """
    if not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet"):
        for file in files:
            if file.path_in_repo.endswith(".safetensors"):
                _send_chunks(api, repo_id, file, as_pull_request)
    # huggingface_hub finds what is stored already, and registers it
    api.preupload_lfs_files(repo_id, files, free_memory=False, create_pr=as_pull_request, num_threads=1)


def _send_chunks(api: HfApi, repo_id: str, file: WatchedFile, as_pull_request: bool) -> None:
    """Send a file's chunks to Xet in a session of its own: huggingface_hub's belongs to all uploads of the process."""
    import hf_xet

    route = "None?create_pr=1" if as_pull_request else "main"  # as huggingface_hub asks: a pull request has no name yet
    upload = hf_xet.XetSession().new_upload_commit(
        token_refresh_url=f"{api.endpoint}/api/models/{repo_id}/xet-write-token/{route}",
        token_refresh_headers=build_hf_headers(token=api.token),
    )
    upload.start_upload_file(str(file.path_or_fileobj), sha256=hf_xet.COMPUTE_SHA256)
    with ThreadPoolExecutor(1) as thread:
        finished = thread.submit(upload.wait_to_finish)
        try:
            while not wait([finished], POLL_SECONDS).done:
                file.on_bytes(upload.progress().total_bytes_completed)
        except BaseException:
            upload.abort()
            raise
        finished.result()
