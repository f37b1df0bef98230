"""The app: `python app.py`. The same file serves one's own machine and a Hugging Face Space with ZeroGPU.

It only reads its arguments and opens the page; everything else is in `vq4dit`.
"""

import os
import signal

if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # while the slow imports run, Ctrl-C finds nothing to keep
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Literal

IS_SPACE = "SPACE_ID" in os.environ
if IS_SPACE:  # before huggingface_hub: requests without a visitor's login carry none, never the owner's
    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
if os.environ.get("SPACES_ZERO_GPU"):
    import spaces  # noqa: F401  (before torch: it takes the GPU's place until one is lent)

HOME = Path(__file__).parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Shrink a Diffusion Transformer in the browser: pick, quantize, compare, keep."
    )
    parser.add_argument(
        "--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="default: 127.0.0.1, this machine only"
    )
    parser.add_argument("--port", type=int, default=int(os.environ.get("GRADIO_SERVER_PORT", 7860)), help="default: 7860")
    parser.add_argument("--share", action="store_true", help="a public demo link for some days")
    parser.add_argument("--root", type=Path, metavar="FOLDER", help="offer the pipeline folders below FOLDER (default: none)")
    return parser.parse_args()


def workspace_folder() -> Path:
    """Where jobs live: VQ4DIT_WORKSPACE, else a Space's persistent disk, else the system's folder for temporary files."""
    if chosen := os.environ.get("VQ4DIT_WORKSPACE"):
        return Path(chosen)
    if IS_SPACE and os.access("/data", os.W_OK):
        return Path("/data/vq4dit")
    return own_temporary_folder("vq4dit-{}")


def own_temporary_folder(name: str) -> Path:
    """A folder for temporary files that no other user of this machine may enter; `name` has a place for who this user is.

    On Windows everybody has a folder for temporary files.

    Raises:
        SystemExit: if somebody else was there first.
    """
    user = os.getuid() if hasattr(os, "getuid") else None
    folder = Path(tempfile.gettempdir()) / name.format("home" if user is None else user)
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or (user is not None and folder.stat().st_uid != user):
        sys.exit(f"error: {folder} belongs to somebody else: name another folder in the variable VQ4DIT_WORKSPACE or TMPDIR")
    folder.chmod(0o700)
    return folder


def whose_login(args: argparse.Namespace) -> Literal["oauth", "own", "none"]:
    """Who publishes: a visitor who signs in, this machine's user, or nobody when strangers may come without signing in."""
    if IS_SPACE:
        return "oauth"
    return "own" if args.host in ("127.0.0.1", "localhost", "::1") and not args.share else "none"


def own_name(args: argparse.Namespace) -> str | None:
    """The address that requests must be to; None where others give the page its name, or it listens on all addresses."""
    return None if IS_SPACE or args.share or args.host in ("", "0.0.0.0", "::", "[::]") else args.host


def main() -> None:
    args = parse()  # before the slow imports, so that --help answers at once
    login = whose_login(args)
    if login != "own":
        os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
    if not IS_SPACE and "GRADIO_TEMP_DIR" not in os.environ:  # Gradio's own choice is open to everybody here
        os.environ["GRADIO_TEMP_DIR"] = str(own_temporary_folder("vq4dit-{}-served"))

    from vq4dit.extras import of_extra
    from vq4dit.interrupts import leave, leave_at_once, raise_once, was_pressed

    with of_extra("app", "the app"):
        from starlette.middleware import Middleware

        from vq4dit.projects.catalog import Catalog
        from vq4dit.projects.workspace import Workspace
        from vq4dit.web.gate import gates
        from vq4dit.web.link_preview import ICON, LinkPreview
        from vq4dit.web.page import MOST_THREADS, Page
        from vq4dit.web.studio import Studio
        from vq4dit.web.theme import HEAD, STYLE, new_theme

    studio = Studio(Catalog(HOME, args.root), Workspace(workspace_folder()))
    picture = HOME / "assets" / "original-and-2bit.png"
    page = Page(studio, picture, login)
    raise_once()
    try:
        page.blocks.launch(
            server_name=args.host,
            server_port=args.port,
            share=args.share,
            theme=new_theme(),
            css_paths=[STYLE],
            head=HEAD,
            ssr_mode=False,
            footer_links=["api", "settings"],
            favicon_path=ICON,
            app_kwargs={"middleware": [*gates(own_name(args)), Middleware(LinkPreview, picture=picture)]},
            run_history=False,  # it would keep what visitors do
            enable_monitoring=False,
            max_threads=MOST_THREADS,
            num_workers=0,  # they would serve uploads at doors of their own
            max_file_size=0,
        )
    except KeyboardInterrupt:  # before the server ran; afterwards Gradio closes it, and returns
        leave()
    finally:
        pressed = was_pressed()
        leave_at_once()
    if pressed:
        leave()


if __name__ == "__main__":
    main()
