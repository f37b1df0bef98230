"""Layer by layer: which layers come when, what is known of their inputs, and what is made good."""

import copy

import pytest
import torch
from coded_models import output_error
from tiny import QUICK, new_pipeline, quick_settings
from torch import nn

from vq4dit import quantize
from vq4dit.config import EntropyCodingConfig
from vq4dit.evaluation.metrics import noise_nmse
from vq4dit.models.blocks import find_targets
from vq4dit.models.conditions import NULL_CLASS
from vq4dit.models.denoiser_calls import tensors_of
from vq4dit.models.trajectories import ROUNDS, STEPS, Sampling, random_trajectories
from vq4dit.recipes.hessian import InputStatistics, input_statistics
from vq4dit.recipes.layerwise import Replays, fit_layers, groups_in_turn, record_replays

BITS = 2.0 * 32 * 48
CONFIG = EntropyCodingConfig()
SAMPLING = Sampling({"guidance_scale": 4.0}, tokens=32)  # 16 positions, with a class and with none
GROUPS = [
    ["norm1.linear"],
    ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    ["attn1.to_out.0"],
    ["ff.net.0.proj"],
    ["ff.net.2"],
]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def replays_of(pipeline, sampling=SAMPLING) -> Replays:
    return record_replays(pipeline, sampling, seeded(), QUICK)


def groups(pipeline, student=None, sampling=SAMPLING):
    teacher = pipeline.transformer
    targets, _ = find_targets(teacher, 4, 256)
    replays = replays_of(pipeline, sampling)
    both = (replays.of(model) for model in (teacher, student or copy.deepcopy(teacher)))
    return groups_in_turn(*both, list(targets), num_classes=replays.num_classes)


def group_of(found, name: str) -> InputStatistics:
    return next(group for group in found if name in group.names).statistics()


def statistics_of(teacher: torch.Tensor, student: torch.Tensor) -> InputStatistics:
    return input_statistics([teacher], [student])


def test_every_target_comes_once_in_order_of_execution_and_q_k_v_come_together(pipeline):
    found = [group.names for group in groups(pipeline)]
    assert found == [[f"transformer_blocks.{block}.{name}" for name in names] for block in range(2) for names in GROUPS]


def test_layers_that_are_not_wanted_do_not_come(pipeline):
    replays = replays_of(pipeline)
    wanted = ["transformer_blocks.1.attn1.to_k", "transformer_blocks.1.attn1.to_v"]
    both = (replays.of(model) for model in (pipeline.transformer, copy.deepcopy(pipeline.transformer)))
    found = list(groups_in_turn(*both, wanted))
    assert [group.names for group in found] == [wanted]


@pytest.mark.parametrize("layer", ["transformer_blocks.0.attn1.to_q", "transformer_blocks.1.ff.net.2"])
def test_statistics_are_those_of_what_the_teacher_sees_while_sampling(pipeline, layer):
    seen = []
    linear = pipeline.transformer.get_submodule(layer)
    hook = linear.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].flatten(0, -2)))
    shown, generator = {}, seeded()
    for start in range(ROUNDS):

        def note(step, start=start):
            if step.number % ROUNDS == start:
                shown[step.number] = seen[-1]

        random_trajectories(pipeline, SAMPLING, 2, generator, note, num_inference_steps=STEPS)
    hook.remove()
    inputs = torch.cat(list(shown.values()))
    assert inputs.shape[0] == 10 * 2 * 2 * 16
    statistics = group_of(groups(pipeline), layer)
    torch.testing.assert_close(statistics.covariance, inputs.T.cov(correction=0))
    torch.testing.assert_close(statistics.about_zero()[0], inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.teacher_mean, inputs.mean(0))


def test_nothing_drifts_while_nothing_is_quantized(pipeline):
    for group in groups(pipeline):
        statistics = group.statistics()
        assert not statistics.mismatch.any()
        assert torch.equal(statistics.teacher_mean, statistics.student_mean)


def test_what_is_quantized_makes_the_inputs_behind_it_drift(pipeline):
    student = copy.deepcopy(pipeline.transformer)
    drifts = {}
    for group in groups(pipeline, student):
        drifts[group.names[0]] = group.statistics().mismatch.abs().max().item()
        if "to_out" in group.names[0]:
            linear = student.get_submodule(group.names[0])
            linear.weight.data.mul_(0.9)
    before, behind = (drifts[f"transformer_blocks.0.{name}"] for name in ("attn1.to_q", "ff.net.0.proj"))
    assert before == 0 and behind > 0 and drifts["transformer_blocks.1.attn1.to_q"] > 0


def test_layers_without_tokens_see_every_class_and_as_often_none(pipeline):
    layer = "transformer_blocks.1.norm1.linear"
    embedder = pipeline.transformer.transformer_blocks[1].norm1.emb
    labels = torch.tensor([0, 1, 2, NULL_CLASS, NULL_CLASS, NULL_CLASS])
    seen = []
    for call in replays_of(pipeline).transformers[0].calls:
        with torch.no_grad():
            seen.append(torch.nn.functional.silu(embedder(call.named["timestep"][:1].expand(6), labels)))
    assert len(seen) == STEPS
    inputs = torch.cat(seen)
    statistics = group_of(groups(pipeline), layer)
    torch.testing.assert_close(statistics.covariance, inputs.T.cov(correction=0))
    torch.testing.assert_close(statistics.about_zero()[0], inputs.T @ inputs / len(inputs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.student_mean, inputs.mean(0))


@pytest.mark.parametrize("every", [1, ROUNDS])
def test_the_teacher_may_be_gone_through_alone_and_by_some_of_the_steps(pipeline, every):
    """As the bits of all layers are known, before there is a student."""
    replays, layer = replays_of(pipeline), "transformer_blocks.1.ff.net.0.proj"
    teacher, names = replays.of(pipeline.transformer, every), list(find_targets(pipeline.transformer, 4, 256)[0])
    assert [call.step for call in teacher[0].calls] == list(range(0, STEPS, every))
    alone = group_of(groups_in_turn(teacher, teacher, names), layer)
    seen = []
    hook = pipeline.transformer.get_submodule(layer).register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        for call in teacher[0].calls:
            call.run(pipeline.transformer)
    hook.remove()
    inputs = torch.cat([x.flatten(0, -2) for x in seen])
    torch.testing.assert_close(alone.covariance, inputs.T.cov(correction=0))
    assert not alone.mismatch.any()


def test_a_step_counts_for_layers_without_tokens_as_they_are_told(pipeline):
    replays, layer = replays_of(pipeline), "transformer_blocks.1.norm1.linear"
    weights = torch.zeros(STEPS, 1, 2)
    weights[3, 0] = torch.tensor([3.0, 1.0])  # of the step, and of it three times as much for classes as for none
    model = pipeline.transformer
    both = (replays.of(of) for of in (model, copy.deepcopy(model)))
    found = group_of(groups_in_turn(*both, [layer], {layer: weights}, replays.num_classes), layer)
    labels = torch.tensor([0, 1, 2, NULL_CLASS])
    with torch.no_grad():
        timestep = replays.transformers[0].calls[3].named["timestep"][:1].expand(4)
        inputs = torch.nn.functional.silu(model.transformer_blocks[1].norm1.emb(timestep, labels))
    shares = torch.tensor([3.0, 3.0, 3.0, 3.0]) / 12  # three times one class against none as often as all classes
    torch.testing.assert_close(found.student_mean, shares @ inputs)
    torch.testing.assert_close(found.covariance, inputs.T.cov(correction=0, aweights=shares))


def test_a_layer_that_never_runs_comes_last_and_knows_nothing(pipeline):
    pipeline.transformer.transformer_blocks[0].spare = nn.Linear(64, 64)
    found = list(groups(pipeline))
    assert found[-1].names == ["transformer_blocks.0.spare"] and len(found) == 2 * len(GROUPS) + 1
    statistics = found[-1].statistics()
    assert torch.equal(statistics.covariance, torch.eye(64)) and not statistics.student_mean.any()


def test_no_hook_is_left_even_if_nobody_takes_the_rest(pipeline):
    student = copy.deepcopy(pipeline.transformer)
    found = groups(pipeline, student)
    next(found).statistics()
    found.close()
    for _ in groups(pipeline, student):
        pass
    modules = [*pipeline.transformer.modules(), *student.modules()]
    assert not any(module._forward_pre_hooks or module._forward_hooks or "forward" in vars(module) for module in modules)


def test_training_mode_and_gradients_change_nothing(pipeline):
    wanted = [group.statistics() for group in groups(pipeline)]
    pipeline.transformer.train()
    torch.manual_seed(1)
    for group, statistics in zip(groups(pipeline), wanted, strict=True):
        found = group.statistics()
        tensors = zip(tensors_of(found), tensors_of(statistics), strict=True)
        assert found.damping == statistics.damping
        assert all(torch.equal(a, b) and not a.requires_grad for a, b in tensors)
    assert all(module.training for module in pipeline.transformer.modules())


def fit_layer(linear, statistics, sensitivity, bits, config):
    """One alone."""
    return fit_layers([linear], statistics, [sensitivity], [bits], config)[0]


@pytest.mark.parametrize("drift", [0.0, 0.3], ids=["inputs as in the teacher", "inputs that drifted"])
def test_a_fitted_bias_keeps_the_mean_output(drift, generator):
    linear = nn.Linear(32, 48)
    teacher = torch.randn(200, 32, generator=generator) + 1
    student = teacher + drift * torch.randn(32, generator=generator)
    quantized, bias = fit_layer(linear, statistics_of(teacher, student), torch.ones(48), BITS, CONFIG)
    wanted = linear(teacher).mean(0)
    torch.testing.assert_close((student @ quantized.weight().T + bias).mean(0), wanted, rtol=1e-4, atol=1e-4)


def test_a_layer_without_bias_gets_none(generator):
    inputs = torch.randn(100, 32, generator=generator)
    assert fit_layer(nn.Linear(32, 48, bias=False), statistics_of(inputs, inputs), torch.ones(48), BITS, CONFIG)[1] is None


def test_a_layer_makes_good_a_part_of_the_drift_before_it(generator):
    linear = nn.Linear(32, 48, bias=False)
    teacher = torch.randn(400, 32, generator=generator)
    student = teacher @ (torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator))
    errors = []
    for statistics in (statistics_of(teacher, student), statistics_of(student, student)):
        quantized, _ = fit_layer(linear, statistics, torch.ones(linear.out_features), 2 * BITS, CONFIG)
        wanted, found = linear(teacher), student @ quantized.weight().T
        errors.append((wanted - found).square().sum().item())
    assert errors[0] < 0.5 * errors[1]


def test_errors_along_a_constant_input_cost_nothing_where_a_bias_makes_them_good(generator):
    linear = nn.Linear(32, 48)
    inputs = torch.randn(400, 32, generator=generator)
    shifted = inputs + 10 * torch.randn(32, generator=generator)
    found = [fit_layer(linear, statistics_of(x, x), torch.ones(48), BITS, CONFIG) for x in (inputs, shifted)]
    errors = [
        (linear(x) - x @ quantized.weight().T - bias).square().mean().item()
        for x, (quantized, bias) in zip((inputs, shifted), found, strict=True)
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)


@pytest.mark.parametrize("spread", [0.0, 0.01], ids=["constant inputs", "nearly constant inputs"])
@pytest.mark.parametrize("coupled", [False, True])
def test_inputs_that_hardly_vary_are_no_obstacle(coupled, spread, generator):
    linear = nn.Linear(32, 48)
    inputs = 30 + spread * torch.randn(400, 32, generator=generator)
    sensitivity = torch.eye(48) if coupled else torch.ones(48)
    quantized, bias = fit_layer(linear, statistics_of(inputs, inputs), sensitivity, BITS, CONFIG)
    wanted, found = linear(inputs), inputs @ quantized.weight().T + bias
    torch.testing.assert_close(found, wanted, rtol=0, atol=0.05)


@pytest.mark.parametrize("layer", ["attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"])
def test_a_dead_layer_is_quantized_like_the_others(layer, pipeline):
    name = f"transformer_blocks.0.{layer}"
    pipeline.transformer.get_submodule(name).weight.data.zero_()
    quantized = quantize(pipeline, quick_settings(recipe="best"))
    assert quantized.transformer.get_submodule(name).weight.abs().max() < 1e-3


def test_a_coupling_of_outputs_is_used(generator):
    """All that is read of the outputs is their sum."""
    linear, inputs = nn.Linear(32, 48), torch.randn(400, 32, generator=generator)
    together = torch.ones(48, 48)  # rows in one block do not correct each other: the last does what it can
    errors = []
    for sensitivity in (together, together[0]):
        quantized, bias = fit_layer(linear, statistics_of(inputs, inputs), sensitivity, BITS, CONFIG)
        error = linear(inputs) - inputs @ quantized.weight().T - bias
        errors.append(error.sum(1).square().mean().item())
    assert errors[0] < 0.2 * errors[1]


def test_a_fitted_layer_is_better_for_its_inputs_than_for_others(generator):
    linear = nn.Linear(32, 48)
    inputs = torch.randn(400, 32, generator=generator) * torch.logspace(0, -2, 32)
    quantized, _ = fit_layer(linear, statistics_of(inputs, inputs), torch.ones(48), BITS, CONFIG)
    weight = quantized.weight()
    seen = output_error(linear.weight.detach(), weight, inputs.T @ inputs / 400)
    assert seen < 0.5 * output_error(linear.weight.detach(), weight, torch.eye(32))


def noise_error(pipeline, **settings) -> float:
    quantized = quantize(pipeline, quick_settings(**settings))
    return noise_nmse(pipeline, quantized, num_trajectories=4, num_inference_steps=5)


@pytest.mark.parametrize("bits", [2, 3])
def test_best_is_closer_to_the_original_than_kmeans(pipeline, bits):
    assert noise_error(pipeline, recipe="best", bits=bits) < 0.7 * noise_error(pipeline, recipe="kmeans", bits=bits)


def test_a_weight_far_above_all_others_does_not_spoil_the_model(pipeline):
    pipeline.transformer.transformer_blocks[0].ff.net[2].weight.data[5, 7] = 10.0
    fewer, more = (noise_error(pipeline, recipe="best", bits=bits) for bits in (2, 4))
    assert more < fewer / 4 and fewer < 0.3 * noise_error(pipeline, recipe="kmeans")


def test_a_model_of_few_classes_needs_no_thousand():
    assert noise_error(new_pipeline(num_embeds_ada_norm=3), recipe="best") < 0.01


def test_layers_of_one_input_are_fitted_together_as_well_as_alone(generator):
    linears = [nn.Linear(32, rows) for rows in (48, 24, 96)]
    teacher = torch.randn(400, 32, generator=generator) + 1
    student = teacher @ (torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator))
    statistics = statistics_of(teacher, student)
    sensitivities = [torch.ones(linear.out_features) for linear in linears]
    bits = [2.0 * linear.weight.numel() for linear in linears]
    together = fit_layers(linears, statistics, sensitivities, bits, CONFIG)
    for linear, sensitivity, promised, found in zip(linears, sensitivities, bits, together, strict=True):
        alone = fit_layer(linear, statistics, sensitivity, promised, CONFIG)
        errors = [
            (linear(teacher) - student @ quantized.weight().T - bias).square().mean().item()
            for quantized, bias in (found, alone)
        ]
        assert errors[0] < 1.1 * errors[1]


def test_linears_with_and_without_a_bias_are_not_fitted_together(pipeline):
    """Their second moments are others: about the mean, which a bias makes good, and about zero."""
    attention = pipeline.transformer.transformer_blocks[0].attn1
    attention.to_k.bias = None
    teacher = replays_of(pipeline).of(pipeline.transformer)
    names = [f"transformer_blocks.0.attn1.to_{kind}" for kind in "qkv"]
    assert [group.names for group in groups_in_turn(teacher, teacher, names)] == [[name] for name in names]
