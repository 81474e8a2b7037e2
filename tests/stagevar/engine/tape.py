"""A recorder of graphs on a CPU: what it recorded is replayed over the same fixed buffers as a CUDA graph's."""

import dataclasses
import weakref
from unittest import mock

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from benchmarks.relaunch import tensors_of, with_tensors
from stagevar.engine import Recorder
from stagevar.tensors import noise


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a tensor that the recording did not make lies. Like a recorded kernel it does not keep the memory alive."""

    storage: StorageWeakRef
    like: tuple

    @classmethod
    def of(cls, tensor):
        like = (tensor.dtype, tensor.storage_offset(), tensor.size(), tensor.stride())
        return cls(StorageWeakRef(tensor.untyped_storage()), like)

    def read(self):
        assert not self.storage.expired(), "a recorded kernel reads memory that was freed"
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        dtype, offset, size, stride = self.like
        return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)


class Number(int):
    """Which of the recording's own tensors."""


def philox_in_operations(count, key_R2, words):
    """`noise._philox_on_cpu` as a card draws: in operations that a recording sees, and with the same bits."""
    zero_R1 = torch.zeros((len(key_R2), 1), dtype=torch.int64)
    counter = (torch.arange(count)[None], *(zero_R1 + word for word in words))
    return torch.stack(noise.philox4x32(counter, (key_R2[:, :1], key_R2[:, 1:])), dim=-1)


class Tape(TorchDispatchMode):
    """Keeps every operation. Numbers are baked in, tensors from outside are addresses, and its own are numbered."""

    def __init__(self):
        super().__init__()
        self.operations, self.numbers, self.alive = [], {}, []
        self.drawing = mock.patch.object(noise, "_philox_on_cpu", philox_in_operations)

    def __enter__(self):
        self.drawing.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.drawing.stop()
        super().__exit__(*error)

    def name(self, tensor):
        return self.numbers[id(tensor)] if id(tensor) in self.numbers else Address.of(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        named = tree_map_only(torch.Tensor, self.name, (args, kwargs or {}))
        result = function(*args, **(kwargs or {}))
        made = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
        for tensor in made:
            self.numbers.setdefault(id(tensor), Number(len(self.alive)))
            self.alive.append(tensor)
        self.operations.append((function, named, [self.numbers[id(t)] for t in made]))
        return result

    def finish(self, results):
        """Ends the recording: what it made is gone, but for where the results come from."""
        self.wanted = [self.name(tensor) for tensor in results]
        self.alive, self.numbers = None, None

    def replay(self):
        """Runs the operations again and returns what the results have become."""
        now = {}

        def current(name):
            return name.read() if isinstance(name, Address) else now[name]

        for function, named, numbers in self.operations:
            args, kwargs = tree_map_only((Address, Number), current, named)
            fresh = [t for t in tree_flatten(function(*args, **kwargs))[0] if isinstance(t, torch.Tensor)]
            now.update(zip(numbers, fresh, strict=True))
        return [current(name) for name in self.wanted]


class TapeRecorder(Recorder):
    """A CUDA graph's contract on a CPU, the one on memory included: a replay spoils what was recorded later."""

    def __init__(self):
        self.made = {False: [], True: []}

    def record(self, run, reset, separate_pool=False):
        run()
        reset()
        with Tape() as tape:
            made = run()
        results = tensors_of(made)
        tape.finish(results)
        outputs = [torch.full_like(tensor, float("nan")) for tensor in results]
        pool = self.made[separate_pool]
        pool.append([weakref.ref(tensor) for tensor in outputs])
        later = len(pool)

        def replay():
            for spoiled in (tensor() for recording in pool[later:] for tensor in recording):
                if spoiled is not None:
                    spoiled.fill_(float("nan"))
            for mine, fresh in zip(outputs, tape.replay(), strict=True):
                mine.copy_(fresh)

        return replay, with_tensors(made, iter(outputs))
