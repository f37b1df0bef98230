"""The app: `python app.py`. The same file serves one's own machine and a Hugging Face Space with ZeroGPU.

It only reads its arguments and opens the page; everything else is in `vq4dit`.
"""

import argparse
import os
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
    return Path(tempfile.gettempdir()) / f"vq4dit-{user_name()}"


def user_name() -> str:
    """A name for each user of this machine; without numbers (on Windows) everybody has a folder for temporary files."""
    return str(os.getuid()) if hasattr(os, "getuid") else "home"


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

    from vq4dit.extras import of_extra

    with of_extra("app", "the app"):
        from vq4dit.catalog import Catalog
        from vq4dit.web.gate import gates
        from vq4dit.web.page import Page
        from vq4dit.web.studio import Studio
        from vq4dit.web.theme import HEAD, STYLE, new_theme
        from vq4dit.workspace import Workspace

    studio = Studio(Catalog(HOME, args.root), Workspace(workspace_folder()))
    page = Page(studio, HOME / "assets" / "original-and-2bit.png", login)
    page.blocks.launch(
        server_name=args.host,
        server_port=args.port,
        share=args.share,
        theme=new_theme(),
        css_paths=[STYLE],
        head=HEAD,
        ssr_mode=False,
        footer_links=["api", "settings"],
        app_kwargs={"middleware": gates(own_name(args))},
        run_history=False,  # it would keep what visitors do
        enable_monitoring=False,
        num_workers=0,  # they would serve uploads at doors of their own
        max_file_size=0,
    )


if __name__ == "__main__":
    main()
