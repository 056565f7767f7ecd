"""Blocks' inputs on the host: the order of copies and waits, by stand-ins for streams."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from conftest import DEVICE

import fastprompt
from fastprompt.blocks import offload
from fastprompt.blocks.offload import Host


class Stream:
    """Notes what happens on it."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event):
        self.log.append(f"{self.name} waits for {event.name}")

    def synchronize(self):
        self.log.append(f"the host waits for {self.name}")

    def __enter__(self):
        self.log.append(f"on {self.name}")

    def __exit__(self, *_):
        self.log.append("back")


class Input:
    """In the place of a tensor on a card."""

    device, shape, dtype = torch.device("cuda:0"), (2, 3), torch.float32

    def __init__(self, log, name):
        self.log, self.name = log, name

    def copy_(self, x, non_blocking):
        assert non_blocking
        self.log.append(f"{x.name} to the host")

    def to(self, device, non_blocking):
        assert non_blocking and device == self.device
        self.log.append(f"{self.name} to the card")
        return Input(self.log, self.name)

    def record_stream(self, stream):
        self.log.append(f"{self.name} is used on {stream.name}")

    def data_ptr(self):
        return id(self)


class Event:
    count = 0

    def __init__(self, log):
        Event.count += 1
        self.log, self.name = log, f"event {Event.count}"

    def record(self, stream):
        self.log.append(f"{self.name} on {stream.name}")


@pytest.fixture
def log(monkeypatch):
    log, names, now = [], itertools.cycle("abcdefgh"), []
    Event.count = 0
    now.append(Stream(log, "main"))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(log, "side"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now[0])
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(
        offload.torch, "empty", lambda *a, **o: Input(log, f"copy of {next(names)}")
    )
    return log


def test_a_copy_is_made_beside_and_fetched_ahead(log):
    host = Host()
    first, second = (host.send(Input(log, name), i) for i, name in enumerate("ab"))
    assert log == [
        "side waits for main", "on side", "a to the host", "back", "a is used on side",
        "side waits for main", "on side", "b to the host", "back", "b is used on side",
    ]  # fmt: skip
    log.clear()
    second.fetch(second.pinned)
    assert log == [
        "on side", "copy of b to the card", "event 1 on side", "back",
        "main waits for event 1", "copy of b is used on main",
        "on side", "copy of a to the card", "event 2 on side", "back",  # while b is computed
    ]  # fmt: skip
    log.clear()
    x = first.fetch(first.pinned)
    assert log == ["main waits for event 2", "copy of a is used on main"] and x.name == "copy of a"


def test_what_hooks_or_a_second_backward_give_is_taken(log):
    sent = Host().send(Input(log, "a"), 0)
    log.clear()
    other = Input(log, "another")
    assert sent.fetch(other).name == "another" and log == ["another to the card"]
    log.clear()
    assert sent.fetch(other).name == "another" and log == ["another to the card"]


def test_only_neighbours_are_fetched_ahead(log):
    """Two forwards in a row, then their backwards: a chain ends where a tower begins."""
    host = Host()
    sent = [host.send(Input(log, "a"), i) for i in (0, 1, 0, 1, 3)]
    before = [None if each.before is None else sent.index(each.before) for each in sent]
    assert before == [None, 0, None, 2, None]


def test_a_step_holds_nothing_of_the_one_before(log):
    host, held = Host(), None
    for _ in range(3):
        sent = [host.send(Input(log, "a"), i) for i in range(3)]
        if held is not None:
            assert all(ref() is None for ref in held)
        for each in reversed(sent):
            each.fetch(each.pinned)
        assert all(each.before is None and each.pinned is None for each in sent)
        held = [weakref.ref(each) for each in sent]
        del sent, each
        gc.collect()


def test_who_packs_what_is_saved_finds_it_whole(log):
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        Host().send(Input(log, "a"), 0)
    assert log[-2:] == ["a is used on side", "the host waits for side"]


def test_a_host_is_copied_without_its_streams(log):
    host = Host()
    host.send(Input(log, "a"), 0)
    for other in (copy.deepcopy(host), pickle.loads(pickle.dumps(host))):
        assert type(other) is Host and not other._streams


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
def test_on_a_card_every_policy_gives_the_same_bits():
    import tiny

    results = []
    for memory in ("low", "offload"):
        torch.manual_seed(0)
        model = tiny.build("llama", torch.float32).to(DEVICE)
        fastprompt.patch(model, memory=memory)
        given = {k: v.to(DEVICE) for k, v in tiny.inputs("llama", torch.float32).items()}
        for _ in range(3):
            model.train()(**given, labels=given["input_ids"]).loss.backward()
        results.append([p.grad for p in fastprompt.patch_of(model).trainable.values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
