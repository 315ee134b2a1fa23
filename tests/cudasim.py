"""A CUDA simulator for the kernels of essl_nb.ligru: all blocks at once, warps in step, and a memory that can be late.

Kernels are plain Python functions of the words they are written in (essl_nb.ligru.gpu.ptx.device_words makes those of a GPU).
Here are the same words for the simulator. Each CUDA thread is a greenlet; it runs until it has to wait for others:

- `syncthreads` waits for all threads of the block, shuffles and `mma` for all 32 of the warp; a thread that does not come is an error;
- `reached` gives way to another thread; when nobody but waiting threads is left, that is reported as a deadlock;
- what a block writes is seen by other blocks only after it has arrived at a counter (release);
- `mma` collects the words of 32 threads into the matrices that PTX documents for m16n8k16, and hands the product back;
- `pack_bf16x2` rounds to the nearest bfloat16, ties to even;
- memory that was never written is NaN, an index out of range is an error.

`seed` draws the order in which threads run; a missing barrier shows as numbers that depend on it.
"""
import inspect
import random
from collections import deque
from types import SimpleNamespace

import numpy as np
import torch
from greenlet import getcurrent, greenlet

f32, i32 = np.float32, np.int32


class Memory:
    "A flat global array. Writes wait in the block that made them until it arrives somewhere."

    def __init__(self, array):
        self.array = array

    def __getitem__(self, i):
        i = self.checked(i)
        return getcurrent().block.late.get((id(self), i), (0, 0, self.array[i]))[2]

    def __setitem__(self, i, value):
        i = self.checked(i)
        getcurrent().block.late[id(self), i] = self, i, self.array.dtype.type(value)

    def checked(self, i):
        if not 0 <= i < len(self.array):
            raise IndexError(f"index {i} of {len(self.array)}")
        return int(i)


class Block:
    def __init__(self, index, threads):
        self.index, self.shared, self.late = index, [], {}
        self.meeting = {}  # name of a barrier or a warp's meeting → those who wait
        self.threads = threads

    def release(self):
        for memory, i, value in self.late.values():
            memory.array[i] = value
        self.late.clear()


class Thread(greenlet):
    def __init__(self, run, block, number):
        super().__init__(run)
        self.block, self.number, self.allocated = block, number, 0

    def meet(self, kind, value=None):
        "Wait for everyone of the block (syncthreads) or of the warp; all come with a value and leave with a result."
        warp = None if kind == "sync" else self.number // 32
        size = self.block.threads if kind == "sync" else 32
        here = self.block.meeting.setdefault(warp, [])
        here.append((self, kind, value))
        if len(here) == size:
            del self.block.meeting[warp]
            kinds = {k for _, k, _ in here}
            if len(kinds) > 1:
                raise RuntimeError(f"threads of block {self.block.index} meet at different places: {kinds}")
            for (thread, _, _), result in zip(here, RESULTS[kind[0] if isinstance(kind, tuple) else kind](here, kind)):
                thread.result = result
                self.queue.append(thread)
        return self.give_way(False)

    def give_way(self, again=True):
        if again:
            self.queue.append(self)
        self.parent.switch()
        return self.__dict__.pop("result", None)


def exchange(here, kind):
    at = {thread.number % 32: value for thread, _, value in here}
    return [at[(thread.number % 32) ^ kind[1]] for thread, _, _ in here]


def halves(words):
    "The two bfloat16 numbers of each 32-bit word, lower half first, as float64."
    w = np.asarray(words, i32).view(np.uint32)
    return np.stack([w << np.uint32(16), w & np.uint32(0xFFFF0000)], -1).view(f32).astype(np.float64)


def multiply(here, _):
    "m16n8k16: the fragments as in the PTX ISA, chapter on mma.m16n8k16 with .bf16."
    lane = np.array([thread.number % 32 for thread, _, _ in here])
    g, q = lane // 4, lane % 4
    a, b, c = (np.array([v[k] for _, _, v in here]) for k in range(3))
    A, B, C, a, b = np.empty((16, 16)), np.empty((16, 8)), np.empty((16, 8)), halves(a), halves(b)
    for half in range(2):
        A[g, 2 * q + half], A[g + 8, 2 * q + half] = a[:, 0, half], a[:, 1, half]
        A[g, 2 * q + 8 + half], A[g + 8, 2 * q + 8 + half] = a[:, 2, half], a[:, 3, half]
        B[2 * q + half, g], B[2 * q + 8 + half, g] = b[:, 0, half], b[:, 1, half]
        C[g, 2 * q + half], C[g + 8, 2 * q + half] = c[:, half], c[:, 2 + half]
    D = (A @ B + C).astype(f32)
    return [(D[i, 2 * k], D[i, 2 * k + 1], D[i + 8, 2 * k], D[i + 8, 2 * k + 1]) for i, k in zip(g, q)]


RESULTS = {"sync": lambda here, _: [None] * len(here), "shuffle": exchange, "mma": multiply}


def pack_bf16x2(low, high):
    "Two float32 to a word of bfloat16, rounded to nearest even."
    bits = np.array([low, high], f32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)).astype(np.uint32)
    rounded[np.isnan(np.array([low, high], f32))] = 0x7FC0
    return np.array([rounded[0] | rounded[1] << np.uint32(16)], np.uint32).view(i32)[0]


def poisoned(shape, dtype):
    return np.full(shape, np.nan if dtype is f32 else -(2**30), dtype)


def shared_array(shape, dtype):
    me = getcurrent()
    if me.allocated == len(me.block.shared):
        me.block.shared.append(poisoned(shape, dtype))
    me.allocated += 1
    return me.block.shared[me.allocated - 1]


class Cuda:
    "What kernels use of numba.cuda."
    shared, local = SimpleNamespace(array=shared_array), SimpleNamespace(array=poisoned)
    threadIdx = property(lambda self: SimpleNamespace(x=getcurrent().number))
    blockIdx = property(lambda self: SimpleNamespace(**dict(zip("xyz", getcurrent().block.index))))
    gridDim = property(lambda self: SimpleNamespace(**dict(zip("xyz", getcurrent().grid))))

    def syncthreads(self):
        getcurrent().meet("sync")

    def shfl_xor_sync(self, mask, value, other):
        assert mask == 0xFFFFFFFF
        return getcurrent().meet(("shuffle", other), value)


def load4(memory, i):
    assert i % 4 == 0, "a load of 16 bytes is aligned to 16 bytes"
    return tuple(memory[i + k] for k in range(4))


def arrive(count, i):
    getcurrent().block.release()
    count.array[i] += 1


def reached(count, i):
    me = getcurrent()
    if count.array[i] == me.__dict__.get("seen"):
        me.waits = True
        me.give_way()
    me.waits, me.seen = False, count.array[i]
    return count.array[i]


def unary(f):
    return lambda v: f(f32(v))


WORDS = SimpleNamespace(
    cuda=Cuda(), float32=f32, int32=i32, exp=unary(np.exp), tanh=unary(np.tanh), sin=unary(np.sin), cos=unary(np.cos), sqrt=unary(np.sqrt),
    device=lambda f: f, pack_bf16x2=pack_bf16x2, load4=load4, load1=lambda memory, i: memory[i], arrive=arrive, reached=reached, cooperative=lambda: None,
    mma=lambda *v: getcurrent().meet("mma", (v[:4], v[4:6], v[6:])),
)


def run(kernel, grid, threads, args, seed=None):
    "Run a kernel on flat arrays; tensors share their memory with it."
    args = [Memory(a.detach().numpy()) if isinstance(a, torch.Tensor) else f32(a) if isinstance(a, float) else a for a in args]
    queue, left, failed, main = deque(), 0, [], getcurrent()

    def start(kernel=kernel):
        try:
            with np.errstate(all="ignore"):
                kernel(*args)
        except Exception as e:
            failed.append(e)

    blocks = [Block((x, y, z), threads) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    for block in blocks:
        for number in range(threads):
            thread = Thread(start, block, number)
            thread.queue, thread.grid, thread.waits = queue, grid, False
            queue.append(thread)
    generator, idle = random.Random(seed), 0
    while queue and not failed:
        if seed is not None:
            queue.rotate(generator.randrange(len(queue)))
        thread = queue.popleft()
        thread.switch()
        idle = idle + 1 if thread.waits else 0
        if idle > 50 + 20 * len(queue):
            raise RuntimeError("deadlock: every thread waits for a counter that nobody raises")
    if failed:
        raise failed[0]
    stuck = {str(k): len(v) for b in blocks for k, v in b.meeting.items()}
    if stuck:
        raise RuntimeError(f"deadlock: threads wait for others of their block or warp that never come: {stuck}")
    for block in blocks:
        block.release()


class Simulator:
    "An engine for essl_nb.ligru.gpu.backend that runs here."

    frames_per_graph = 3

    def __init__(self, limits, seed=0, words=WORDS):
        self.the_limits, self.seed, self.words, self.launched = limits, seed, words, []

    def limits(self, device):
        return self.the_limits

    def fits(self, maker, shape, device):
        return 1 << 20

    def launch(self, maker, shape, grid, args):
        kernel = maker(self.words, shape)
        self.launched.append((maker.__name__, shape, grid, dict(zip(inspect.signature(kernel).parameters, args))))
        run(kernel, grid, shape.threads, [a.detach().view(-1) if isinstance(a, torch.Tensor) else a for a in args], self.seed)

    def record(self, run, device):
        run()  # as on a GPU: what is recorded runs once before
        return run
