"""The recipe `best`: integers with bits where they matter, layer by layer, entropy coded.

First how much an error in each layer's outputs matters (`fisher.py`), then how many bits each layer gets (`bit_allocation.py`),
then one layer after the other (`layerwise.py`, `gptq.py`). README.md beside this file tells it with its equations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from vq4dit.config import EntropyCodingConfig, QuantizationSettings
from vq4dit.denoisers import denoiser_of
from vq4dit.layers.entropy_coded import EntropyCodedLinear
from vq4dit.layers.linear_maps import matrix_shape, put_layer
from vq4dit.models.student import student_with
from vq4dit.models.trajectories import ROUNDS, STEPS, is_large
from vq4dit.pipelines.inspect import promised_bits
from vq4dit.randomness import named_generator
from vq4dit.recipes.bit_allocation import RateCurve, log_t_for
from vq4dit.recipes.fisher import Sensitivities, num_steps, output_sensitivities
from vq4dit.recipes.layerwise import LayerGroup, Replays, fit_layers, groups_in_turn, rate_curves, record_replays
from vq4dit.recipes.plan import Plan
from vq4dit.recipes.stages import Piece, Stage, Stages, Tensors, Tick

ERRORS = "errors"  # what each layer is expected to add to the output's error: told to people, used by nobody
SENSITIVITIES = ("sensitivities", "sensitivities-of-steps", "sensitivities-of-weights")


def entropy_coded_stages(pipeline: Any, plan: Plan, settings: QuantizationSettings) -> Stages:
    """From output sensitivities to integers, layer by layer."""
    config = settings.entropy_coding
    config = config.of_large() if is_large(denoiser_of(pipeline)) else config
    fitting = Fitting(pipeline, plan, settings, config)
    targets, wanted = plan.targets, tuple(fitting.piece_names.values())
    of_all = Piece(fitting.measure, SENSITIVITIES, fitting.know, num_steps(fitting.sampling, config))
    yield Stage("sensitivity", of_all.count, [of_all], wanted)
    yield Stage("trajectories", STEPS, [Piece(fitting.record, count=STEPS)], wanted)
    yield Stage("bits", len(targets), [Piece(fitting.allocate, ("bits", ERRORS), fitting.share_out, len(targets))], wanted)
    yield Stage("fit", len(targets), fitting.layers(), work=fitting.work_of(targets))
    return fitting.student


class Fitting:
    """What the stages of `best` know: sensitivities, trajectories, bits, and the student as far as it is quantized."""

    def __init__(self, pipeline: Any, plan: Plan, settings: QuantizationSettings, config: EntropyCodingConfig):
        self.pipeline, self.targets, self.settings, self.config = pipeline, plan.targets, settings, config
        assert plan.sampling is not None  # `check` makes one for recipes that sample
        self.sampling = plan.sampling
        self.piece_names = {name: f"layers/{name}" for name in self.targets}
        self.teacher = denoiser_of(pipeline)
        self.student = student_with(self.teacher, {})
        self.sensitivities = Sensitivities({}, {}, {})
        self.replays: Replays | None = None
        self.bits = BitBudget({})

    def measure(self, tick: Tick) -> Iterable[tuple[str, Tensors]]:
        """Output sensitivities B of all layers, and what their Kronecker ratios are found from."""
        generator = named_generator(self.settings.seed, "sensitivities")
        found = output_sensitivities(self.pipeline, list(self.targets), self.sampling, generator, self.config, tick)
        return zip(SENSITIVITIES, found, strict=True)

    def know(self, pieces: Mapping[str, Tensors]) -> None:
        self.sensitivities = Sensitivities(*(pieces[name] for name in SENSITIVITIES))

    def record(self, tick: Tick) -> Iterable[tuple[str, Tensors]]:
        """The teacher's trajectories, whose blocks' inputs every layer is fitted on."""
        generator = named_generator(self.settings.seed, "layer by layer")
        self.replays = record_replays(self.pipeline, self.sampling, generator, self.config, tick)
        return ()

    def allocate(self, tick: Tick) -> Iterable[tuple[str, Tensors]]:
        """Share the bits of all integers out among the layers, by the teacher's own inputs in one round; one number each."""
        assert self.replays is not None
        teacher = self.replays.of(self.teacher, every=ROUNDS)
        promised = sum(promised_bits(linear, self.settings.bits) for linear in self.targets.values())
        curves: dict[str, RateCurve] = {}
        names, classes = list(self.targets), self.replays.num_classes
        for group in groups_in_turn(teacher, teacher, names, self.sensitivities.steps, classes):
            linears = [self.targets[name] for name in group.names]
            sensitivities = [self.sensitivities.outputs[name] for name in group.names]
            gradients = [self.sensitivities.gradients.get(name) for name in group.names]
            found = rate_curves(linears, group.statistics(), sensitivities, gradients, self.config)
            for name, curve in zip(group.names, found, strict=True):
                curves[name] = curve
                tick()
        log_t = log_t_for(curves.values(), promised)
        bits = {name: torch.tensor(curve.bits(log_t), dtype=torch.float64) for name, curve in curves.items()}
        errors = {name: torch.tensor(curve.error(log_t), dtype=torch.float64) for name, curve in curves.items()}
        return [("bits", bits), (ERRORS, errors)]

    def share_out(self, pieces: Mapping[str, Tensors]) -> None:
        self.bits = BitBudget({name: value.item() for name, value in pieces["bits"].items()})
        self.sensitivities = self.sensitivities._replace(gradients={})  # they have told all that they know

    def layers(self) -> Iterator[Piece]:
        """All layers in order of execution, each for the inputs that those before it leave; or as they are on disk."""
        if self.replays is None:  # all were fitted before the process ended
            for name in self.targets:
                yield Piece(lambda _: (), (self.piece_names[name],), self._put(name), work=self.work_of([name]))
            return
        teacher, student = self.replays.of(self.teacher), self.replays.of(self.student)
        names, classes = list(self.targets), self.replays.num_classes
        groups = groups_in_turn(teacher, student, names, self.sensitivities.steps, classes)
        for group in groups:
            files = tuple(self.piece_names[name] for name in group.names)
            put, work = self._put(*group.names), self.work_of(group.names)
            yield Piece(partial(self._fit, group), files, put, len(group.names), work)

    def work_of(self, names: Iterable[str]) -> float:
        """How long layers take to fit, in proportion: rounding by their weights, statistics by the square of their inputs."""
        shapes = [matrix_shape(self.targets[name]) for name in names]
        return float(sum(columns * (2 * rows + columns) for rows, columns in shapes))

    def _fit(self, group: LayerGroup, tick: Tick) -> Iterator[tuple[str, Tensors]]:
        """Layers that read the same input, together."""
        linears = [self.targets[name] for name in group.names]
        sensitivities = [self.sensitivities.outputs[name] for name in group.names]
        bits = [self.bits.share(name) for name in group.names]
        fitted = fit_layers(linears, group.statistics(), sensitivities, bits, self.config)
        for name, (quantized, bias) in zip(group.names, fitted, strict=True):
            yield self.piece_names[name], EntropyCodedLinear.from_integers(*quantized, bias).state_dict()
            tick()

    def _put(self, *names: str) -> Callable[[Mapping[str, Tensors]], None]:
        """Let layers, as they are on disk, take their places in the student."""

        def put(pieces: Mapping[str, Tensors]) -> None:
            for name in names:
                put_one(name, pieces)

        def put_one(name: str, pieces: Mapping[str, Tensors]) -> None:
            linear = self.targets[name]
            piece = {key: tensor.to(linear.weight.device) for key, tensor in pieces[self.piece_names[name]].items()}
            layer = EntropyCodedLinear.from_tensors(piece, matrix_shape(linear), linear.weight.dtype)
            layer.decode(linear.weight.dtype)
            put_layer(self.student, name, layer)
            integer_bytes = len(piece["coded_weight"]) - sum(matrix_shape(linear))  # a byte of a row or column was set aside
            self.bits.spend(name, 8 * integer_bytes)

        return put


class BitBudget:
    """How many bits each layer was promised; what earlier layers over- or under-spent rescales the budget of later ones."""

    def __init__(self, promised: Mapping[str, float]):
        self.promised = promised
        self.promised_left = self.bits_left = sum(promised.values())

    def share(self, name: str) -> float:
        """What a layer's integers may take."""
        return self.promised[name] * max(self.bits_left, 0) / max(self.promised_left, 1e-9)

    def spend(self, name: str, bits: int) -> None:
        """A layer has taken so many."""
        self.bits_left -= bits
        self.promised_left -= self.promised.get(name, 0.0)
