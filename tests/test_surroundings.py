"""What torch is set to when we are called (default type, inference mode, training mode) does not show in a result."""

from contextlib import ExitStack, contextmanager

import pytest
import torch
from diffusers import DiTTransformer2DModel
from tiny import new_pipeline, quick_settings
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import vq4dit
from vq4dit.config import RECIPES
from vq4dit.evaluation.images import sample
from vq4dit.evaluation.layer_errors import layer_noise_errors
from vq4dit.evaluation.metrics import noise_nmse
from vq4dit.surroundings import OF_THE_PROCESS, evaluating, ordinary_torch

every_recipe = pytest.mark.parametrize("recipe", RECIPES)
other_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)


@pytest.fixture
def default_dtype(request):
    """Another default type, for as long as the test wants it."""

    def choose(dtype: torch.dtype) -> None:
        torch.set_default_dtype(dtype)

    yield choose
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="module")
def made() -> dict[str, dict[str, torch.Tensor]]:
    """What each recipe makes where nothing is unusual."""
    return {
        recipe: dict(vq4dit.quantize(new_pipeline(), quick_settings(recipe=recipe)).transformer.state_dict())
        for recipe in RECIPES
    }


def same(found: nn.Module, wanted: dict[str, torch.Tensor]) -> bool:
    tensors = found.state_dict()
    return tensors.keys() == wanted.keys() and all(torch.equal(tensors[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "dtype, called_in_inference_mode, made_in_inference_mode",
    [(torch.bfloat16, False, False), (torch.float64, True, False), (torch.float32, False, True)],
    ids=["bf16 by default", "fp64 by default, called in inference mode", "made in inference mode"],
)
@every_recipe
def test_it_does_not_show_in_what_is_quantized(
    made, recipe, dtype, called_in_inference_mode, made_in_inference_mode, default_dtype
):
    with torch.inference_mode(made_in_inference_mode):
        pipeline = new_pipeline()
    default_dtype(dtype)
    with torch.inference_mode(called_in_inference_mode):
        quantized = vq4dit.quantize(pipeline, quick_settings(recipe=recipe))
    assert torch.get_default_dtype() == dtype
    assert same(quantized.transformer, made[recipe])
    assert not any(p.is_inference() for p in quantized.transformer.parameters())


@other_types
@pytest.mark.parametrize("recipe", ["kmeans", "best"])
def test_packed_numbers_do_not_depend_on_the_default_type_of_a_load(tmp_path, recipe, dtype, default_dtype, one_step_input):
    vq4dit.save(vq4dit.quantize(new_pipeline(), quick_settings(recipe=recipe)), tmp_path / "q")
    exact = DiTTransformer2DModel.from_pretrained(tmp_path / "q" / "transformer")
    default_dtype(dtype)
    model = DiTTransformer2DModel.from_pretrained(tmp_path / "q" / "transformer")
    assert model.dtype == model.transformer_blocks[0].attn1.to_q.weight.dtype == dtype
    for name, layer in vq4dit.pipelines.quantizer.packed_layers(exact).items():
        assert torch.equal(model.get_submodule(name).reconstruct(torch.float32), layer.reconstruct(torch.float32))
    model.save_pretrained(tmp_path / "again")
    default_dtype(torch.float32)
    again = DiTTransformer2DModel.from_pretrained(tmp_path / "again")
    wanted, found = (m(**one_step_input).sample for m in (exact, again))
    torch.testing.assert_close(
        found, wanted, rtol=0.1 if dtype == torch.bfloat16 else 0, atol=0.02 if dtype == torch.bfloat16 else 0
    )


def training(pipeline, rate: float = 0.5):
    """In training mode, with a dropout that would show."""
    for module in pipeline.transformer.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
    pipeline.transformer.train()
    pipeline.transformer.proj_out_1.eval()
    pipeline.vae.train()
    return pipeline


FIGURES = {
    "noise_nmse": lambda *pipelines: noise_nmse(*pipelines, num_trajectories=2, num_inference_steps=2),
    "layer_noise_errors": lambda *pipelines: layer_noise_errors(*pipelines, num_trajectories=2, num_inference_steps=2),
    "sample": lambda *pipelines: [sample(p, [0, 1], [4, 5], num_inference_steps=2).tolist() for p in pipelines],
}


@pytest.mark.parametrize("figure", FIGURES.values(), ids=FIGURES)
def test_equal_calls_give_equal_figures_in_whatever_mode_the_models_are(figure, default_dtype):
    original = new_pipeline()
    quantized = vq4dit.quantize(original, quick_settings(recipe="kmeans"))
    wanted = figure(original, quantized)
    modes = [module.training for p in (training(original), training(quantized)) for module in p.transformer.modules()]
    assert figure(original, quantized) == wanted == figure(original, quantized)
    assert [module.training for p in (original, quantized) for module in p.transformer.modules()] == modes
    assert original.vae.training
    with torch.inference_mode():
        assert figure(original, quantized) == wanted
        default_dtype(torch.float64)
        assert figure(original, quantized) == wanted


def test_a_model_made_in_inference_mode_is_measured_like_another():
    with torch.inference_mode():
        original = new_pipeline()
    quantized = vq4dit.quantize(original, quick_settings(recipe="kmeans"))
    for name in ("noise_nmse", "layer_noise_errors"):
        assert FIGURES[name](original, quantized) == FIGURES[name](new_pipeline(), quantized)


def test_every_module_gets_its_own_mode_back():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with pytest.raises(KeyError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model.modules()] == [True, True, False, False]


def test_ordinary_torch_makes_fp32_and_gradients_and_puts_everything_back(default_dtype):
    default_dtype(torch.bfloat16)
    with torch.inference_mode():
        with pytest.raises(KeyError), ordinary_torch():
            x = torch.ones(2, requires_grad=True)
            x.sum().backward()
            assert x.dtype == torch.float32 and x.grad is not None
            raise KeyError
        assert torch.get_default_dtype() == torch.bfloat16 and torch.is_inference_mode_enabled()


# --- what else a program sets ---


@contextmanager
def matmuls(precision: str):
    torch.set_float32_matmul_precision(precision)
    yield
    torch.set_float32_matmul_precision("highest")


@contextmanager
def default_device(device: str):
    torch.set_default_device(device)
    yield
    torch.set_default_device(None)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def autocast_twice():
    with torch.autocast("cpu", dtype=torch.float16), torch.autocast("cpu", dtype=torch.bfloat16):
        yield


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "autocast twice": autocast_twice,
    "a device": lambda: torch.device("meta"),
    "default device": lambda: default_device("meta"),
    "a product of few bits": lambda: matmuls("medium"),
    "one kind of attention": lambda: sdpa_kernel(SDPBackend.MATH),
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "deterministic": deterministic,
    "anomalies": lambda: torch.autograd.detect_anomaly(check_nan=False),
}
every_surrounding = pytest.mark.parametrize("surrounding", SURROUNDINGS.values(), ids=SURROUNDINGS)


@every_recipe
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_nothing_that_a_program_sets_shows_in_what_is_quantized_or_saved(tmp_path, made, recipe):
    pipeline = new_pipeline()
    with ExitStack() as all_at_once:
        for name in SURROUNDINGS.keys() - {"autocast twice"}:
            all_at_once.enter_context(SURROUNDINGS[name]())
        quantized = vq4dit.quantize(pipeline, quick_settings(recipe=recipe))
        vq4dit.save(quantized, tmp_path / "out")
    assert same(quantized.transformer, made[recipe])
    assert same(DiTTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer"), made[recipe])


@pytest.fixture(scope="module")
def figures():
    """Two pipelines, and all figures of them."""
    original = new_pipeline()
    pipelines = original, vq4dit.quantize(original, quick_settings(recipe="kmeans"))
    return pipelines, {name: figure(*pipelines) for name, figure in FIGURES.items()}


@every_surrounding
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_nothing_that_a_program_sets_shows_in_a_figure(figures, surrounding):
    pipelines, wanted = figures
    with surrounding():
        assert {name: figure(*pipelines) for name, figure in FIGURES.items()} == wanted


@every_surrounding
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_everything_is_put_back(surrounding):
    def settings():
        return (
            [get() for get, _, _ in OF_THE_PROCESS]
            + [torch.is_autocast_enabled("cpu"), torch.get_default_device(), torch.is_grad_enabled()]
            + [torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled()]
        )

    before = settings()
    with surrounding():
        inside = settings()
        with pytest.raises(KeyError), ordinary_torch():
            assert not torch.is_autocast_enabled("cpu") and torch.zeros(1).device.type == "cpu"
            raise KeyError
        assert settings() == inside
    assert settings() == before == [torch.float32, "highest", True, True, True, False, torch.device("cpu"), True, False, False]
