"""Tuning: everything learns but the assignments, and what has been learned is what the file holds."""

import copy

import pytest
import torch
from conftest import new_pipeline, quick_settings
from safetensors.torch import load_file

from vq4dit import CalibrationConfig, CalibrationDivergedError, quantize, save
from vq4dit.diffusers_quantizer import packed_layers
from vq4dit.job import Job
from vq4dit.layers import VQLinear
from vq4dit.quantization import run
from vq4dit.tunable_layers import LookUp, TunableVQLinear
from vq4dit.tuning import Tuning, record_samples, walks
from vq4dit.zero_data import NULL_CLASS, image_tokens


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def clustered():
    """A pipeline and its transformer by k-means, to be tuned."""
    pipeline = new_pipeline()
    return pipeline, quantize(pipeline, quick_settings(recipe="kmeans")).transformer


def new_tuning(clustered, **changes) -> Tuning:
    pipeline, transformer = clustered
    config = CalibrationConfig(**({"tuning_steps": 10, "tuning_batch": 5} | changes))
    student = copy.deepcopy(transformer)
    for name, layer in packed_layers(student).items():
        student.set_submodule(name, TunableVQLinear(layer))
    return Tuning(pipeline, student, record_samples(pipeline, 2, 4.0, seeded()), config, seeded(1))


def test_a_large_model_learns_the_same_with_less_memory(clustered, monkeypatch):
    """Activations of its blocks are computed again when their gradients are due."""
    kept = new_tuning(clustered)
    monkeypatch.setattr("vq4dit.zero_data.LARGE", 0)
    recomputed = new_tuning(clustered)
    assert recomputed.student.is_gradient_checkpointing and not kept.student.is_gradient_checkpointing
    assert all(kept.advance() == recomputed.advance() for _ in range(3))
    one, other = kept.tensors(), recomputed.tensors()
    assert all(torch.equal(one[name], other[name]) for name in one)


def a_layer(generator: torch.Generator, *, row_scale: bool = True) -> VQLinear:
    scale = torch.rand(6, generator=generator) + 0.5 if row_scale else None
    codebook, bias = torch.randn(5, 2, generator=generator), torch.randn(6, generator=generator)
    return VQLinear.from_assignments(codebook, torch.randint(5, (24,), generator=generator), (6, 8), bias, scale)


@pytest.mark.parametrize("row_scale", [True, False], ids=["row scales", "no row scales"])
def test_a_tunable_layer_answers_like_the_hard_one(row_scale, generator):
    layer, inputs = a_layer(generator, row_scale=row_scale), torch.randn(3, 8, generator=generator)
    assert torch.equal(TunableVQLinear(layer)(inputs), layer(inputs))


def test_hardening_a_layer_that_learned_nothing_gives_it_back(generator):
    layer = a_layer(generator)
    again = TunableVQLinear(layer).harden()
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_hardened_layer_holds_what_was_learned_rounded_to_16_bit(generator):
    tunable = TunableVQLinear(a_layer(generator))
    with torch.no_grad():
        for p in tunable.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    hard = tunable.harden()
    codebook, scale = tunable.codebook.half().float(), tunable.row_scale.half().float()
    assert torch.equal(hard.reconstruct(torch.float32), codebook[tunable.assignments.long()].view(6, 8) * scale.unsqueeze(1))
    assert torch.equal(hard.bias, tunable.bias.half().float())


def test_a_look_up_has_the_gradient_of_plain_indexing(generator):
    codebook = torch.randn(5, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    assignments = torch.tensor([0, 3, 3, 1, 0, 3])  # 2 and 4 are not used
    assert torch.autograd.gradcheck(lambda c: LookUp.apply(c, assignments), codebook)
    weights = torch.randn(6, 2, generator=generator)
    single = codebook.detach().float().requires_grad_()
    gradients = [
        torch.autograd.grad((found * weights).sum(), single)[0]
        for found in (LookUp.apply(single, assignments), single[assignments])
    ]
    torch.testing.assert_close(*gradients)


def test_samples_are_steps_of_the_teacher_with_its_own_answers(clustered):
    pipeline, _ = clustered
    samples = record_samples(pipeline, 2, 4.0, seeded())
    assert {len(values) for values in samples.values()} == {20}  # two trajectories of ten steps
    some = torch.tensor([0, 1, 15])
    latents, timesteps, labels = (samples[name][some] for name in ("latents", "timesteps", "class_labels"))
    for name, asked in (("conditional", labels), ("unconditional", torch.full_like(labels, NULL_CLASS))):
        with torch.no_grad():
            answer = pipeline.transformer(latents, timestep=timesteps, class_labels=asked).sample
        torch.testing.assert_close(samples[name][some], answer, rtol=1e-4, atol=1e-4)


def test_the_trajectories_of_a_large_model_are_walked_a_few_at_a_time(clustered, monkeypatch):
    pipeline, _ = clustered
    config = CalibrationConfig(tuning_steps=20, tuning_batch=8)  # 16 trajectories
    assert walks(pipeline, config) == {0: 16}
    c = pipeline.transformer.config
    outputs = 2 * 4 * image_tokens(pipeline) * c.num_attention_heads * c.attention_head_dim * c.num_layers
    monkeypatch.setattr("vq4dit.tuning.WALK_BYTES", 6 * outputs)
    assert walks(pipeline, config) == {0: 6, 6: 6, 12: 4}
    monkeypatch.setattr("vq4dit.tuning.WALK_BYTES", 0)
    assert list(walks(pipeline, config).values()) == [1] * 16


def test_a_slice_that_ends_between_two_walks_goes_on_with_the_next(clustered, monkeypatch, tmp_path):
    pipeline, _ = clustered
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


def test_a_student_equal_to_its_teacher_has_no_loss(clustered):
    pipeline, _ = clustered
    tuning = new_tuning((pipeline, pipeline.transformer))
    assert tuning.advance()["noise_nmse"] < 1e-9


def test_tuning_lowers_the_loss_on_its_samples(clustered):
    tuning = new_tuning(clustered, tuning_steps=40)
    samples = {name: values[:20] for name, values in tuning.samples.items()}
    with torch.no_grad():
        before = tuning._loss(samples)
        with torch.enable_grad():
            for _ in range(40):
                tuning.advance()
        assert tuning._loss(samples) < 0.7 * before


def test_everything_learns_but_the_assignments(clustered):
    tuning = new_tuning(clustered)
    parameters = {name: p.detach().clone() for name, p in tuning.student.named_parameters()}
    assignments = {name: layer.assignments.clone() for name, layer in tuning.layers.items()}
    for _ in range(3):
        tuning.advance()
    still = {name for name, p in tuning.student.named_parameters() if torch.equal(p, parameters[name])}
    assert not still and {"proj_out_2.weight", "transformer_blocks.0.attn1.to_q.row_scale"} <= parameters.keys()
    for name, layer in tuning.layers.items():
        assert torch.equal(layer.assignments, assignments[name])
        assert torch.equal(layer.harden().assignments, assignments[name])


def test_a_restored_tuning_goes_on_bit_for_bit(clustered):
    whole = new_tuning(clustered)
    for _ in range(4):
        whole.advance()
    stored = {name: tensor.detach().clone() for name, tensor in whole.tensors().items()}
    resumed = new_tuning(clustered)
    resumed.restore(stored)
    for _ in range(7):  # past the end of the samples
        assert whole.advance() == resumed.advance()
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, resumed.tensors()[name]), name


def test_the_learning_rate_falls_from_its_start_to_nearly_nothing(clustered):
    tuning = new_tuning(clustered)
    rates = []
    for _ in range(10):
        tuning.advance()
        rates.append(tuning.optimizer.param_groups[0]["lr"])
    assert rates[0] == tuning.config.tuning_learning_rate and rates == sorted(rates, reverse=True)
    assert rates[-1] < 0.05 * rates[0]


def test_a_loss_that_is_not_a_number_stops_the_tuning_before_it_spoils_anything(clustered):
    tuning = new_tuning(clustered)
    layer = next(iter(tuning.layers.values()))
    with torch.no_grad():
        layer.bias.fill_(torch.nan)
    before = layer.codebook.detach().clone()
    with pytest.raises(CalibrationDivergedError, match="in step 0: try another seed"):
        tuning.advance()
    assert torch.equal(layer.codebook, before)


def test_the_file_holds_what_was_learned(tmp_path, pipeline):
    fitted, tuned = (quantize(pipeline, quick_settings(recipe="best", calibration={"tuning_steps": n})) for n in (0, 6))
    save(tuned, tmp_path / "q")
    stored = load_file(tmp_path / "q" / "transformer" / "diffusion_pytorch_model.safetensors")
    values, before = tuned.transformer.state_dict(), fitted.transformer.state_dict()
    assert stored.keys() <= values.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor.to(values[name].dtype), values[name]), name
        if not name.endswith("to_k.bias"):  # it adds the same to all scores of a query, so it has nothing to learn
            assert torch.equal(values[name], before[name]) is name.endswith("packed_assignments"), name
