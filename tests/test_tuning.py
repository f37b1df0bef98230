"""Tuning: everything learns but the integers, and what has been learned is what the file holds."""

import copy

import pytest
import torch
from conftest import new_pipeline, quick_settings
from safetensors.torch import load_file

from vq4dit import CalibrationConfig, CalibrationDivergedError, quantize, save
from vq4dit.coded_layers import EntropyCodedLinear, coded_layers
from vq4dit.dit import find_targets
from vq4dit.job import Job
from vq4dit.quantization import run
from vq4dit.tuning import Tuning, record_samples, walks
from vq4dit.zero_data import NULL_CLASS, image_tokens

FIXED = ("coded_integers", "side_models")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rounded(linear: torch.nn.Linear) -> EntropyCodedLinear:
    """To about 2 bits a weight, each by itself."""
    step = linear.weight.detach().square().mean().sqrt()
    integers = (linear.weight.detach() / step).round().short()
    return EntropyCodedLinear.from_integers(
        integers, step.expand(linear.out_features), torch.ones(linear.in_features), linear.bias
    )


@pytest.fixture(scope="module")
def coarse():
    """A pipeline and its transformer with rounded weights, to be tuned."""
    pipeline = new_pipeline()
    transformer = copy.deepcopy(pipeline.transformer)
    for name, linear in find_targets(transformer, 4, 256)[0].items():
        layer = rounded(linear)
        layer.decode(torch.float32)
        transformer.set_submodule(name, layer)
    return pipeline, transformer


def new_tuning(coarse, **changes) -> Tuning:
    pipeline, transformer = coarse
    config = CalibrationConfig(**({"tuning_steps": 10, "tuning_batch": 5} | changes))
    return Tuning(pipeline, copy.deepcopy(transformer), record_samples(pipeline, 2, 4.0, seeded()), config, seeded(1))


def test_a_large_model_learns_the_same_with_less_memory(coarse, monkeypatch):
    """Activations of its blocks are computed again when their gradients are due."""
    kept = new_tuning(coarse)
    monkeypatch.setattr("vq4dit.zero_data.LARGE", 0)
    recomputed = new_tuning(coarse)
    assert recomputed.student.is_gradient_checkpointing and not kept.student.is_gradient_checkpointing
    assert all(kept.advance() == recomputed.advance() for _ in range(3))
    one, other = kept.tensors(), recomputed.tensors()
    assert all(torch.equal(one[name], other[name]) for name in one)


def a_layer(generator: torch.Generator) -> EntropyCodedLinear:
    integers = torch.randint(-3, 4, (6, 8), generator=generator, dtype=torch.int16)
    scales = torch.rand(6, generator=generator) + 0.5, torch.rand(8, generator=generator) + 0.5
    return EntropyCodedLinear.from_integers(integers, *scales, torch.randn(6, generator=generator))


def test_a_hardened_layer_holds_what_was_learned_rounded_to_16_bit(generator):
    layer = a_layer(generator)
    weight = layer.reconstruct(torch.float32)
    learned = layer.bias.detach() + 0.1 * torch.randn(6, generator=generator)
    layer.bias = torch.nn.Parameter(learned)
    layer.harden(torch.float32)
    assert torch.equal(layer.bias, learned.half().float()) and not layer.bias.requires_grad
    assert torch.equal(layer.decoded_weight, weight)
    layer.harden(torch.bfloat16)
    assert layer.bias.dtype == layer.decoded_weight.dtype == torch.bfloat16


def test_samples_are_steps_of_the_teacher_with_its_own_answers(coarse):
    pipeline, _ = coarse
    samples = record_samples(pipeline, 2, 4.0, seeded())
    assert {len(values) for values in samples.values()} == {20}  # two trajectories of ten steps
    some = torch.tensor([0, 1, 15])
    latents, timesteps, labels = (samples[name][some] for name in ("latents", "timesteps", "class_labels"))
    for name, asked in (("conditional", labels), ("unconditional", torch.full_like(labels, NULL_CLASS))):
        with torch.no_grad():
            answer = pipeline.transformer(latents, timestep=timesteps, class_labels=asked).sample
        torch.testing.assert_close(samples[name][some], answer, rtol=1e-4, atol=1e-4)


def test_the_trajectories_of_a_large_model_are_walked_a_few_at_a_time(coarse, monkeypatch):
    pipeline, _ = coarse
    config = CalibrationConfig(tuning_steps=20, tuning_batch=8)  # 16 trajectories
    assert walks(pipeline, config) == {0: 16}
    c = pipeline.transformer.config
    outputs = 2 * 4 * image_tokens(pipeline) * c.num_attention_heads * c.attention_head_dim * c.num_layers
    monkeypatch.setattr("vq4dit.tuning.WALK_BYTES", 6 * outputs)
    assert walks(pipeline, config) == {0: 6, 6: 6, 12: 4}
    monkeypatch.setattr("vq4dit.tuning.WALK_BYTES", 0)
    assert list(walks(pipeline, config).values()) == [1] * 16


def test_a_slice_that_ends_between_two_walks_goes_on_with_the_next(coarse, monkeypatch, tmp_path):
    pipeline, _ = coarse
    settings = quick_settings(recipe="best", calibration={"tuning_steps": 10, "tuning_batch": 10})
    monkeypatch.setattr("vq4dit.tuning.WALK_BYTES", 0)  # four walks of one trajectory
    with Job.open(tmp_path / "at once", settings, pipeline, resume=False) as job:
        at_once = run(job, pipeline)
    monkeypatch.setattr("vq4dit.job.TimeBudget.allows", lambda *_: False)
    slices, seen = 0, []
    with Job.open(tmp_path / "in slices", settings, pipeline, resume=False) as job:
        while (in_slices := run(job, pipeline, 1.0)) is None:
            slices += 1
            seen.append(len(list(job.folder.glob("samples-*"))))
    assert {1, 2, 3, 4} <= set(seen)
    one, other = at_once.transformer.state_dict(), in_slices.transformer.state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_student_equal_to_its_teacher_has_no_loss(coarse):
    pipeline, _ = coarse
    tuning = new_tuning((pipeline, pipeline.transformer))
    assert tuning.advance()["noise_nmse"] < 1e-9


def test_tuning_lowers_the_loss_on_its_samples(coarse):
    tuning = new_tuning(coarse, tuning_steps=40)
    samples = {name: values[:20] for name, values in tuning.samples.items()}
    with torch.no_grad():
        before = tuning._errors(samples).mean()
        with torch.enable_grad():
            for _ in range(40):
                tuning.advance()
        assert tuning._errors(samples).mean() < 0.7 * before


def test_everything_learns_but_the_integers(coarse):
    tuning = new_tuning(coarse)
    parameters = {name: p.detach().clone() for name, p in tuning.student.named_parameters()}
    weights = {name: layer.decoded_weight.clone() for name, layer in coded_layers(tuning.student).items()}
    for _ in range(3):
        tuning.advance()
    still = {name for name, p in tuning.student.named_parameters() if torch.equal(p, parameters[name])}
    assert still and all(name.endswith(FIXED) for name in still)
    assert {"proj_out_2.weight", "transformer_blocks.0.attn1.to_q.bias"} <= parameters.keys() - still
    for name, layer in coded_layers(tuning.student).items():
        assert torch.equal(layer.decoded_weight, weights[name]) and not layer.is_changed


def test_a_restored_tuning_goes_on_bit_for_bit(coarse):
    whole = new_tuning(coarse)
    for _ in range(4):
        whole.advance()
    stored = {name: tensor.detach().clone() for name, tensor in whole.tensors().items()}
    resumed = new_tuning(coarse)
    resumed.restore(stored)
    for _ in range(7):  # past the end of the samples
        assert whole.advance() == resumed.advance()
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


def test_the_learning_rate_falls_from_its_start_to_nearly_nothing(coarse):
    tuning = new_tuning(coarse)
    rates = []
    for _ in range(10):
        tuning.advance()
        rates.append(tuning.optimizer.param_groups[0]["lr"])
    assert rates[0] == tuning.config.tuning_learning_rate and rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.05 * rates[0]


def test_a_loss_that_is_not_a_number_stops_the_tuning_before_it_spoils_anything(coarse):
    tuning = new_tuning(coarse)
    first, second, *_ = coded_layers(tuning.student).values()
    with torch.no_grad():
        first.bias.fill_(torch.nan)
    before = second.bias.detach().clone()
    with pytest.raises(CalibrationDivergedError, match="in step 0: try another seed"):
        tuning.advance()
    assert torch.equal(second.bias, before)


def test_the_file_holds_what_was_learned(tmp_path, pipeline):
    fitted, tuned = (quantize(pipeline, quick_settings(recipe="best", calibration={"tuning_steps": n})) for n in (0, 6))
    save(tuned, tmp_path / "q")
    stored = load_file(tmp_path / "q" / "transformer" / "diffusion_pytorch_model.safetensors")
    values, before = tuned.transformer.state_dict(), fitted.transformer.state_dict()
    assert stored.keys() <= values.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor.to(values[name].dtype), values[name]), name
        if not name.endswith("to_k.bias"):  # it adds the same to all scores of a query, so it has nothing to learn
            assert torch.equal(values[name], before[name]) is name.endswith(FIXED), name
