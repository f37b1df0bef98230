"""What enters a block is found by the transformer's own forward pass, bit for bit, whatever it does between its blocks."""

import copy

import pytest
import torch
from tiny import new_transformer
from torch import nn

from vq4dit.errors import UnsupportedModelError
from vq4dit.models.block_replay import BlockArguments, BlockReplay, executed_blocks, last_readers, replaced_forwards
from vq4dit.models.blocks import named_blocks
from vq4dit.models.denoiser_calls import DenoiserCall, map_tensors, prediction_of, tensors_of


class Block(nn.Module):
    """Two streams in, two streams out; given a third, it adds that as well."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden, other, skipped=None):
        hidden = hidden + self.second(torch.tanh(self.first(hidden + other.mean(-2, keepdim=True))))
        return (hidden if skipped is None else hidden + skipped), other + hidden.mean(-2, keepdim=True)


class Skipping(nn.Module):
    """A made-up transformer: `late` is declared first and runs last, and its blocks read what `early` made long before."""

    def __init__(self, width: int = 8, skips: bool = True):
        super().__init__()
        self.late = nn.ModuleList([Block(width) for _ in range(2)])
        self.early = nn.ModuleList([Block(width) for _ in range(3)])
        self.embed, self.out, self.skips = nn.Linear(width, width), nn.Linear(width, width), skips
        self.drop = nn.Dropout(0.5)

    def forward(self, hidden, *, prompt):
        hidden, kept = self.drop(self.embed(hidden)), []
        for block in self.early:
            hidden, prompt = block(hidden, prompt)
            kept.append(hidden)
        for block in self.late:
            skipped = kept.pop(0) if self.skips else None
            hidden, prompt = block(torch.tanh(hidden), prompt, skipped=skipped)
        return self.out(hidden), prompt


NAMES = ["early.0", "early.1", "early.2", "late.0", "late.1"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def skipping(**settings) -> Skipping:
    torch.manual_seed(0)
    return Skipping(**settings).eval()


def calls_of_skipping(count: int = 2) -> list[DenoiserCall]:
    draw = seeded()
    return [
        DenoiserCall(step, 0, (torch.randn(2, 5, 8, generator=draw),), {"prompt": torch.randn(2, 3, 8, generator=draw)})
        for step in range(count)
    ]


def calls_of_dit(count: int = 2) -> list[DenoiserCall]:
    draw, labels = seeded(), torch.tensor([0, 1000])
    latents = [torch.randn(2, 4, 8, 8, generator=draw) for _ in range(count)]
    return [
        DenoiserCall(step, 0, (x,), {"timestep": torch.tensor([900 - step] * 2), "class_labels": labels})
        for step, x in enumerate(latents)
    ]


MODELS = {
    "DiT": lambda: (new_transformer(num_layers=3), calls_of_dit()),
    "skips": lambda: (skipping(), calls_of_skipping()),
    "no skips": lambda: (skipping(skips=False), calls_of_skipping()),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def seen_by_blocks(transformer, call) -> tuple[list[BlockArguments], list, torch.Tensor]:
    """What every block is given and answers in an ordinary pass, in order, and what comes out."""
    given, answers = [], []
    handles = []
    for block in named_blocks(transformer).values():
        note = lambda _, positional, named, output: (given.append(BlockArguments(positional, named)), answers.append(output))  # noqa: E731
        handles.append(block.register_forward_hook(lambda *of, note=note: note(*of) and None, with_kwargs=True))
    with torch.no_grad():
        result = call.run(transformer)
    for handle in handles:
        handle.remove()
    return given, answers, result


def equal(a, b) -> bool:
    pairs = list(zip(tensors_of(a), tensors_of(b), strict=True))
    return bool(pairs) and all(torch.equal(x, y) for x, y in pairs)


def replay_of(transformer, calls) -> BlockReplay:
    order = executed_blocks(transformer, calls[0])
    return BlockReplay(transformer, calls, order, last_readers(transformer, calls[0], order))


@every_model
def test_every_block_is_given_in_a_replay_what_it_is_given_in_a_pass(make):
    transformer, calls = make()
    wanted = [seen_by_blocks(transformer, call) for call in calls]
    replay = replay_of(transformer, calls)
    for index, name in enumerate(replay.order):
        arguments = replay.arguments(index)
        for found, (given, _, _) in zip(arguments, wanted, strict=True):
            assert equal((found.positional, found.named), (given[index].positional, given[index].named))
        with torch.no_grad():
            answers = [of_call.run(transformer.get_submodule(name)) for of_call in arguments]
        assert all(equal(answer, of_pass[index]) for answer, (_, of_pass, _) in zip(answers, wanted, strict=True))
        replay.keep(answers)
    for call, kept, (_, _, result) in zip(calls, replay.outputs, wanted, strict=True):
        blocks = [transformer.get_submodule(name) for name in replay.order]
        answering = {block: lambda *_, answer=answer, **__: answer for block, answer in zip(blocks, kept, strict=True)}
        with replaced_forwards(answering), torch.no_grad():
            assert torch.equal(call.run(transformer), result)


@every_model
def test_a_student_is_gone_through_by_what_its_own_blocks_answer(make):
    transformer, calls = make()
    teacher = replay_of(transformer, calls)
    student = copy.deepcopy(transformer)
    first, *others = teacher.order
    with torch.no_grad():
        for p in student.get_submodule(first).parameters():
            p.mul_(0.9)
    replay = BlockReplay(student, calls, teacher.order, teacher.last_reader)
    wanted = [seen_by_blocks(student, call)[0] for call in calls]
    for index, name in enumerate(teacher.order):
        arguments = replay.arguments(index)
        assert all(equal(found.positional, given[index].positional) for found, given in zip(arguments, wanted, strict=True))
        with torch.no_grad():
            replay.keep([of_call.run(student.get_submodule(name)) for of_call in arguments])
    assert others and not equal(wanted[0][1].positional, seen_by_blocks(transformer, calls[0])[0][1].positional)


def test_blocks_come_in_the_order_in_which_they_run():
    assert executed_blocks(skipping(), calls_of_skipping()[0]) == NAMES != list(named_blocks(skipping()))


def test_the_last_reader_of_a_block_is_at_the_end_of_its_skip():
    transformer, (call, *_) = skipping(), calls_of_skipping()
    assert last_readers(transformer, call, NAMES) == [3, 4, 3, 4, 5]  # 5: nobody behind the last
    without = skipping(skips=False)
    assert last_readers(without, call, NAMES) == [1, 2, 3, 4, 5]


def test_of_a_plain_transformer_each_block_is_read_by_the_next_only():
    transformer, (call, *_) = MODELS["DiT"]()
    assert last_readers(transformer, call, list(named_blocks(transformer))) == [1, 2, 3]


def held_bytes(replay: BlockReplay) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors_of(replay.outputs)}
    return sum(size for size in storages.values() if size > 8)  # a number that stands for a tensor takes none


@pytest.mark.parametrize("skips, read_later", [(True, [1, 2, 3, 2, 1]), (False, [1, 1, 1, 1, 1])])
def test_outputs_that_nobody_reads_any_more_take_no_memory(skips, read_later):
    transformer, (call, *_) = skipping(skips=skips), calls_of_skipping()
    replay, size = replay_of(transformer, [call]), (2 * 5 * 8 + 2 * 3 * 8) * 4
    for index, name in enumerate(NAMES):
        with torch.no_grad():
            replay.keep([replay.arguments(index)[0].run(transformer.get_submodule(name))])
        assert held_bytes(replay) == read_later[index] * size
        assert [t.shape for t in tensors_of(replay.outputs)] == [(2, 5, 8), (2, 3, 8)] * (index + 1)


# --- nothing is left behind ---


def forwards_of(model) -> list:
    return [vars(module).get("forward") for module in model.modules()]


def hooks_of(model) -> list:
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


@every_model
def test_no_forward_and_no_hook_is_left_and_modes_are_as_they_were(make):
    transformer, calls = make()
    transformer.train()
    list(named_blocks(transformer).values())[0].eval()
    modes = [module.training for module in transformer.modules()]
    replay = replay_of(transformer, calls)
    replay.arguments(0)
    assert forwards_of(transformer) == [None] * len(modes) and not hooks_of(transformer)
    assert [module.training for module in transformer.modules()] == modes


def test_training_mode_changes_nothing():
    transformer, (call, *_) = skipping(), calls_of_skipping()
    wanted = replay_of(transformer, [call]).arguments(0)[0]
    transformer.train()
    assert equal(replay_of(transformer, [call]).arguments(0)[0].positional, wanted.positional)


def test_replaced_forwards_come_back_even_after_an_error_and_even_if_they_were_replaced_before():
    plain, replaced = nn.Linear(2, 2), nn.Linear(2, 2)
    own = replaced.forward = lambda x: x
    with pytest.raises(KeyError), replaced_forwards({plain: lambda x: 1, replaced: lambda x: 2}):
        assert (plain(None), replaced(None)) == (1, 2)
        raise KeyError
    assert "forward" not in vars(plain) and vars(replaced)["forward"] is own


def test_an_error_inside_a_pass_is_not_swallowed_and_leaves_nothing():
    transformer, (call, *_) = skipping(), calls_of_skipping()
    replay = replay_of(transformer, [call])
    broken = BlockReplay(transformer, [DenoiserCall(0, 0, (torch.zeros(1, 3),), call.named)], NAMES, replay.last_reader)
    with pytest.raises(RuntimeError):
        broken.arguments(0)
    assert not any(forwards_of(transformer)) and not hooks_of(transformer)


# --- what cannot be replayed is told ---


def test_a_block_that_runs_twice_is_told():
    transformer, (call, *_) = skipping(), calls_of_skipping()
    transformer.early[1] = transformer.early[0]
    with pytest.raises(UnsupportedModelError, match=r"early\.\d runs more than once in a pass of this Skipping.*kmeans"):
        executed_blocks(transformer, call)
    assert not hooks_of(transformer)


def test_a_block_that_does_not_run_in_every_call_is_told():
    transformer, (call, *_) = skipping(), calls_of_skipping()
    replay = replay_of(transformer, [call])
    transformer.unused, replay.order = Block(), ["early.0", "unused"]
    replay.keep([replay.arguments(0)[0].run(transformer.early[0])])
    with pytest.raises(UnsupportedModelError, match="unused does not run in every call of this Skipping"):
        replay.arguments(1)


# --- trees ---


def test_trees_keep_their_kinds():
    tree = {"a": [torch.zeros(1), None], "b": (torch.ones(2), "text"), "c": BlockArguments((torch.zeros(3),), {})}
    doubled = map_tensors(lambda tensor: tensor + 1, tree)
    assert [t.tolist() for t in tensors_of(doubled)] == [[1.0], [2.0, 2.0], [1.0] * 3]
    assert isinstance(doubled["b"], tuple) and isinstance(doubled["c"], BlockArguments) and doubled["a"][1] is None


def test_a_prediction_is_the_tensor_whatever_holds_it():
    x, y = torch.ones(2, 3), torch.zeros(3, 2)
    assert prediction_of(x) is x and prediction_of((x,)) is x and prediction_of({"sample": x}) is x
    assert torch.equal(prediction_of([x, y]), torch.cat([x.flatten(), y.flatten()]))  # one of each size for each sample
