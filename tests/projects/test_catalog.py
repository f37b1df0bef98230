"""What can be picked, what a card says of it, and every refusal in its own words."""

import json
import socket
import time
from pathlib import Path

import pytest
from safetensors.torch import save

import vq4dit
from vq4dit.bundled import BUNDLED, BUNDLED_FLUX, BUNDLED_VIDEO, CALLS
from vq4dit.errors import UnsupportedModelError, VQ4DiTError
from vq4dit.pipelines.trust import pipeline_class
from vq4dit.projects.call_lines import check_fitting
from vq4dit.projects.catalog import Catalog, _found_on_the_hub

HOME = Path(__file__).parents[2]


@pytest.fixture
def catalog(model_folder):
    return Catalog(HOME, Path(model_folder).parent)


def files_of(folder: str | Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


@pytest.fixture
def offered(hub, model_folder):
    """A Hub with a good model, and one of every kind that is refused."""
    tiny = files_of(model_folder)
    hub.add_repo("ann/tiny-dit", tiny, card={"license": "mit"})
    hub.add_repo("ann/gated-dit", tiny, gated=True)
    index = json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]})
    hub.add_repo("ann/unet", {"model_index.json": index.encode()})
    hub.add_repo("ann/style-lora", {"pytorch_lora_weights.safetensors": save({})})
    hub.add_repo("ann/model-gguf", {"model-Q4.gguf": b"GGUF"})
    hub.add_repo("ann/text-model", {"config.json": b"{}"})
    pickled = {name.replace(".safetensors", ".bin"): content for name, content in tiny.items()}
    hub.add_repo("ann/pickled", pickled)
    config = json.loads(tiny["transformer/config.json"]) | {"quantization_config": {"quant_method": "bitsandbytes"}}
    hub.add_repo("ann/quantized", tiny | {"transformer/config.json": json.dumps(config).encode()})
    yield hub
    _found_on_the_hub.cache_clear()  # other tests of this process have no Hub


@pytest.mark.parametrize("name", [BUNDLED, BUNDLED_FLUX, BUNDLED_VIDEO])
def test_the_picker_and_the_card_of_a_bundled_model_say_the_same(catalog, name):
    parameters = catalog.card(name).inspection.parameters
    assert f" {parameters / 1e6:.1f} M parameters" in dict((name, shown) for shown, name in catalog.offered())[name]


@pytest.mark.parametrize("name", CALLS)
def test_what_is_suggested_for_a_bundled_model_fits_its_pipeline(catalog, name):
    check_fitting(pipeline_class(catalog.card(name).pipeline), CALLS[name])


def test_the_bundled_models_card_needs_no_network(catalog):
    card = catalog.card(BUNDLED)
    assert (card.pipeline, card.inspection.num_blocks, card.licence, card.gated) == ("DiTPipeline", 8, "apache-2.0", False)
    assert (card.inspection.positions.tokens, card.download_bytes) == (64, 0)
    assert [p.bits for p in card.inspection.predictions] == [2, 3, 4]
    assert card.labels["rocket"] == 112


def test_a_model_of_the_hub_is_looked_at_without_its_weights(catalog, offered):
    card = catalog.card("ann/tiny-dit")
    assert (card.licence, card.gated, len(card.commit)) == ("mit", False, 40)
    assert card.download_bytes > card.inspection.file_bytes


def test_search_offers_what_fits_and_what_the_hub_finds(catalog, offered):
    names = [name for _, name in catalog.search("tiny")[0]]
    assert "folder:tiny" in names and "ann/tiny-dit" in names
    assert BUNDLED in [name for _, name in catalog.search("")[0]]
    assert [name for _, name in catalog.search("DiT-XL")[0]][:2] == ["facebook/DiT-XL-2-256", "facebook/DiT-XL-2-512"]


def test_search_goes_on_without_a_network(catalog, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found, is_heard = catalog.search("tin")  # not "tiny": answers are remembered
    assert "folder:tiny" in [name for _, name in found] and not is_heard
    assert catalog.search("t")[1], "too short to ask anybody"


def test_a_hub_that_says_nothing_is_not_waited_for(catalog, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # takes the call, and never answers
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        started = time.monotonic()
        found, is_heard = catalog.search("iny")
    assert time.monotonic() - started < 3 and not is_heard and "folder:tiny" in [name for _, name in found]


def test_the_address_of_a_models_page_is_its_name(catalog, offered):
    page = "https://huggingface.co/ann/tiny-dit"
    assert catalog.locate(page) == "ann/tiny-dit" == catalog.locate(f" {page}/tree/main?library=diffusers ")
    assert "ann/tiny-dit" in [name for _, name in catalog.search(page)[0]]
    assert catalog.card(page).licence == "mit"


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("ann/unet", UnsupportedModelError, "ann/unet is a StableDiffusionPipeline with a UNet"),
        ("ann/style-lora", UnsupportedModelError, "is a LoRA, a small addition to another model: pick the model it belongs to"),
        ("ann/model-gguf", UnsupportedModelError, r"is quantized already \(GGUF\): pick the original model"),
        (
            "ann/text-model",
            UnsupportedModelError,
            r"is no diffusers pipeline \(it has no model_index.json\): look for a version",
        ),
        (
            "ann/pickled",
            UnsupportedModelError,
            "nothing else is loaded here because other formats can run code: ask its author",
        ),
        ("ann/quantized", UnsupportedModelError, r"is quantized already \(bitsandbytes\): start from the original model"),
        ("ann/missing", VQ4DiTError, "there is no repository ann/missing, or it is private"),
        ("../../etc", VQ4DiTError, "is no model that can be opened here, .*: pick one from the list"),
        ("/etc", VQ4DiTError, "is no model that can be opened here"),
        ("assets/other", VQ4DiTError, "there is no repository assets/other"),
        ("folder:../..", VQ4DiTError, "there is no pipeline folder '../..' below the root: pick one from the list"),
        ("folder:/etc", VQ4DiTError, "there is no pipeline folder"),
        ("folder:nowhere", VQ4DiTError, "there is no pipeline folder 'nowhere' below the root"),
    ],
)
def test_refusals(catalog, offered, name, error, words):
    with pytest.raises(error, match=words):
        catalog.card(name)


def test_a_gated_model_without_access_says_where_to_ask(catalog, offered):
    with pytest.raises(VQ4DiTError, match="ann/gated-dit is gated, and this login has no access. Request access at http"):
        catalog.card("ann/gated-dit")


def test_a_download_that_is_too_large_is_refused_before_it_begins(offered, model_folder):
    with pytest.raises(VQ4DiTError, match=r"is a download of 0 GB, and this server takes up to 0 GB: use the command line"):
        Catalog(HOME, largest_download=1000).card("ann/tiny-dit")


def test_a_packed_result_is_quantized_already(quantized_folder):
    with pytest.raises(UnsupportedModelError, match=r"is quantized already \(vq4dit\): start from the original model"):
        Catalog(HOME, quantized_folder.parent).card(f"folder:{quantized_folder.name}")


def test_folders_are_closed_without_a_root_and_links_do_not_lead_out(model_folder, tmp_path):
    with pytest.raises(VQ4DiTError, match="folders of this machine are not open: start the app with --root FOLDER"):
        Catalog(HOME).card("folder:tiny")
    (tmp_path / "way-out").symlink_to(model_folder)
    with pytest.raises(VQ4DiTError, match="there is no pipeline folder"):
        Catalog(HOME, tmp_path).card("folder:way-out")


def test_a_hub_that_cannot_be_reached_is_said_so(catalog):
    with pytest.raises(vq4dit.VQ4DiTError, match="look at ann/tiny-dit"):
        catalog.card("ann/tiny-dit")
