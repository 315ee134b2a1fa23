"""The CPU kernel of the Light GRU against the loop in torch: every output and gradient, at sizes that fit and sizes that do not."""
import multiprocessing
import os
import subprocess
import sys
import threading

import pytest
import torch
from llvmlite import binding, ir

from essl_nb.core.registry import EsslError
from essl_nb.ligru import cell as reference
from essl_nb.ligru.cpu import backend as cpu, loop, product, threads
from essl_nb.ligru.cpu.product import multiply, pack_panels

DOUBLE = torch.double
SHAPES = [(8, 1, 1, 1), (9, 1, 33, 1), (11, 2, 64, 1), (8, 33, 50, 1), (13, 5, 129, 2), (10, 17, 200, 3), (40, 3, 96, 1)]  # T, B, H, threads


def problem(T, B, H, dtype=DOUBLE, *, cell="ligru", seed=0, batch_first=False):
    "Operands of one recurrence and a gradient for its states."
    g = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    wx = new(B, T, 2 * H).transpose(0, 1) if batch_first else new(T, B, 2 * H)
    drop = torch.bernoulli(torch.full((B, H), 0.8, dtype=dtype), generator=g) / 0.8
    lengths = torch.randint(0, T + 1, (B,), generator=g)
    affine = (1 + new(2 * H) / 4, new(2 * H)) if cell == "sligru" else (None, None)
    return [wx, new(2 * H, H) / H**0.5, new(B, H), drop, lengths, *affine], new(T, B, H)


def run(module, given, grad, **kw):
    "States and all gradients, by name; without those that there are none of."
    hs, kept = module.forward(*given, **kw)
    found = module.backward(grad, *given[1:], hs, kept, **kw)
    return {"states": hs} | {name: g for name, g in found._asdict().items() if g is not None}


def furthest(mine, truth):
    "Greatest difference, relative to the largest value of each tensor."
    assert mine.keys() == truth.keys()
    return max(((mine[k] - b).abs().max() / (1 + b.abs().max())).item() for k, b in truth.items() if b.numel())


def equal(mine, truth):
    return mine.keys() == truth.keys() and all(torch.equal(mine[k], b) for k, b in truth.items())


@pytest.mark.parametrize("cell", reference.CELLS)
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T%d-B%d-H%d-threads%d" % s)
def test_float64_is_the_reference(shape, activation, cell):
    *sizes, threads = shape
    given, grad = problem(*sizes, cell=cell, batch_first=threads > 1)
    kw = dict(cell=cell, activation=activation)
    assert furthest(run(cpu, given, grad, threads=threads, **kw), run(reference, given, grad, **kw)) < 1e-12


@pytest.mark.parametrize("cell", reference.CELLS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "T%d-B%d-H%d-threads%d" % s)
def test_float32_is_near_float64(shape, cell):
    *sizes, threads = shape
    given, grad = problem(*sizes, torch.float, cell=cell)
    double = [t.double() if t is not None and t.is_floating_point() else t for t in given]
    assert furthest(run(cpu, given, grad, cell=cell, threads=threads), run(reference, double, grad.double(), cell=cell)) < 1e-5


@pytest.mark.parametrize("cell", reference.CELLS)
def test_both_orders_of_memory_give_the_same(cell):
    given, grad = problem(12, 5, 70, cell=cell)
    other = [given[0].transpose(0, 1).contiguous().transpose(0, 1), *given[1:]]
    first, second = run(cpu, given, grad, cell=cell), run(cpu, other, grad, cell=cell)
    assert torch.equal(first["states"], second["states"]) and torch.equal(first["wx"], second["wx"])
    assert furthest(second, first) < 1e-14
    assert first["states"].is_contiguous() and second["states"].transpose(0, 1).is_contiguous()


@pytest.mark.parametrize("cell", reference.CELLS)
def test_what_stands_in_the_padding_does_not_matter(cell):
    given, grad = problem(10, 4, 40, cell=cell)
    clean = run(cpu, given, grad, cell=cell)
    pad = torch.arange(10)[:, None] >= given[4]
    given[0] = given[0].clone().masked_fill(pad[..., None], float("nan"))
    dirty = run(cpu, given, grad, cell=cell)
    assert equal(dirty, clean) and dirty["wx"][pad].eq(0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("activation", reference.ACTIVATIONS)
def test_nan_and_inf_stay_in_their_utterance(activation, value):
    given, _ = problem(10, 3, 40)
    given[3], given[4] = None, None
    clean, _ = cpu.forward(*given, activation=activation)
    given[0] = given[0].clone()
    given[0][4, 1, 5] = value
    mine, truth = cpu.forward(*given, activation=activation)[0], reference.forward(*given, activation=activation)[0]
    assert torch.allclose(mine, truth, equal_nan=True)
    assert torch.equal(mine[:, ::2], clean[:, ::2]) and torch.equal(mine[:4], clean[:4])


def test_gates_far_out_are_open_or_closed():
    wx = torch.zeros(8, 1, 2 * 16)
    wx[..., 16:] = torch.tensor([-1e4, 1e4]).repeat(8)
    hs, kept = cpu.forward(wx, torch.zeros(32, 16), torch.ones(1, 16))
    assert hs[-1, 0].tolist() == [0.0, 1.0] * 8 and kept.gates.isfinite().all() and kept.xhat is kept.rstd is None


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.int64], ids=str)
def test_other_types_are_refused(dtype):
    with pytest.raises(EsslError, match="float32 and float64"):
        cpu.forward(torch.zeros(9, 1, 8, dtype=dtype), torch.zeros(8, 4, dtype=dtype), torch.zeros(1, 4, dtype=dtype))


def test_threads_are_counted():
    assert cpu.choose_threads(512, 8) == 8 and cpu.choose_threads(512, 9) == 8 and cpu.choose_threads(32, 4) == 1
    with pytest.raises(EsslError, match="threads=0"):
        cpu.choose_threads(512, 0)


def test_more_threads_than_cores_are_right():
    given, grad = problem(12, 4, 1024, torch.float)
    few, many = (run(cpu, given, grad, threads=n) for n in (1, 16))
    assert furthest(many, few) < 1e-5


def test_two_callers_at_once():
    "Each call has threads and a counter of its own."
    given, grad = problem(60, 4, 256, torch.float)
    truth, found = run(cpu, given, grad, threads=2), {}
    callers = [threading.Thread(target=lambda i=i: found.update({i: run(cpu, given, grad, threads=2)})) for i in range(3)]
    for c in callers:
        c.start()
    for c in callers:
        c.join()
    assert all(equal(got, truth) for got in found.values())


def test_pythons_threads_give_what_openmps_do(monkeypatch):
    given, grad = problem(30, 4, 256, torch.float, cell="sligru")
    truth = run(cpu, given, grad, cell="sligru", threads=3)
    monkeypatch.setattr(threads, "openmp_library", lambda: None)
    assert threads.openmp_entry(3) == 0
    assert equal(run(cpu, given, grad, cell="sligru", threads=3), truth)


@pytest.mark.skipif(threads.openmp_library() is None, reason="torch has no OpenMP library of GCC's here")
@pytest.mark.parametrize("setting, trusted", [({}, True), ({"OMP_THREAD_LIMIT": "1"}, False), pytest.param({"OMP_DYNAMIC": "true"}, False, marks=pytest.mark.slow),
                                              pytest.param({"OMP_NUM_THREADS": "1"}, True, marks=pytest.mark.slow)], ids=str)
def test_openmp_is_asked_only_where_it_gives_all_threads(setting, trusted):
    code = """
import torch
from essl_nb.ligru.cpu import backend as cpu, threads
hs, _ = cpu.forward(torch.randn(9, 2, 256), torch.randn(256, 128), torch.zeros(2, 128), threads=2)
print(bool(threads.openmp_entry(2)), hs.isfinite().all().item())
"""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    found = subprocess.run([sys.executable, "-c", code], env=clean | setting, capture_output=True, text=True, timeout=120)
    assert found.stdout.split() == [str(trusted), "True"], found.stderr


def in_worker(queue):
    given, grad = problem(20, 3, 128, torch.float)
    queue.put([t.double().sum().item() for t in run(cpu, given, grad, threads=2).values()])


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork here")
def test_forked_workers_after_the_parent_has_run():
    given, grad = problem(20, 3, 128, torch.float)
    here = [t.double().sum().item() for t in run(cpu, given, grad, threads=2).values()]
    torch.mm(torch.randn(300, 300), torch.randn(300, 300))  # torch's own threads have run as well
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=in_worker, args=(queue,)) for _ in range(2)]
    for w in workers:
        w.start()
    results = [queue.get(timeout=60) for _ in workers]
    for w in workers:
        w.join(10)
    assert all(r == here for r in results) and all(w.exitcode == 0 for w in workers)


@pytest.mark.parametrize("B", range(1, 12))
def test_product_at_every_number_of_rows(B):
    a, weights = torch.randn(3 * B, 37), torch.randn(37, 61)
    packed = pack_panels(weights)
    out = torch.empty(B, packed.shape[0] * packed.shape[2])
    multiply(out.numpy(), a.numpy(), 1, 3, packed.numpy(), 61, B & 1)
    assert torch.allclose(out[:, :61], a[1::3] @ weights, atol=1e-4)


PROCESSORS = pytest.mark.parametrize("triple, features, instruction", [
    ("aarch64-unknown-linux-gnu", "+neon", "fmla\tv"),
    ("x86_64-unknown-linux-gnu", "+avx2,+fma", "vfmadd"),
    ("x86_64-unknown-linux-gnu", "+avx512f", "zmm"),
], ids=["arm64", "avx2", "avx512"])
REALS = pytest.mark.parametrize("real", [ir.FloatType(), ir.DoubleType()], ids=["float32", "float64"])


def assembly_on(triple, features, arguments, write, monkeypatch):
    "What another processor would be given of a function that `write` fills."
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        target = binding.Target.from_triple(triple)
    except RuntimeError:
        pytest.skip(f"this LLVM has no {triple}")
    monkeypatch.setattr(product, "VECTOR_BYTES", {"+neon": 16, "+avx2,+fma": 32, "+avx512f": 64}[features])
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), arguments), "tested")
    builder = ir.IRBuilder(function.append_basic_block())
    write(builder, function.args)
    builder.ret_void()
    machine = target.create_target_machine(features=features, opt=3)
    return machine.emit_assembly(binding.parse_assembly(str(module)))


@PROCESSORS
@REALS
def test_tile_is_vector_code_on_other_processors(triple, features, instruction, real, monkeypatch):
    "Assembly of one tile: fused multiply-adds on vectors, and no call of a library."
    p = real.as_pointer()
    arguments = [p, product.INT64, p, product.INT64, p, product.INT64]
    write = lambda b, args: product.micro_kernel(b, real, 4, 3, *args)
    assembly = assembly_on(triple, features, arguments, write, monkeypatch)
    assert instruction in assembly and "\tcall" not in assembly and "\tbl\t" not in assembly


@PROCESSORS
@REALS
def test_formulas_are_vector_code_on_other_processors(triple, features, instruction, real, monkeypatch):
    "Assembly of a gate: the exponential is arithmetic on vectors, and no call of a library."
    formula = lambda x, h: [h / (1 + product.vector_exp(0 - x)), loop.activation_formulas("tanh")[0](x)]
    write = lambda b, args: product.elementwise_loop(b, real, formula, args[0], list(args[1:]))
    assembly = assembly_on(triple, features, [product.INT64, *[real.as_pointer()] * 4], write, monkeypatch)
    assert instruction in assembly and "\tcall" not in assembly and "\tbl\t" not in assembly
