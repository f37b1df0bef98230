"""Push on command, each time in a new process that may be killed; started by `test_hub_kill.py`.

A line "FOLDER REPO" on standard input starts one push; its process id and then its exit code come out. The modules are
imported once and every push is a fork: ten deaths in the time of one start.
"""

import os
import sys
from pathlib import Path

from vq4dit.hub.account import look_up_base, sign_in
from vq4dit.hub.model_card import model_card
from vq4dit.hub.push import Target, push
from vq4dit.pipelines.provenance import read_origin


def main() -> None:
    print("ready", flush=True)
    for line in sys.stdin:
        folder, repo_id = line.split()
        pid = os.fork()
        if pid == 0:
            account = sign_in()
            card = model_card(Path(folder), repo_id, look_up_base(read_origin(Path(folder)), account.token))
            push(Path(folder), Target(repo_id=repo_id, private=False), account, card=card)
            os._exit(0)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
